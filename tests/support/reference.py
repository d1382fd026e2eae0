"""An eager LoSiA of its own, written from the method's description alone: slow, dense, plain autograd.

It shares nothing with losia_fx: full gradients for every weight, one optimizer object a subnet (made anew when its
moments are to start anew), no hooks, no graphs. Tests hold losia_fx against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def importance(kind: str, weight: Tensor, grad: Tensor) -> Tensor:
    """ipt of one optimizer step: |WG - (WG)^2/2| and its relatives. All (out, in), float32."""
    w, g = weight.detach().float(), grad.detach().float()
    wg = w * g
    table = {
        "mixed": lambda: (wg - wg**2 / 2).abs(),
        "first": lambda: wg.abs(),
        "second": lambda: wg**2,
        "gradient": lambda: g**2,
    }
    return table[kind]()


def top(sums: Tensor, count: int) -> Tensor:
    """Sorted indices of the ``count`` largest sums; among equals the lowest index."""
    return torch.sort(sums, descending=True, stable=True).indices[:count].sort().values


def greedy(score: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """The best of the three greedy candidates, the first of equals. Returns sorted rows and cols."""
    by_row, by_col = top(score.sum(1), rows), top(score.sum(0), cols)
    candidates = [
        (by_row, by_col),
        (by_row, top(score[by_row].sum(0), cols)),
        (top(score[:, by_col].sum(1), rows), by_col),
    ]
    best, largest = candidates[0], float("-inf")
    for candidate in candidates:
        captured = float(score[candidate[0]][:, candidate[1]].sum())
        if captured > largest:
            best, largest = candidate, captured
    return best


Index = tuple[Tensor, ...]


def block_index(rows: Tensor, cols: Tensor) -> Index:
    """What picks W[rows][:, cols] out of (out, in), or that of every expert, (E, r) and (E, c), out of (E, out, in)."""
    if rows.dim() == 1:
        return rows[:, None], cols
    experts = torch.arange(len(rows))
    return experts[:, None, None], rows[:, :, None], cols[:, None, :]


class Weight:
    """One weight with its subnet: W stays in the model, S is a parameter of its own.

    An expert weight (E, out, in) has a subnet an expert and is one weight in all else: moments, count, rewarm.
    """

    def __init__(self, weight: nn.Parameter, rows: Tensor, cols: Tensor, make: MakeOptimizer) -> None:
        self.weight, self.rows, self.cols, self.make = weight, rows.clone(), cols.clone(), make
        self.ema = torch.zeros_like(weight, dtype=torch.float32)
        self.uncertainty = torch.zeros_like(weight, dtype=torch.float32)
        self.updates: int | None = None  # since the last re-selection; None before the first
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """S = W[rows][:, cols], with an optimizer that remembers nothing."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.values = nn.Parameter(self.weight[block_index(self.rows, self.cols)].to(dtype))
        self.optimizer = self.make([self.values])

    def take_gradient(self) -> None:
        grad = self.weight.grad
        mine = block_index(self.rows, self.cols)
        self.values.grad = None if grad is None else grad[mine].to(self.values.dtype).clone()

    @torch.no_grad()
    def profile(self, kind: str, grad: Tensor, beta1: float, beta2: float) -> None:
        new = importance(kind, self.weight, grad)
        self.ema = beta1 * self.ema + (1 - beta1) * new
        self.uncertainty = beta2 * self.uncertainty + (1 - beta2) * (new - self.ema).abs()

    @torch.no_grad()
    def update(self, learning_rate: float, rewarm_over: int | None) -> None:
        """One optimizer step on S, rewarmed over that many updates after a re-selection, written back to W."""
        old = self.values.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.updates is not None:
            self.updates += 1
            if rewarm_over is not None and self.updates < rewarm_over:
                self.values.copy_(old + self.updates / rewarm_over * (self.values - old))
        self.weight[block_index(self.rows, self.cols)] = self.values.to(self.weight.dtype)

    @torch.no_grad()
    def reselect(self, kind: str) -> None:
        score = self.ema if kind == "gradient" else self.ema * self.uncertainty
        if score.dim() == 2:
            self.rows, self.cols = greedy(score, len(self.rows), len(self.cols))
        else:
            for expert, mine in enumerate(score):
                if mine.any():  # no token, no score: the expert keeps its subnet
                    chosen = greedy(mine, self.rows.shape[1], self.cols.shape[1])
                    self.rows[expert], self.cols[expert] = chosen
        self.ema.zero_()
        self.uncertainty.zero_()
        self.updates = 0
        self.gather()


