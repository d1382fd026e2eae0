"""How the optimizer's gradient follows from the accumulated one, through whatever a loop does to gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losia_fx.method import fit
from losia_fx.method.fit import (
    ENOUGH,
    LARGEST,
    Fit,
    clip_limit,
    fit_from,
    fits_from,
    lower_median,
    measure_clip,
    measure_fit,
)

Array = np.ndarray[Any, np.dtype[Any]]


def gradient(size: tuple[int, ...] = (6, 8)) -> Tensor:
    return torch.randn(size)


def applied(fit: Fit, grad: Tensor) -> Tensor:
    """The gradient of the whole weight as the optimizer sees it."""
    seen = grad * fit.factor
    return seen if fit.limit is None else seen.clamp(-fit.limit, fit.limit)


def fit_gradient(seen: Tensor, accumulated: Tensor, fallback: float | None = None) -> Fit | None:
    return fit_from(measure_fit(seen, accumulated, fallback).tolist(), fallback)


def fitted(*arguments: Any, **options: Any) -> Fit:
    fit = fit_gradient(*arguments, **options)
    assert fit is not None
    return fit


any_float = st.floats(width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1.0, -1.0])


@given(st.lists(any_float, min_size=1, max_size=30), st.integers(0, 10))
@settings(max_examples=500)
def test_lower_median_is_nanmedian(values: list[float], nans: int) -> None:
    tensor = torch.tensor([*values, *[math.nan] * nans], dtype=torch.float32)
    tensor = tensor[torch.randperm(len(tensor))]
    found = lower_median(tensor)
    assert found.shape == ()
    torch.testing.assert_close(found, tensor.nanmedian(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [2, 40_001, 100_000])
def test_lower_median_of_many(size: int) -> None:
    """Above a size, torch sorts integers in another way."""
    values = torch.randn(size) / torch.randn(size)
    values[torch.rand(size) < 0.1] = math.nan
    values[torch.rand(size) < 0.1] = -math.nan
    assert torch.equal(lower_median(values.view(1, -1)), values.nanmedian())


@given(st.floats(1e-6, 1e6), st.sampled_from([1, -1]))
def test_a_scaled_gradient(factor: float, sign: int) -> None:
    grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    fit = fitted(sign * factor * grad, grad)
    assert fit.limit is None
    assert fit.factor == pytest.approx(sign * factor, rel=1e-4)
    torch.testing.assert_close(applied(fit, grad), sign * factor * grad)


@given(st.floats(0.05, 0.8), st.floats(1.0, 10.0))
def test_a_gradient_clipped_by_value(share: float, size: float) -> None:
    """The limit is a share of the largest element; G outside of the subnet is clamped too."""
    grad, elsewhere = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2))
    limit = share * size * float(grad.abs().max())
    seen = (size * grad).clamp(-limit, limit)
    fit = fitted(seen, grad)
    assert fit.limit == pytest.approx(limit)
    assert fit.factor == pytest.approx(size, rel=1e-4)
    torch.testing.assert_close(applied(fit, grad), seen, rtol=1e-4, atol=1e-5 * limit)
    torch.testing.assert_close(
        applied(fit, elsewhere), (size * elsewhere).clamp(-limit, limit), rtol=1e-4, atol=1e-5 * limit
    )


def test_a_clip_that_cuts_few_elements_of_the_subnet_is_seen() -> None:
    grad = torch.randn(40, 40, generator=torch.Generator().manual_seed(2))
    limit = float(grad.abs().max()) * 0.95
    fit = fitted(grad.clamp(-limit, limit), grad)
    outside = torch.tensor([50.0])  # an element of W elsewhere, whose gradient the optimizer sees as `limit`
    assert float(applied(fit, outside)) == pytest.approx(limit)


def test_where_everything_is_clipped_nothing_fits() -> None:
    grad = gradient()
    assert fit_gradient(grad.sign() * 1e-3, grad) is None


def test_torch_clipping_is_followed() -> None:
    for clip in (
        lambda p: torch.nn.utils.clip_grad_norm_(p, 0.3),
        lambda p: torch.nn.utils.clip_grad_value_(p, 0.2),
    ):
        parameter, grad = torch.nn.Parameter(torch.zeros(6, 8)), gradient()
        parameter.grad = grad.clone()
        clip([parameter])
        torch.testing.assert_close(applied(fitted(parameter.grad, grad), grad), parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_within_tolerance(dtype: torch.dtype) -> None:
    grad = gradient((20, 20))
    fit = fitted((0.5 * grad).to(dtype), grad)
    assert fit.factor == pytest.approx(0.5, rel=1e-2)


def test_a_few_elements_that_are_off_do_not_move_the_factor() -> None:
    grad = gradient((20, 20))
    seen = 0.25 * grad
    seen[0, 0] += 1e-3
    assert fitted(seen, grad).factor == pytest.approx(0.25, rel=1e-5)


def test_exact_zeros_are_no_ratio() -> None:
    grad = gradient()
    grad[:5] = 0
    assert fitted(3 * grad, grad).factor == pytest.approx(3.0)


def test_a_zero_gradient_takes_its_neighbours_factor_or_none() -> None:
    zero = torch.zeros(6, 8)
    assert fit_gradient(zero, zero) is None
    assert fit_gradient(zero, zero, fallback=0.5) == Fit(0.5)
    assert fit_gradient(zero, gradient(), fallback=0.5) is None  # G is not zero: S.grad was changed by hand
    assert fit_gradient(gradient(), zero, fallback=0.5) is None
    assert fit_gradient(gradient(), zero) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_fits_nothing(bad: float, side: int) -> None:
    pair = [gradient(), gradient()]
    pair[1] = pair[0].clone()
    pair[side][2, 3] = bad
    assert fit_gradient(*pair) is None
    assert fit_gradient(*pair, fallback=1.0) is None


@pytest.mark.parametrize("noise", [0.05, 0.5, 5.0])
def test_noise_fits_nothing(noise: float) -> None:
    grad = gradient((20, 20))
    assert fit_gradient(grad + noise * torch.randn_like(grad), grad) is None


@pytest.mark.parametrize(("noise", "fits"), [(0.005, True), (0.02, False)])
def test_the_tolerance_is_one_hundredth(noise: float, fits: bool) -> None:
    grad = gradient((50, 50))
    error = torch.randn_like(grad)
    error *= noise * grad.norm() / error.norm()
    assert (fit_gradient(grad + error, grad) is not None) == fits


def test_the_fit_leaves_its_inputs_alone() -> None:
    grad = gradient()
    seen = (2 * grad).clamp(-1, 1)
    copies = grad.clone(), seen.clone()
    applied(fitted(seen, grad), grad)
    assert torch.equal(grad, copies[0])
    assert torch.equal(seen, copies[1])


# -- a clip by value that shows in any subnet of the optimizer -------------------------------------------------------

DRAWN: dict[str, Any] = {
    "normal": lambda size, g: torch.randn(size, generator=g),
    "long-tailed": lambda size, g: torch.randn(size, generator=g) / torch.randn(size, generator=g),
    "of one token": lambda size, g: torch.randn(size[0], 1, generator=g) * torch.randn(1, size[1], generator=g),
}


@st.composite
def gradients(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """S.grad of several subnets, of one dtype, then unscaled or clipped by norm; more than ENOUGH elements."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind, dtype = DRAWN[draw(st.sampled_from(sorted(DRAWN)))], draw(st.sampled_from(dtypes))
    sizes = [*draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=6)), (16, 16)]
    factor = draw(st.floats(1e-4, 1e4))
    return [kind(size, generator).to(dtype).float() * factor for size in sizes]


