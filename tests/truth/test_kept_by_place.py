"""Numbers that are kept of a subnet by its parameter, and written back after it has moved: one warning says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import losia_fx
from tests.support.toys import Toy, batch
from tests.support.twin import loss_of, subnets_of, values_of, warned

PERIOD = 3
OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "period": PERIOD, "importance": "random"}


class Loop:
    """A loop of a user's own, around a transformed model; ``step`` has the gradients of one batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.values = model, values_of(model)

    def step(self) -> None:
        raise NotImplementedError


class Masters(Loop):
    """Wider copies, which are what is stepped, and copied back each time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.masters = [value.detach().double().clone() for value in self.values]
        self.optimizer = optim.SGD(self.masters, lr=0.01)

    @torch.no_grad()
    def step(self) -> None:
        for master, value in zip(self.masters, self.values, strict=True):
            master.grad = None if value.grad is None else value.grad.double()
        self.optimizer.step()
        for master, value in zip(self.masters, self.values, strict=True):
            self.write(value, master)
        losia_fx.stepped(self.model)

    def write(self, value: nn.Parameter, master: Tensor) -> None:
        value.copy_(master)


class MastersByData(Masters):
    """No version grows."""

    def write(self, value: nn.Parameter, master: Tensor) -> None:
        value.data.copy_(master)


class MastersMadeAnew(Masters):
    """As the warning has it: where a subnet moves, from the parameters."""

    def step(self) -> None:
        moves = len(losia_fx.controller(self.model).history)
        super().step()
        if len(losia_fx.controller(self.model).history) > moves:
            for master, value in zip(self.masters, self.values, strict=True):
                master.copy_(value.detach())


class SlowWeights(Loop):
    """Lookahead by hand, around a followed optimizer: every second step S goes half of the way back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.slow = [value.detach().clone() for value in self.values]
        self.optimizer = optim.AdamW(self.values, lr=1e-3)
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, value in zip(self.slow, self.values, strict=True):
                value.copy_(slow.lerp_(value, 0.5))


class Anchored(Loop):
    """A pull to where training began, kept by parameter: 0.7 of the way, at the end of an epoch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.anchors = {value: value.detach().clone() for value in self.values}
        self.optimizer = optim.SGD(self.values, lr=0.01)
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % (PERIOD + 1) == 0:
            for value, anchor in self.anchors.items():
                value.lerp_(anchor, 0.7)


class Outer(Loop):
    """DiLoCo's outer step on the way of some inner ones, with Nesterov's momentum: it goes beyond where S stands now,
    away from where it was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.start = [value.detach().clone() for value in self.values]
        self.optimizer = optim.AdamW(self.values, lr=1e-3)
        self.outer = optim.SGD(self.values, lr=0.7, momentum=0.9, nesterov=True)
        self.steps = 0

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 5 == 0:
            for value, start in zip(self.values, self.start, strict=True):
                value.grad = start - value.detach()
                value.data = start.clone()
            self.outer.step()
            self.start = [value.detach().clone() for value in self.values]


class SlowWeightsByHand(SlowWeights):
    """Nothing of torch's: the first writes to S after a move are plain steps."""

    @torch.no_grad()
    def step(self) -> None:
        for value in self.values:
            value -= 0.01 * value.grad
        losia_fx.stepped(self.model)
        self.steps += 1
        if self.steps % 5 == 0:
            for slow, value in zip(self.slow, self.values, strict=True):
                value.copy_(slow.lerp_(value, 0.5))


class PulledSoftly(Anchored):
    """L2-SP: a little of the way, after every step."""

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        for value, anchor in self.anchors.items():
            value.lerp_(anchor, 0.05)


