"""8-bit numbers and scales: the formula in numpy, the nearest number, rows made anew like all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losia_fx.method import kernels, packing
from losia_fx.method.packing import DTYPES, LARGEST, pack, pack_rows, quantise

KINDS = list(DTYPES)
DRAWN = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def same(one: Tensor, other: Tensor) -> bool:
    """To the bit, of float8 too."""
    if one.element_size() == 1:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return one.dtype == other.dtype and torch.equal(one, other)


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert same(one[0], other[0])
    assert same(one[1], other[1])


@pytest.mark.parametrize("dtype", DRAWN)
def test_int8_is_the_formula_in_numpy(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(4, 5, 24)).to(dtype)
    numbers, scales = quantise(x, "int8")
    plain = x.float().numpy()
    largest = np.abs(plain).max(-1, keepdims=True)
    expected = np.rint(plain * (np.float32(127) / largest)).astype(np.int8)
    assert numbers.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert np.array_equal(numbers.numpy(), expected)
    assert np.array_equal(scales.numpy(), largest / np.float32(127))
    assert numbers.abs().amax(-1).eq(127).all()


@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_the_nearest_number_and_nothing_clipped(seed: int, kind: str, exponent: float) -> None:
    """int8 is off by half a scale at most, e4m3 by a sixteenth of a number (half a step of its 3-bit mantissa)."""
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    numbers, scales = quantise(x, kind)
    error = (numbers.float() * scales - x).abs()
    step = scales / 2 if kind == "int8" else torch.maximum(x.abs() / 16, scales * 2.0**-10)
    assert (error <= step * 1.0001).all()
    assert numbers.float().abs().max() <= LARGEST[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_not_finite(kind: str) -> None:
    x = torch.ones(4, 8)
    x[0], x[1, 2], x[2, 3] = 0, float("inf"), float("nan")
    numbers, scales = quantise(x, kind)
    assert numbers[0].float().eq(0).all()
    back = numbers.float() * scales
    assert back[0].eq(0).all()
    assert not back[1:3].isfinite().all(-1).any()  # each of these rows says so
    assert back[3].eq(1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 50, 2**22])
def test_a_weight_is_packed_a_part_at_a_time(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK", chunk)
    weight = torch.randn(7, 16)
    numbers, scales = pack(weight, kind)
    assert (numbers.shape, scales.shape) == ((7, 16), (7, 1))
    assert_same((numbers, scales), quantise(weight, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_made_anew_are_those_of_the_whole(
    kind: str, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with larger and smaller scales than before."""
    monkeypatch.setattr(kernels, "WORTH_COMPILING", 1)
    kernels._forms.clear()
    weights = [torch.randn(size).to(dtype) for size in ((24, 40), (16, 32))]
    rows = [torch.tensor([0, 5, 23]), torch.tensor([3, 4])]
    packed = [pack(weight, kind) for weight in weights]
    before = [numbers.clone() for numbers, _ in packed]
    weights[0][5, 7], weights[0][0] = 30.0, weights[0][0] / 7
    weights[1][3:5, 1:9] += 1
    numbers, scales = zip(*packed, strict=True)
    kernels.pack_rows(weights, rows, numbers, scales, kind, compiled)
    assert bool(kernels._forms) == compiled
    for weight, pair, old in zip(weights, packed, before, strict=True):
        assert_same(pair, pack(weight, kind))
        assert not same(pair[0], old)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_behind_what_is_rounded_in_between(kind: str) -> None:
    """x = bf16(a b) - c is all rounding. Of a compiler that rounds here and not there, nothing changes its sign."""

    def small(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        product = a * b
        return product, product - c, *quantise(product - c, kind)

    a, b = torch.randn(2, 8, 256).bfloat16()
    c = ((a.float() * b.float()) * (1 + 2.0**-9 * torch.rand(8, 256))).bfloat16()
    _, x, numbers, scales = torch.compile(small)(a, b, c)
    exact = a.float() * b.float() - c.float()
    back = numbers.float() * scales
    assert back.isfinite().all()
    largest = torch.maximum(x.float().abs(), exact.abs()).amax(-1, keepdim=True)
    rounding = 2.0**-8 * (a * b).abs()
    assert (torch.minimum((back - exact).abs(), (back - x).abs()) <= rounding + largest / 16).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_row_is_touched(kind: str) -> None:
    weight = torch.randn(6, 16)
    numbers, scales = pack(weight, kind)
    before = numbers.clone(), scales.clone()
    pack_rows(torch.zeros(6, 16), torch.tensor([1, 4]), kind, numbers, scales)
    others = torch.tensor([0, 2, 3, 5])
    assert_same((numbers[others], scales[others]), (before[0][others], before[1][others]))
    assert numbers[[1, 4]].float().eq(0).all()
