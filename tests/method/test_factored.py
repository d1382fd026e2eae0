"""The second moment by rows and columns, against one kept in loops over single indices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losia_fx.method.factored import Means, Place, factors, root, second_moment, seen_in, take_in
from tests.support.rms import Moments


def drawn(count: int, size: int, experts: int | None) -> Tensor:
    several = [torch.randperm(size)[:count].sort().values for _ in range(experts or 1)]
    return several[0] if experts is None else torch.stack(several)


@pytest.mark.parametrize("beta2", [0.99, 0.5, 0.0])
@pytest.mark.parametrize("experts", [None, 3])
def test_it_is_that_of_single_indices_whatever_the_visits(beta2: float, experts: int | None) -> None:
    torch.manual_seed(0)
    lead = () if experts is None else (experts,)
    shapes = [(*lead, 12, 9), (*lead, 5, 20)]
    kept = [Means.of(shape, torch.zeros((), dtype=torch.float64)) for shape in shapes]
    expected = [Moments(beta2, experts or 1) for _ in shapes]
    for _ in range(12):
        places = [Place(drawn(3, shape[-2], experts), drawn(4, shape[-1], experts)) for shape in shapes]
        grads = [torch.randn(*lead, 3, 4, dtype=torch.float64) * 10.0 ** torch.randint(-3, 3, ()) for _ in shapes]
        take_in(kept, places, seen_in(grads), beta2)
        for means, place, grad, reference in zip(kept, places, grads, expected, strict=True):
            reference.feed(*place, grad)
            v = reference.moment(*place)
            torch.testing.assert_close(second_moment(means, place), v)
            torch.testing.assert_close(root(means, place), v.sqrt())


def test_a_row_keeps_what_is_known_of_it_while_the_subnet_is_elsewhere() -> None:
    kept = Means.of((6, 4), torch.zeros(()))
    here, there = Place(torch.tensor([0, 1]), torch.tensor([0, 1])), Place(torch.tensor([2, 3]), torch.tensor([2, 3]))
    take_in([kept], [here], seen_in([torch.full((2, 2), 2.0)]), 0.9)
    before = [tensor.clone() for tensor in kept]
    take_in([kept], [there], seen_in([torch.full((2, 2), 7.0)]), 0.9)
    for now, then, size in zip(kept, before, (2, 2, 2, 2), strict=True):
        assert torch.equal(now[:size], then[:size])
    assert kept.row_visits.tolist() == [1, 1, 1, 1, 0, 0]
    torch.testing.assert_close(kept.rows, torch.tensor([4.0, 4.0, 49.0, 49.0, 0.0, 0.0]))


def test_a_gradient_of_zero_throughout_has_a_moment_of_zero() -> None:
    kept, place = Means.of((4, 4), torch.zeros(())), Place(torch.tensor([0, 2]), torch.tensor([1, 3]))
    take_in([kept], [place], seen_in([torch.zeros(2, 2)]), 0.99)
    assert second_moment(kept, place).tolist() == [[0, 0], [0, 0]]
    assert root(kept, place).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("scale", [1e-16, 1e16])
def test_gradients_far_from_one_neither_vanish_nor_overflow(scale: float) -> None:
    torch.manual_seed(0)
    kept, place = Means.of((4, 4), torch.zeros(())), Place(torch.tensor([0, 2]), torch.tensor([1, 3]))
    grad = torch.randn(2, 2) * scale
    take_in([kept], [place], seen_in([grad]), 0.99)
    reference = Moments(0.99)
    reference.feed(*place, grad.double())
    torch.testing.assert_close(root(kept, place).double() / scale, reference.moment(*place).sqrt() / scale)
    assert all(torch.isfinite(each).all() and (each > 0).all() for each in factors(kept, place))