class Reference:
    """LoSiA over a plain model. Backward any losses through ``model``, then ``step()``.

    model: taken over; named parameters outside ``subnets`` and ``full`` are frozen.
    subnets: weight name -> (rows, cols) to begin with. groups: names by group, in the order of the slots.
    make: makes the optimizer of a list of parameters. learning_rate: by the number of steps completed.
    """

    def __init__(
        self,
        model: nn.Module,
        subnets: Mapping[str, tuple[Tensor, Tensor]],
        groups: Sequence[Sequence[str]],
        make: MakeOptimizer,
        learning_rate: Callable[[int], float],
        *,
        full: Iterable[str] = (),
        period: int = 50,
        schedule: str = "async",
        importance: str = "mixed",
        beta1: float = 0.85,
        beta2: float = 0.85,
        rewarm: bool = True,
        profile_steps: int | None = None,
    ) -> None:
        self.model, self.groups, self.learning_rate = model, [list(group) for group in groups], learning_rate
        self.period, self.schedule, self.importance = period, schedule, importance
        self.beta1, self.beta2, self.rewarm = beta1, beta2, rewarm
        self.profile_steps = period if profile_steps is None else profile_steps
        self.steps = 0
        self.reselections: list[tuple[int, int]] = []  # (steps completed, group)
        parameters = dict(model.named_parameters())
        full = set(full)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in subnets or name in full)
        self.weights = {name: Weight(parameters[name], *subnets[name], make) for name in subnets}
        self.full = [parameters[name] for name in sorted(full)]
        self.full_optimizer = make(self.full) if self.full else None

    def slot_groups(self) -> list[int]:
        """The groups whose slot the step to come is in."""
        slot, count = self.steps // self.period, len(self.groups)
        if self.schedule == "async":
            return [slot % count]
        return list(range(count)) if self.schedule == "sync" and slot % count == 0 else []

    def profiled(self) -> list[int]:
        """The groups that are profiled during the step to come: in the last steps of a slot."""
        return self.slot_groups() if self.steps % self.period >= self.period - self.profile_steps else []

    def step(self, clip_norm: float | None = None, clip_value: float | None = None) -> None:
        """One optimizer step on the gradients that the backwards left on the model."""
        for weight in self.weights.values():
            weight.take_gradient()
        learning = [weight.values for weight in self.weights.values()] + self.full
        factor = 1.0
        if clip_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(learning, clip_norm))
            factor = min(1.0, clip_norm / (norm + 1e-6))
        if clip_value is not None:
            nn.utils.clip_grad_value_(learning, clip_value)
        slot_groups = self.slot_groups()
        for weight in self.members(self.profiled()):
            if weight.weight.grad is not None:
                grad = weight.weight.grad * factor
                grad = grad if clip_value is None else grad.clamp(-clip_value, clip_value)
                weight.profile(self.importance, grad, self.beta1, self.beta2)
        self.update()
        if (self.steps + 1) % self.period == 0:
            for weight in self.members(slot_groups):
                weight.reselect(self.importance)
            self.reselections += [(self.steps + 1, group) for group in slot_groups]
        self.steps += 1
        self.model.zero_grad()

    def update(self) -> None:
        learning_rate = self.learning_rate(self.steps)
        for weight in self.weights.values():
            weight.update(learning_rate, self.period if self.rewarm else None)
        if self.full_optimizer is not None:
            for group in self.full_optimizer.param_groups:
                group["lr"] = learning_rate
            self.full_optimizer.step()

    def members(self, groups: Iterable[int]) -> list[Weight]:
        return [self.weights[name] for group in groups for name in self.groups[group]]