def common_limit(grads: list[Tensor], *fits: Fit | None) -> float | None:
    return clip_limit(measure_clip(grads).tolist(), fits)


def clipped(grads: list[Tensor], limit: float) -> list[Tensor]:
    return [grad.clamp(-limit, limit) for grad in grads]


@given(gradients((torch.float32, torch.bfloat16, torch.float16)))
@settings(max_examples=400, derandomize=True)
def test_no_clip_is_seen_where_there_is_none(grads: list[Tensor]) -> None:
    """bfloat16 has 128 values between a number and its double: elements are alike by chance, the largest too."""
    assert common_limit(grads) is None
    factor_only = Fit(2.0)
    assert common_limit(grads, factor_only, None) is None


def test_bfloat16_gradients_do_have_equals() -> None:
    """So the test above says something: in some of them the largest element comes twice."""
    twice = 0
    for seed in range(300):
        grad = torch.randn(20, 20, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
        largest, alike, others = measure_clip([grad]).tolist()
        assert largest == float(grad.abs().max())
        assert alike == float((grad.abs() == largest).sum())
        assert others > 1
        twice += alike > 1
    assert twice > 4


@given(gradients((torch.float32,)), st.integers(2, 60))
@settings(max_examples=200)
def test_two_elements_that_are_cut_anywhere_show_the_limit(grads: list[Tensor], cut: int) -> None:
    size = torch.cat([grad.flatten() for grad in grads]).abs().sort(descending=True).values
    limit = float((size[cut - 1] + size[cut]) / 2)
    seen = clipped(grads, limit)
    expected = float(torch.tensor(limit))
    alone = size[cut : cut + LARGEST].unique().numel() == size[cut : cut + LARGEST].numel()  # no others alike by chance
    if alone and float(size[cut - 1]) > expected > float(size[cut]):  # there is a number between them
        assert common_limit(seen) == expected


@pytest.mark.parametrize("at_once", [1, 9000, 2**24])
@pytest.mark.parametrize("steps", [None, 4.0])
def test_the_largest_are_those_of_all_however_they_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, at_once: int, steps: float | None
) -> None:
    """steps: few values, so that the last of the largest are some of many that are alike."""
    monkeypatch.setattr(fit, "AT_ONCE", at_once)
    monkeypatch.setattr(fit, "CHUNK", 8)
    grads = [torch.randn(size) for size in (5000, 3, 8 * LARGEST + 8, 4001)]
    grads = grads if steps is None else [(grad * steps).round() / steps for grad in grads]
    expected = torch.cat(grads).abs().sort(descending=True).values[:LARGEST]
    assert torch.equal(fit._largest(fit._largest_of(grads)), expected)


