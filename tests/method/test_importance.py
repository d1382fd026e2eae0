"""Importance, its averages and the score against what losia.md says, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from losia_fx.method.importance import importance_of, score_of, smooth

Array = np.ndarray[Any, np.dtype[Any]]

FORMULAS = {
    "mixed": lambda w, g: np.abs(w * g - (w * g) ** 2 / 2),
    "first": lambda w, g: np.abs(w * g),
    "second": lambda w, g: (w * g) ** 2,
    "gradient": lambda w, g: g**2,
}
small = hnp.arrays(np.float64, (3, 4), elements=st.floats(-4, 4))


@pytest.mark.parametrize("kind", list(FORMULAS))
@given(small, small)
def test_importance(kind: str, weight: Array, grad: Array) -> None:
    ipt = importance_of(kind, torch.from_numpy(weight).float(), torch.from_numpy(grad).float())
    assert ipt.dtype == torch.float32
    np.testing.assert_allclose(ipt.numpy(), FORMULAS[kind](weight, grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(FORMULAS))
def test_importance_of_a_narrow_weight_is_wide(kind: str) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4).bfloat16())
    grad = torch.randn(3, 4)
    ipt = importance_of(kind, weight, grad)
    assert ipt.dtype == torch.float32
    assert not ipt.requires_grad
    wide = weight.detach().double().numpy()
    np.testing.assert_allclose(ipt.numpy(), FORMULAS[kind](wide, grad.double().numpy()), rtol=1e-5, atol=1e-7)


def test_mixed_is_no_sum_of_absolute_values() -> None:
    """At w g = 1: 1/2. With the absolute values inside it would be 3/2 for w g = -1 as well; it is |-1 - 1/2|."""
    one = torch.ones(1, 1)
    assert float(importance_of("mixed", one, one)) == 0.5
    assert float(importance_of("mixed", one, -one)) == 1.5
    assert float(importance_of("mixed", one, 2 * one)) == 0.0


@given(st.lists(small, min_size=1, max_size=5), st.floats(0, 0.99))
def test_smooth_is_an_average_that_starts_at_zero(values: list[Array], beta: float) -> None:
    ema = torch.zeros(3, 4)
    expected = np.zeros((3, 4))
    for value in values:
        smooth(ema, torch.from_numpy(value).float(), beta)
        expected = beta * expected + (1 - beta) * value
    np.testing.assert_allclose(ema.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_smooth_does_not_touch_what_is_new() -> None:
    new = torch.ones(2, 2)
    smooth(torch.zeros(2, 2), new, 0.85)
    assert torch.equal(new, torch.ones(2, 2))


def test_score() -> None:
    importance, uncertainty = torch.rand(3, 4), torch.rand(3, 4)
    for kind in ("mixed", "first", "second"):
        assert torch.equal(score_of(kind, importance, uncertainty), importance * uncertainty)
    assert torch.equal(score_of("gradient", importance, uncertainty), importance)
