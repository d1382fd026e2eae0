"""SubnetRMS and its second moment once more, from their description alone: loops over single rows, columns, numbers.

It shares nothing with losia_fx: no lists of tensors, no corrected means kept, no factors; a dict of Python floats an
index of W.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RunningMean:
    """An exponential mean from zero, corrected by how often it was fed."""

    beta: float
    mean: float = 0.0
    visits: int = 0

    def feed(self, value: float) -> None:
        self.mean = self.beta * self.mean + (1 - self.beta) * value
        self.visits += 1

    @property
    def corrected(self) -> float:
        return self.mean / (1 - self.beta**self.visits)


@dataclass
class Matrix:
    """Of one (out, in) weight: a mean for each row and column that was ever visited."""

    beta: float
    rows: dict[int, RunningMean] = field(default_factory=dict)
    cols: dict[int, RunningMean] = field(default_factory=dict)

    def feed(self, rows: Tensor, cols: Tensor, grad: Tensor) -> None:
        for at, row in enumerate(rows.tolist()):
            values = [float(g) ** 2 for g in grad[at]]
            self.rows.setdefault(row, RunningMean(self.beta)).feed(sum(values) / len(values))
        for at, col in enumerate(cols.tolist()):
            values = [float(g) ** 2 for g in grad[:, at]]
            self.cols.setdefault(col, RunningMean(self.beta)).feed(sum(values) / len(values))

    def moment(self, rows: Tensor, cols: Tensor) -> Tensor:
        """v (r, c), float64."""
        r = [self.rows[row].corrected for row in rows.tolist()]
        c = [self.cols[col].corrected for col in cols.tolist()]
        scale = math.sqrt(sum(r) / len(r) * sum(c) / len(c))
        return torch.tensor([[a * b / scale if scale else 0.0 for b in c] for a in r], dtype=torch.float64)


class Moments:
    """Of one weight, (out, in) or (E, out, in): a Matrix an expert."""

    def __init__(self, beta: float, experts: int = 1) -> None:
        self.matrices = [Matrix(beta) for _ in range(experts)]

    def feed(self, rows: Tensor, cols: Tensor, grad: Tensor) -> None:
        for matrix, *each in self._each(rows, cols, grad):
            matrix.feed(*each)

    def moment(self, rows: Tensor, cols: Tensor) -> Tensor:
        found = [matrix.moment(*each) for matrix, *each in self._each(rows, cols)]
        return found[0] if rows.dim() == 1 else torch.stack(found)

    def _each(self, *tensors: Tensor) -> Iterable[tuple[Matrix, Tensor, ...]]:  # type: ignore[type-arg]
        if tensors[0].dim() == 1:
            return [(self.matrices[0], *tensors)]
        return [(matrix, *parts) for matrix, *parts in zip(self.matrices, *tensors, strict=True)]


class Rule:
    """What SubnetRMS does with one parameter: of a subnet where places come with the step, in full where none do."""

    def __init__(
        self, lr: float, beta2: float, momentum: float, eps: float, weight_decay: float, experts: int = 1
    ) -> None:
        self.lr, self.beta2, self.momentum, self.eps, self.weight_decay = lr, beta2, momentum, eps, weight_decay
        self.moments = Moments(beta2, experts)
        self.full: Tensor | None = None
        self.steps = 0
        self.moved()

    def moved(self) -> None:
        self.first: Tensor | None = None
        self.first_steps = 0

    def step(self, value: Tensor, grad: Tensor, place: tuple[Tensor, Tensor] | None) -> Tensor:
        """The parameter after one update."""
        if place is None:
            old = torch.zeros_like(grad) if self.full is None else self.full
            self.full = self.beta2 * old + (1 - self.beta2) * grad**2
            self.steps += 1
            v = self.full / (1 - self.beta2**self.steps)
        else:
            self.moments.feed(*place, grad)
            v = self.moments.moment(*place).to(grad.dtype)
        direction = grad
        if self.momentum:
            first = torch.zeros_like(grad) if self.first is None else self.first
            self.first = self.momentum * first + (1 - self.momentum) * grad
            self.first_steps += 1
            direction = self.first / (1 - self.momentum**self.first_steps)
        return value - self.lr * self.weight_decay * value - self.lr * direction / (v.sqrt() + self.eps)