class KeepsByParameter(Optimizer):
    """A wrapper that is an Optimizer, with slow weights in a table of its own, which are made anew where S moves."""

    def __init__(self, inner: Optimizer, every: int) -> None:
        self.inner, self.every, self.steps = inner, every, 0
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.slow = {id(p): p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.steps += 1
        if self.steps % self.every == 0:
            for parameter in (p for group in self.param_groups for p in group["params"]):
                parameter.copy_(self.slow[id(parameter)].lerp_(parameter, 0.5))


class Wrapped(Loop):
    def __init__(self, model: nn.Module, every: int = 5) -> None:
        super().__init__(model)
        self.optimizer = KeepsByParameter(optim.SGD(self.values, lr=0.01), every)

    def step(self) -> None:
        self.optimizer.step()


class Plain(Loop):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.optimizer = optim.AdamW(self.values, lr=1e-2)

    def step(self) -> None:
        self.optimizer.step()


def run(kind: Callable[[nn.Module], Loop], steps: int, **options: Any) -> tuple[Loop, list[str]]:
    torch.manual_seed(0)
    loop = kind(losia_fx.transform(Toy(layers=1), **{**OPTIONS, **options}))
    with warned() as said:
        for _ in range(steps):
            loop.model.zero_grad()
            loss_of(loop.model, batch()).backward()
            loop.step()
        loop.model(batch())
    return loop, said


@pytest.mark.parametrize("dtype", ["as they are", "bfloat16"])
@pytest.mark.parametrize("schedule", ["async", "sync", "all"])
@pytest.mark.parametrize(
    "kind", [Masters, MastersByData, SlowWeights, SlowWeightsByHand, Anchored, PulledSoftly, Outer]
)
def test_numbers_of_the_place_before(kind: type[Loop], schedule: str, dtype: str) -> None:
    def made(model: nn.Module) -> Loop:
        return kind(model.bfloat16() if dtype == "bfloat16" else model)

    _, said = run(made, 8 * PERIOD, schedule=schedule)
    assert len(said) == 1, said
    assert "written with numbers of the places in their weights that they have left" in said[0]
    assert ".weight" in said[0], "names the weights"


@pytest.mark.parametrize("kind", [MastersMadeAnew, Plain, Wrapped])
def test_what_is_made_anew_is_not_said(kind: type[Loop]) -> None:
    _, said = run(kind, 8 * PERIOD)
    assert not said


@pytest.mark.parametrize("kind", [Masters, SlowWeights, Wrapped])
def test_where_no_subnet_moves_nothing_is_said(kind: type[Loop]) -> None:
    _, said = run(kind, 4 * PERIOD, schedule="static")
    assert not said


def blurred(values: Tensor) -> Tensor:
    return values + 0.1 * torch.randn_like(values)


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "half of it": lambda values: 0.5 * values,
    "its negative": lambda values: -values,
    "random numbers": torch.randn_like,
    "noise added": blurred,
}


@pytest.mark.parametrize("write", WRITES)
def test_other_writes_after_a_move_are_not_said(write: str) -> None:
    loop, said = run(Plain, PERIOD)
    assert losia_fx.controller(loop.model).history
    assert not said
    with warned() as said:
        for value in loop.values:
            value.data.copy_(WRITES[write](value.detach()))
        for _ in range(2):
            loop.model.zero_grad()
            loss_of(loop.model, batch()).backward()
            loop.step()
    assert not said


def test_a_state_that_was_put_back_is_no_number_kept_by_place() -> None:
    """S is again where it was, and so are the masters."""
    torch.manual_seed(0)
    model = losia_fx.transform(Toy(layers=1), **OPTIONS)
    loop = Masters(model)
    kept = losia_fx.state_dict(model), {name: value.clone() for name, value in model.state_dict().items()}

    def step() -> None:
        model.zero_grad()
        loss_of(model, batch()).backward()
        loop.step()

    for _ in range(PERIOD):
        step()
    model.load_state_dict(kept[1])
    losia_fx.load_state_dict(model, kept[0])
    with warned() as said:
        step()
    assert not said
    assert losia_fx.controller(model).step == 1
    for subnet in subnets_of(model).values():
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols])


class Decayed(Plain):
    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        for value in self.values:
            value.mul_(0.9)


@pytest.mark.parametrize("kind", [Plain, Decayed])
@pytest.mark.parametrize("width", [8, 16])
def test_subnets_of_a_few_elements_tell_nothing(width: int, kind: type[Loop]) -> None:
    """S is 1 x 1, or 2 x 2: whatever becomes of it may look like the way back."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3)]
    model = losia_fx.transform(nn.Sequential(*blocks), compiler="eager", period=2, importance="random")
    loop = kind(model)
    with warned() as said:
        for _ in range(60):
            model.zero_grad()
            model(torch.randn(4, width)).square().mean().backward()
            loop.step()
    assert len(losia_fx.controller(model).history) > 20
    assert not said


def test_a_copy_of_a_few_layers_is_said_among_many() -> None:
    """Where all subnets move at once, those that are watched come from all over the model."""

    class OfTheLast(SlowWeights):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            last = [
                subnet.values
                for name, subnet in subnets_of(model).items()
                if name.startswith(("layers.12", "layers.13"))
            ]
            self.slow = [value.detach().clone() for value in last]
            self.values = last

    torch.manual_seed(0)
    model = losia_fx.transform(Toy(layers=14), **{**OPTIONS, "schedule": "all", "rank_factor": 0.5})
    loop = OfTheLast(model)
    with warned() as said:
        for _ in range(4 * PERIOD):
            model.zero_grad()
            loss_of(model, batch()).backward()
            loop.step()
    assert len(said) == 1, said
    assert "places in their weights that they have left" in said[0]
    assert "layers.12" in said[0] or "layers.13" in said[0]