def test_one_element_of_each_of_two_subnets() -> None:
    grads = [torch.linspace(-1, 0.999, 110), torch.linspace(-0.5, 0.501, 90), torch.zeros(1000)]
    grads[0][7], grads[1][9] = 3.0, -4.0
    assert common_limit(clipped(grads, 2.5)) == 2.5
    assert common_limit(clipped(grads[:1], 2.5)) is None  # one element says nothing
    assert common_limit(clipped(grads, 3.5)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [100, 200, 3000])
def test_of_coarse_gradients_enough_must_be_cut(dtype: torch.dtype, cut: int) -> None:
    """A hundred of a hundred thousand: by far more than have any other value of that size."""
    for seed in range(10):
        grad = torch.randn(400, 250, generator=torch.Generator().manual_seed(seed)).to(dtype).float() * 0.37
        limit = float(grad.abs().flatten().kthvalue(grad.numel() - cut).values) * 0.999
        assert common_limit(clipped([*grad.split(100)], limit)) == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize(
    ("alike", "others", "found"),
    [
        (1, 0, False),
        (2, 0, True),
        (2, 1, True),
        (4, 2, False),
        (5, 2, True),
        (9, 3, False),
        (40, 10, False),
        (41, 10, True),
    ],
)
def test_how_many_must_be_alike(alike: int, others: int, found: bool) -> None:
    assert clip_limit((0.5, alike, others), ()) == (0.5 if found else None)


