"""An eager LoSiA with the rules beside the paper's, written from their description: plain autograd, loops, no hooks.

It shares nothing with losia_fx. Where a rule draws, the draw is given, or the uniform numbers that it is made of;
everything else it works out by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.support.rms import Moments

Place = tuple[Tensor, Tensor]


@dataclass
class Options:
    """lr and betas are Adam's, without weight decay."""

    period: int
    schedule: str = "async"
    importance: str = "random"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    beta1: float = 0.85
    rewarm_steps: int | None = None
    head: str | None = None
    """The name of the head, which has a rule of its own: the most frequent labels of the first period, or"""
    head_slot: tuple[int, int] | None = None
    """after so many steps, by the gradient's importance of so many of them, the last."""
    carry: bool = False


@dataclass
class Subnet:
    """Of one weight: where it is, Adam's state of it, and what is known of W."""

    rows: Tensor
    cols: Tensor
    shape: tuple[int, int]
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0
    steps: int = 0
    updates: int | None = None
    """Since the last re-selection."""
    row_ema: Tensor | None = None
    col_ema: Tensor | None = None
    row_stays: dict[int, int] = field(default_factory=dict)
    col_stays: dict[int, int] = field(default_factory=dict)
    moments: Moments = field(default_factory=lambda: Moments(0.99))

    def place(self) -> Place:
        return self.rows[:, None], self.cols

    def arrive(self) -> None:
        for stays, indices in ((self.row_stays, self.rows), (self.col_stays, self.cols)):
            for index in indices.tolist():
                stays[index] = stays.get(index, 0) + 1


