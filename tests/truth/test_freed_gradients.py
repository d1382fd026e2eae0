"""Updates that free a gradient as soon as they have used it: released within the backward, by a closure, by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import losia_fx
from tests.support.pair import Pair
from tests.support.toys import Toy, batch, loss_of
from tests.support.twin import STILL, assert_one, subnets_of, twins, values_of, warned, zero

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")
MOVING: dict[str, Any] = {"schedule": "async", "importance": "random", "period": 3, "rewarm": False}


class Released(Optimizer):
    """One optimizer that hooks ask to step a parameter each (torch-optimi's gradient release); it knows the group of
    each from its state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["group"] = group

    @torch.no_grad()
    def step(self, closure: Any = None, param: Tensor | None = None) -> None:
        for each in self.param_groups[0]["params"] if param is None else [param]:
            if each.grad is None:
                continue
            kept = self.state[each]
            mean = kept.setdefault("mean", torch.zeros_like(each))
            each.sub_(mean.mul_(0.9).add_(each.grad), alpha=kept["group"]["lr"])
            if param is not None:
                each.grad = None


@pytest.mark.parametrize("also", [True, False], ids=["step() after it", "alone"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_optimizer_that_steps_parameters_as_their_gradients_come(compiler: str, also: bool) -> None:
    """Trajectory, importance and re-selections of the reference; the step() that the loop calls then is none."""
    pair = Pair(Released, compiler=compiler)
    for value in pair.values():
        value.register_post_accumulate_grad_hook(lambda value: pair.optimizer.step(param=value))
    pair.rounds(take=pair.optimizer.step if also else lambda: None)


def test_a_subnet_without_a_gradient_holds_no_step_up() -> None:
    model = losia_fx.transform(Toy(layers=2).double(), **{**STILL, **MOVING})
    optimizer = Released(values_of(model))
    for value in values_of(model):
        value.register_post_accumulate_grad_hook(lambda value: optimizer.step(param=value))
    whole = type(model.layers[1]).forward
    for number in range(12):
        model.layers[1].forward = (lambda x: x) if number % 2 else whole.__get__(model.layers[1])
        loss_of(model, batch()).backward()
    assert 10 <= losia_fx.controller(model).step <= 12
    assert losia_fx.controller(model).history


class FreesInStep(optim.SGD):
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        super().step()
        self.zero_grad()
        return loss


@pytest.mark.parametrize("importance", ["random", "mixed"])
def test_an_optimizer_that_makes_and_frees_the_gradient_within_its_step(importance: str) -> None:
    """All learns, which no warning denies; what cannot be scored is said, with what to do."""
    model = losia_fx.transform(Toy(layers=1).double(), **{**STILL, **MOVING, "importance": importance})
    optimizer = FreesInStep(values_of(model), lr=0.05)

    def closure() -> Tensor:
        loss = loss_of(model, batch())
        loss.backward()
        return loss

    with warned() as said:
        for _ in range(12):
            optimizer.step(closure)
    controller = losia_fx.controller(model)
    assert controller.step == 12
    if importance == "random":
        assert not said
        assert all(event.moved > 0 for event in controller.history)
    else:
        assert len(said) == 1, said
        assert "frees them within a step that is given a closure" in said[0]


@pytest.mark.parametrize("write", ["in place", ".data"])
def test_steps_by_hand_whose_gradients_are_gone(write: str) -> None:
    model, twin = twins(Toy(layers=1).double(), **MOVING)
    expected = optim.SGD(twin.parameters(), lr=0.1)

    @torch.no_grad()
    def update(value: nn.Parameter) -> None:
        assert value.grad is not None
        (value if write == "in place" else value.data).sub_(value.grad, alpha=0.1)
        value.grad = None

    for value in values_of(model):
        value.register_post_accumulate_grad_hook(update)
    for number in range(1, 10):
        zero(model, twin)
        ids = batch()
        loss_of(model, ids).backward()
        loss_of(twin, ids).backward()
        losia_fx.stepped(model)
        expected.step()
        twin.follow(subnets_of(model))
        assert losia_fx.controller(model).step == number
    assert_one(model, twin)
    assert losia_fx.controller(model).history
    with pytest.raises(losia_fx.LosiaError, match="none has moved since its last use"):
        losia_fx.stepped(model)


def test_an_optimizer_without_a_state_of_its_own() -> None:
    """torchao's CPUOffloadOptimizer does not call Optimizer's constructor, and steps by others within it."""

    class Within(Optimizer):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.inner = optim.AdamW(parameters, lr=5e-3)
            self.param_groups, self.defaults = self.inner.param_groups, {}
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    model = losia_fx.transform(Toy(layers=1).double(), **{**STILL, **MOVING})
    optimizer = Within(values_of(model))
    for _ in range(6):
        model.zero_grad()
        loss_of(model, batch()).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    assert losia_fx.controller(model).step == 6
    assert losia_fx.controller(model).history