def test_a_profiled_subnet_that_was_cut_shows_it_for_all() -> None:
    grads = [torch.linspace(-1, 0.9, 200), torch.linspace(-0.5, 0.501, 100)]
    seen = clipped(grads, 0.995)  # one element of all
    largest = float(torch.tensor(0.995))
    assert common_limit(seen) is None
    assert common_limit(seen, None, Fit(1.0, largest)) == largest
    assert common_limit(seen, Fit(1.0, 0.25)) is None  # what holds for all leaves nothing larger


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_no_clip(bad: float) -> None:
    grads = [torch.randn(20, 20), torch.randn(3)]
    grads[0][2, 2:5] = bad
    assert common_limit(grads) is None


def test_few_elements_and_none_show_no_clip() -> None:
    assert common_limit([torch.ones(ENOUGH - 1)]) is None
    assert common_limit([torch.ones(ENOUGH)]) == 1.0
    assert common_limit([torch.zeros(ENOUGH)]) is None
    assert common_limit([torch.cat([torch.ones(2), torch.zeros(1000)])]) is None
    assert common_limit([]) is None


def test_the_gradients_are_left_alone() -> None:
    grads = [torch.randn(20, 20), torch.randn(5, dtype=torch.float64), torch.randn(3, 3).t()]
    copies = [grad.clone() for grad in grads]
    measure_clip(grads)
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, copies, strict=True))
    alone = torch.randn(300)
    copy = alone.clone()
    measure_clip([alone])
    assert torch.equal(alone, copy)


def fits_of(pairs: list[tuple[Tensor, Tensor]], *others: Tensor) -> list[Fit | None]:
    clip = measure_clip([*(seen for seen, _ in pairs), *others])
    return fits_from([measure_fit(*pair).tolist() for pair in pairs], clip.tolist())


def test_a_clip_in_one_subnet_is_the_clip_of_another() -> None:
    """The block of S is untouched; the rest of its weight was cut as the optimizer would see it."""
    small, large = torch.randn(16, 16).clamp(-0.8, 0.8) * 0.1, torch.randn(40, 40)
    limit = 0.5
    (fit,) = fits_of([(0.25 * small, small)], (0.25 * large).clamp(-limit, limit))
    assert fit is not None
    assert fit.factor == pytest.approx(0.25)
    assert fit.limit == limit
    assert fits_of([(0.25 * small, small)], 0.25 * large) == [Fit(fit.factor)]


def test_a_subnet_that_a_known_clip_just_leaves_alone() -> None:
    """Nothing is left to take a factor from once its largest elements are left out; they fit as they are."""
    assert fits_of([(torch.full((1, 1), 0.5), torch.full((1, 1), 2.0))], torch.full((300,), 0.5)) == [Fit(0.25, 0.5)]


def test_a_gradient_of_zeros_takes_factor_and_limit_of_its_neighbours() -> None:
    zero, large = torch.zeros(6, 8), torch.randn(40, 40)
    seen = (0.25 * large).clamp(-0.5, 0.5)
    first, second, third = fits_of([(zero, zero), (seen, large), (zero, large[:6, :8])])
    assert second is not None
    assert second.limit == 0.5
    assert first == second
    assert third is None  # S.grad was changed by hand
    assert fits_of([(zero, zero)]) == [None]
    assert fits_of([]) == []


def test_a_known_clip_explains_what_rounding_hid() -> None:
    """In bfloat16 the misfit of rounding is not a tenth of what few cut elements cause: alone it would be left out."""
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(60, 60, generator=generator)
    limit = float(grad.abs().flatten().kthvalue(3600 - 8).values)
    seen = (grad + 0.005 * grad.abs() * torch.randn(60, 60, generator=generator)).clamp(-limit, limit)
    assert fit_gradient(seen, grad) is None
    (fit,) = fits_of([(seen, grad)], torch.full((300,), limit))
    assert fit is not None
    assert fit.limit == pytest.approx(limit)
    assert fit.factor == pytest.approx(1.0, rel=1e-2)