class Rules:
    """places: first rows and cols by weight name. groups: names, the head's first. draw: the place of a weight that is
    drawn, asked when it re-selects. uniform: so many numbers in (0, 1), for importance "sample"."""

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, Place],
        groups: Sequence[Sequence[str]],
        options: Options,
        draw: Callable[[str], Place],
        uniform: Callable[[int], Tensor],
    ) -> None:
        self.model, self.groups, self.options = model.requires_grad_(True), groups, options
        self.draw, self.uniform = draw, uniform
        self.subnets = {n: Subnet(*place, tuple(model.get_parameter(n).shape)) for n, place in places.items()}  # type: ignore[arg-type]
        for subnet in self.subnets.values():
            subnet.arrive()
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.head_importance: Tensor | float = 0.0
        self.steps = 0

    def count(self, labels: Tensor) -> None:
        """The labels of a micro-batch."""
        if self.steps < self.options.period:
            for label in labels.flatten().tolist():
                if label != -100:
                    self.counts = torch.cat((self.counts, torch.tensor([label])))

    @torch.no_grad()
    def step(self) -> None:
        profiled = self.slot()
        for name, subnet in self.subnets.items():
            weight = self.model.get_parameter(name)
            assert weight.grad is not None
            if any(name in self.groups[group] for group in profiled):
                self.profile(subnet, weight.grad)
            if name == self.options.head and self.options.head_slot is not None:
                self.profile_head(*self.options.head_slot, weight.grad)
            self.update(weight, subnet, weight.grad[subnet.place()])
        self.steps += 1
        if self.options.head is not None and self.options.head_slot is not None:
            self.move_head(self.options.head, self.options.head_slot[0])
        if self.steps % self.options.period == 0:
            for group in profiled:
                for name in self.groups[group]:
                    self.reselect(name)
        counts = self.options.head is not None and self.options.head_slot is None
        if counts and self.steps == self.options.period:
            self.move(self.options.head, self.frequent(), self.subnets[self.options.head].cols)
        self.model.zero_grad()

    def slot(self) -> list[int]:
        count = len(self.groups)
        found = [self.steps // self.options.period % count] if self.options.schedule == "async" else list(range(count))
        return [group for group in found if self.options.head not in self.groups[group]]

    def profile(self, subnet: Subnet, grad: Tensor) -> None:
        """Running means of the row and column sums of G^2."""
        beta, squares = self.options.beta1, grad.float() ** 2
        rows, cols = squares.sum(1), squares.sum(0)
        subnet.row_ema = (1 - beta) * rows + (0 if subnet.row_ema is None else beta * subnet.row_ema)
        subnet.col_ema = (1 - beta) * cols + (0 if subnet.col_ema is None else beta * subnet.col_ema)

    def profile_head(self, period: int, measured: int, grad: Tensor) -> None:
        """The running mean of G^2, of a slot's last steps."""
        if self.steps % period >= period - measured:
            beta = self.options.beta1
            self.head_importance = beta * self.head_importance + (1 - beta) * grad.float() ** 2

    def move_head(self, name: str, period: int) -> None:
        if self.steps % period == 0:
            assert isinstance(self.head_importance, Tensor)
            subnet, sums = self.subnets[name], self.head_importance.sum(1)
            self.move(name, best(sums, {}, len(subnet.rows)), subnet.cols)
            self.head_importance = 0.0

    def update(self, weight: Tensor, subnet: Subnet, grad: Tensor) -> None:
        beta1, beta2 = self.options.betas
        subnet.moments.feed(subnet.rows, subnet.cols, grad)
        subnet.steps += 1
        subnet.first = beta1 * subnet.first + (1 - beta1) * grad
        subnet.second = beta2 * subnet.second + (1 - beta2) * grad**2
        direction = subnet.first / (1 - beta1**subnet.steps)
        root = (subnet.second / (1 - beta2**subnet.steps)).sqrt() + self.options.eps
        share = 1.0
        if subnet.updates is not None:
            subnet.updates += 1
            if self.options.rewarm_steps is not None:
                share = min(1.0, subnet.updates / self.options.rewarm_steps)
        weight[subnet.place()] -= share * self.options.lr * direction / root

    def reselect(self, name: str) -> None:
        subnet = self.subnets[name]
        if self.options.importance == "random":
            self.move(name, *self.draw(name))
            return
        assert subnet.row_ema is not None
        assert subnet.col_ema is not None
        if self.options.importance == "visits":
            rows = best(subnet.row_ema, subnet.row_stays, len(subnet.rows))
            cols = best(subnet.col_ema, subnet.col_stays, len(subnet.cols))
        else:
            rows, cols = (
                first_to_arrive(sums, self.uniform(len(sums)), len(present))
                for sums, present in ((subnet.row_ema, subnet.rows), (subnet.col_ema, subnet.cols))
            )
        self.move(name, rows, cols)

    def move(self, name: str, rows: Tensor, cols: Tensor) -> None:
        subnet = self.subnets[name]
        subnet.rows, subnet.cols = rows.clone(), cols.clone()
        subnet.arrive()
        subnet.first, subnet.updates, subnet.row_ema, subnet.col_ema = 0.0, 0, None, None
        if self.options.carry:
            v = self.known(subnet)
            subnet.second = v * (1 - self.options.betas[1] ** subnet.steps)
        else:
            subnet.second, subnet.steps = 0.0, 0

    def known(self, subnet: Subnet) -> Tensor:
        """v of the place; an index without a visit is as the mean of the others."""
        (matrix,) = subnet.moments.matrices
        r, c = (
            [known[i].corrected if i in known else mean(known) for i in indices.tolist()]
            for known, indices in ((matrix.rows, subnet.rows), (matrix.cols, subnet.cols))
        )
        scale = (sum(r) / len(r) * sum(c) / len(c)) ** 0.5
        return torch.tensor([[a * b / scale for b in c] for a in r], dtype=torch.float64)

    def frequent(self) -> Tensor:
        assert self.options.head is not None
        subnet = self.subnets[self.options.head]
        found = [int((self.counts == row).sum()) for row in range(subnet.shape[0])]
        order = sorted(range(len(found)), key=lambda row: (-found[row], row))
        return torch.tensor(sorted(order[: len(subnet.rows)]))


def best(sums: Tensor, stays: Mapping[int, int], count: int) -> Tensor:
    """The indices with the largest sum over 1 + stays; of equals the lowest."""
    scores = [float(value) / (1 + stays.get(index, 0)) for index, value in enumerate(sums)]
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return torch.tensor(sorted(order[:count]))


def first_to_arrive(sums: Tensor, uniform: Tensor, count: int) -> Tensor:
    """A draw in proportion to ``sums``, without replacement: of Poisson processes with these rates, the ``count`` whose
    first event comes soonest. A time is exponential, made of its uniform number; one of rate 0 never comes."""
    rates = zip(uniform.tolist(), sums.tolist(), strict=True)
    times = [-math.log(u) / rate if rate else math.inf for u, rate in rates]
    return torch.tensor(sorted(sorted(range(len(times)), key=lambda index: times[index])[:count]))


def mean(known: Mapping[int, object]) -> float:
    values = [each.corrected for each in known.values()]  # type: ignore[attr-defined]
    return sum(values) / len(values)
