"""A model through losia_fx and its copy through the eager reference, on the same batches, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import losia_fx
from tests.support.reference import MakeOptimizer, Reference
from tests.support.toys import Toy, batch, loss_of

PERIOD = 3
OPTIONS: dict[str, Any] = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": PERIOD}


class Rates(Reference):
    """The reference with a learning rate and a kind of optimizer of its own for each weight."""

    rates: Mapping[str, float]

    def update(self) -> None:
        for name, weight in self.weights.items():
            weight.update(self.rates[name], self.period if self.rewarm else None)


class Pair:
    """model: what losia_fx trains. Compare with ``assert_same`` at any time; ``step`` does it after each step.

    make: of the whole model's optimizer, and of each weight's in the reference. compiled: how the step is compiled.
    """

    def __init__(
        self,
        make: MakeOptimizer,
        model: nn.Module | None = None,
        tolerance: float = 1e-8,
        compiler: str = "eager",
        **options: Any,
    ) -> None:
        self.inner = Toy(layers=1).double() if model is None else model
        plain = copy.deepcopy(self.inner)
        self.tolerance = tolerance
        options = {**OPTIONS, **options}
        self.model = losia_fx.transform(self.inner, compiler=compiler, **options)
        self.subnets, self.controller = losia_fx.subnets(self.model), losia_fx.controller(self.model)
        self.optimizer: Optimizer = make(self.values())
        self.reference = Rates(
            plain,
            {name: (subnet.rows, subnet.cols) for name, subnet in self.subnets.items()},
            self.controller.groups,
            make,
            lambda steps: 0.0,
            period=options["period"],
        )
        self.rates: Callable[[str], float] = lambda name: float(self.optimizer.param_groups[0]["lr"])

    def values(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def losses(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mine, expected = loss_of(self.model, ids), loss_of(self.reference.model, ids)
        torch.testing.assert_close(mine, expected, rtol=self.tolerance, atol=0)
        return mine, expected

    def step(self, take: Callable[[], Any] | None = None, ids: Tensor | None = None) -> None:
        """One step of both on one batch. take: takes the step of losia_fx's side (optimizer.step by default)."""
        for loss in self.losses(batch() if ids is None else ids):
            loss.backward()
        self.finish(take)

    def finish(self, take: Callable[[], Any] | None = None, **clip: float) -> None:
        """The step on the gradients that are there."""
        self.reference.rates = {name: self.rates(name) for name in self.reference.weights}
        (take or self.optimizer.step)()
        self.model.zero_grad()
        self.reference.step(**clip)
        self.assert_same()

    def assert_same(self) -> None:
        step = self.reference.steps
        assert self.controller.step == step
        assert self.controller.left_out == 0
        for name, weight in self.reference.weights.items():
            assert torch.equal(self.subnets[name].rows, weight.rows), f"rows of {name} after step {step}"
            assert torch.equal(self.subnets[name].cols, weight.cols), f"cols of {name} after step {step}"
        state = self.inner.state_dict()
        for name, value in self.reference.model.state_dict().items():
            torch.testing.assert_close(
                state[name], value, rtol=self.tolerance, atol=self.tolerance, msg=lambda m, n=name: f"{n}, {step}: {m}"
            )
        assert [(event.step, event.group) for event in self.controller.history] == self.reference.reselections

    def rounds(self, count: int = 2, take: Callable[[], Any] | None = None) -> None:
        """That many rounds, in which subnets move and weights learn, or the comparison would say nothing."""
        start = {name: value.clone() for name, value in self.reference.model.state_dict().items()}
        for _ in self.steps(count):
            self.step(take)
        self.assert_moved(start)

    def steps(self, count: int = 2) -> Iterator[int]:
        yield from range(count * PERIOD * len(self.controller.groups) + 1)

    def assert_moved(self, start: Mapping[str, Tensor]) -> None:
        assert any(event.moved > 0 for event in self.controller.history)
        for name in self.subnets:
            assert not torch.equal(start[name], self.inner.state_dict()[name]), f"{name} has not learned"
