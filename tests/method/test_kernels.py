"""What runs over whole weights around a step: the formulas in numpy, in chunks, compiled, and W untouched elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import losia_fx
from losia_fx.config import IMPORTANCES
from losia_fx.method import kernels
from losia_fx.method.kernels import update_importance, write_back
from losia_fx.method.subnet import gather, scatter
from losia_fx.tools.bench.memory import allocated_peak
from tests.support.toys import Toy, batch, loss_of

KINDS = [kind for kind in IMPORTANCES if kind != "random"]
BETAS = (0.85, 0.7)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is worth compiling, and nothing has been yet."""
    monkeypatch.setattr(kernels, "WORTH_COMPILING", 1)
    kernels._forms.clear()


def by_numpy(
    steps: list[tuple[Tensor, Tensor]], kind: str, factor: float, limit: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """I and U after these steps of (W, G), in float64, from the formulas of the method."""
    shape = tuple(steps[0][0].shape)
    importance, uncertainty = np.zeros(shape), np.zeros(shape)
    for weight, grad in steps:
        w, g = weight.double().numpy(), grad.double().numpy() * factor
        g = g if limit is None else np.clip(g, -limit, limit)
        new = {
            "mixed": np.abs(w * g - (w * g) ** 2 / 2),
            "first": np.abs(w * g),
            "second": (w * g) ** 2,
            "gradient": g**2,
        }[kind]
        importance = BETAS[0] * importance + (1 - BETAS[0]) * new
        uncertainty = BETAS[1] * uncertainty + (1 - BETAS[1]) * np.abs(new - importance)
    return importance, uncertainty


def measured(
    steps: list[tuple[Tensor, Tensor]],
    kind: str = "mixed",
    factor: float = 0.5,
    limit: float | None = 1.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    importance, uncertainty = (torch.zeros(steps[0][0].shape) for _ in range(2))
    for weight, grad in steps:
        before = weight.clone(), grad.clone()
        update_importance(importance, uncertainty, weight, grad, factor, limit, kind, BETAS, compiled)
        assert torch.equal(weight, before[0])
        assert torch.equal(grad, before[1])
    return importance, uncertainty


def drawn(*shape: int, dtype: torch.dtype = torch.float32, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(shape).to(dtype), (3 * torch.randn(shape)).to(dtype)) for _ in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_formulas(kind: str, limit: float | None, steps: int) -> None:
    made = drawn(7, 5, steps=steps)
    grads = torch.stack([grad for _, grad in made]).abs() * 0.5
    assert grads.min() < 1 < grads.max()  # the limit bites, and not everywhere
    for found, expected in zip(measured(made, kind, 0.5, limit), by_numpy(made, kind, 0.5, limit), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_narrow_and_wide_weights(dtype: torch.dtype) -> None:
    """Computed in float32 from what W and G hold, whatever their width."""
    made = drawn(6, 9, dtype=dtype)
    for found, expected in zip(measured(made), by_numpy(made, "mixed", 0.5, 1.0), strict=True):
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4, 11, 55, 56])
def test_chunks_are_one_pass_to_the_bit(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(11, 5)
    whole = measured(made, kind)
    monkeypatch.setattr(kernels, "CHUNK", {"cpu": size, "cuda": size})
    for found, expected in zip(measured(made, kind), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [7, 2**18])
def test_weights_of_experts_and_weights_that_are_not_contiguous(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", {"cpu": chunk, "cuda": chunk})
    made = drawn(3, 4, 5)
    turned = [(w.mT.contiguous().mT, g.permute(2, 0, 1).contiguous().permute(1, 2, 0)) for w, g in made]
    assert not turned[0][0].is_contiguous()
    assert not turned[0][1].is_contiguous()
    for a, b in zip(measured(made), measured(turned), strict=True):
        assert torch.equal(a, b)
    for found, expected in zip(measured(turned), by_numpy(made, "mixed", 0.5, 1.0), strict=True):
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=2e-6, atol=1e-7)


def test_what_is_small_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._forms.clear()
    made = drawn(5, 7)
    monkeypatch.setattr(kernels, "WORTH_COMPILING", 36)
    measured(made, compiled=True)
    weight = torch.zeros(5, 7)
    write_back([weight], [torch.tensor([0])], [torch.tensor([1])], [torch.ones(1, 1)])
    assert graphs() == 0
    assert weight[0, 1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_plain_within_one_rounding(kind: str, compiling: None) -> None:
    """One graph for matrices of many sizes and the weights of experts, for any factor and limit."""
    for number, shape in enumerate([(64, 48), (32, 80), (7, 5), (128, 16), (3, 8, 24), (5, 4, 6)]):
        for limit in (None, 0.7 + number):
            made, factor = drawn(*shape), 0.5 + number
            found, plain = measured(made, kind, factor, limit, True), measured(made, kind, factor, limit)
            for a, b in zip(found, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(b.abs().max()))
        assert graphs() == 1


def test_compiled_forms_of_several_decay_rates(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's cache takes graphs for one another that differ in which of their floats are equal."""
    made = drawn(16, 8)
    for betas in ((0.85, 0.85), (0.85, 0.7), (0.7, 0.85)):
        monkeypatch.setattr(sys.modules[__name__], "BETAS", betas)
        for a, b in zip(measured(made, compiled=True), measured(made), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(b.abs().max()))


# -- write-back ----------------------------------------------------------------------------------------------------


def index(size: int) -> st.SearchStrategy[Tensor]:
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda chosen: torch.tensor(sorted(chosen)))


def laid_out(weight: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return weight.mT.contiguous().mT
    if layout == "sliced":
        wide = torch.zeros(*weight.shape[:-1], 2 * weight.shape[-1], dtype=weight.dtype)
        wide[..., ::2] = weight
        return wide[..., ::2]
    return weight.clone()


def assert_written(weight: Tensor, before: Tensor, rows: Tensor, cols: Tensor | None, values: Tensor) -> None:
    """The subnet is S rounded, and every other element what it was."""
    assert torch.equal(gather(weight, rows, cols), values.to(weight.dtype))
    inside = torch.zeros(weight.shape, dtype=torch.bool)
    columns = torch.arange(weight.shape[-1]) if cols is None else cols
    if weight.dim() == 2:
        inside[rows[:, None], columns] = True
    else:
        for expert in range(len(weight)):
            inside[expert][rows[expert][:, None], columns[expert]] = True
    assert int(inside.sum()) == values.numel()
    assert torch.equal(weight[~inside], before[~inside])


@settings(max_examples=60)
@given(
    index(6),
    st.none() | index(9),
    st.sampled_from(["contiguous", "transposed", "sliced"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_write_back(rows: Tensor, cols: Tensor | None, layout: str, dtype: torch.dtype) -> None:
    before = torch.randn(6, 9).to(dtype)
    weight = laid_out(before, layout)
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.randn(len(rows), 9 if cols is None else len(cols), dtype=wide)
    write_back([weight], [rows], [cols], [values])
    assert_written(weight, before, rows, cols, values)


@settings(max_examples=30)
@given(
    st.tuples(*(st.permutations(range(5)).map(lambda order: sorted(order[:2])) for _ in range(3))),
    st.tuples(*(st.permutations(range(7)).map(lambda order: sorted(order[:3])) for _ in range(3))),
    st.sampled_from(["contiguous", "transposed"]),
)
def test_write_back_of_experts(rows: Any, cols: Any, layout: str) -> None:
    rows, cols = torch.tensor(rows), torch.tensor(cols)
    before, values = torch.randn(3, 5, 7).bfloat16(), torch.randn(3, 2, 3)
    weight = laid_out(before, layout)
    write_back([weight], [rows], [cols], [values])
    assert_written(weight, before, rows, cols, values)


@pytest.mark.parametrize("shape", [(), (1, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "experts", "whole"])
def test_one_value_for_all(layout: str, shape: tuple[int, ...]) -> None:
    rows, cols = torch.tensor([0, 2]), torch.tensor([1, 3, 4])
    before = torch.randn(4, 6)
    if layout == "experts":
        rows, cols, before = rows.repeat(3, 1), cols.repeat(3, 1), torch.randn(3, 4, 6)
    picked = None if layout == "whole" else cols
    ways = (scatter, lambda *args: write_back(*([each] for each in args)))
    for way in ways:
        weight = laid_out(before, layout)
        way(weight, rows, picked, torch.full(shape, 2.5))
        assert_written(weight, before, rows, picked, torch.full_like(gather(weight, rows, picked), 2.5))


def test_write_back_of_parameters_and_of_nothing() -> None:
    weight, values = torch.nn.Parameter(torch.zeros(3, 3)), torch.nn.Parameter(torch.ones(1, 1))
    write_back([weight], [torch.tensor([1])], [torch.tensor([2])], [values])
    assert weight.sum() == weight[1, 2] == 1
    write_back([], [], [], [])


@pytest.mark.slow
def test_compiled_write_back_is_plain_to_the_bit(compiling: None) -> None:
    """Blocks of one kind share a graph, wherever their subnets are."""
    for _ in range(4):
        shapes = [(12, 16), (24, 8), (3, 8, 10)]
        befores = [torch.randn(shape).bfloat16() for shape in shapes]
        weights = [before.clone() for before in befores]
        rows = [*(torch.randperm(8)[:3].sort().values for _ in range(2)), torch.stack([torch.arange(2)] * 3)]
        cols = [torch.randperm(8)[:4].sort().values, None, torch.stack([torch.arange(1, 4)] * 3)]
        values = [torch.randn(3, 4), torch.randn(3, 8), torch.randn(3, 2, 3)]
        write_back(weights, rows, cols, values)
        for written in zip(weights, befores, rows, cols, values, strict=True):
            assert_written(*written)
    assert graphs() == 1


@pytest.mark.slow
def test_compiled_write_back_makes_no_copy_of_a_weight(compiling: None) -> None:
    """Inductor writes into what it is given, where it sees that it may; else it would copy all of it there and back."""
    weights = [torch.zeros(256, 512), torch.zeros(256, 512), torch.zeros(3, 256, 512)]
    rows = [torch.arange(0, 256, 32)] * 2 + [torch.arange(0, 256, 32).repeat(3, 1)]
    cols = [torch.arange(0, 512, 64), None, torch.arange(0, 512, 64).repeat(3, 1)]
    values = [torch.randn(8, 8), torch.randn(8, 512), torch.randn(3, 8, 8)]
    write_back(weights, rows, cols, values)  # compiles
    assert allocated_peak(lambda: write_back(weights, rows, cols, values)) < weights[0].nbytes


@pytest.mark.slow
def test_a_step_runs_them_compiled(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks around a step are kept from Dynamo, what they call to be compiled is not."""
    plain: list[str] = []
    for name in ("_update", "_write_back"):
        original = getattr(kernels, name)

        def counted(*args: Any, original: Any = original, name: str = name) -> None:
            if not torch.compiler.is_compiling():
                plain.append(name)
            original(*args)

        monkeypatch.setattr(kernels, name, counted)
    models = [losia_fx.transform(Toy(layers=1), compiler=compiler, period=2) for compiler in ("inductor", "eager")]
    models[1].load_state_dict(models[0].state_dict())
    ids = [batch() for _ in range(4)]
    for model, uncompiled in zip(models, (False, True), strict=True):
        plain.clear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for each in ids:
            loss_of(model, each).backward()
            optimizer.step()
            optimizer.zero_grad()
        # without a compiler each S is written by itself (SubnetState.write_back)
        assert sorted(set(plain)) == (["_update"] if uncompiled else [])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
