"""requires_grad: what is frozen, set free, or frozen before the transformation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import losia_fx
from tests.support.toys import Toy, batch, loss_of
from tests.support.twin import STILL, assert_one, close, subnets_of, twins, values_of, warned, zero

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")
MOVING: dict[str, Any] = {"schedule": "async", "importance": "random", "period": 2, "rewarm": False}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model, batch()).backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_frozen_copy_gives_what_asks_for_no_gradient(compiler: str) -> None:
    """A teacher: its outputs go into running means and into numpy, with no no_grad around it."""
    model = losia_fx.transform(Toy().double(), **{**STILL, "compiler": compiler})
    step(model, sgd(model))
    teacher = copy.deepcopy(model).requires_grad_(False)
    mean = torch.zeros(())
    for _ in range(2):
        found = teacher(batch())
        assert not found.requires_grad
        mean = 0.9 * mean + 0.1 * found.mean()
        (loss_of(model, batch()) + mean).backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss_of(teacher, batch()).backward()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_blocks_that_are_frozen_first_and_learn_later(compiler: str) -> None:
    """As gradual unfreezing does it: with the gradients of a model that learned all along."""
    model, twin = twins(Toy().double(), compiler=compiler)
    model.requires_grad_(False)
    for learning in (1, 0):
        for name, subnet in subnets_of(model).items():
            if f"layers.{learning}" in name:
                subnet.values.requires_grad_(True)
        ids = batch()
        zero(model, twin)
        loss_of(model, ids).backward()
        loss_of(twin, ids).backward()
        for name, subnet in subnets_of(model).items():
            assert (subnet.values.grad is not None) == subnet.values.requires_grad, name
            if subnet.values.grad is not None:
                close(subnet.values.grad, twin.values[name].grad, 1e-12, name)


@pytest.mark.parametrize("options", [STILL, MOVING], ids=["static", "moving"])
def test_a_block_that_is_frozen_on_purpose_is_not_named(options: dict[str, Any]) -> None:
    model = losia_fx.transform(Toy().double(), **{**STILL, **options, "period": 4})
    optimizer = sgd(model)
    step(model, optimizer)
    model.layers[1].requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    for _ in range(60):
        step(model, optimizer)
    now = model.state_dict()
    assert torch.equal(now["layers.1.mix.weight"], start["layers.1.mix.weight"])
    assert not torch.equal(now["layers.0.mix.weight"], start["layers.0.mix.weight"])


def test_weights_set_free_without_their_subnets_are_named_at_once() -> None:
    model = losia_fx.transform(Toy().double(), **STILL)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("mix.weight") or name.startswith("head.weight_")
    with warned() as said:
        for _ in range(2):
            loss_of(model, batch()).backward()
    assert len(said) == 1, said
    assert "2 weights require grad (layers.0.mix.weight, layers.1.mix.weight)" in said[0]
    assert "layers.0.mix.weight_subnet" in said[0]
    subnets_of(model)["layers.0.mix.weight"].values.requires_grad_(True)  # as it says
    model.zero_grad()
    loss_of(model, batch()).backward()
    assert subnets_of(model)["layers.0.mix.weight"].values.grad is not None


@pytest.mark.parametrize("way", ["transform", "string"])
def test_weights_frozen_without_their_subnets_are_named(way: str) -> None:
    if way == "transform":
        run: Any = losia_fx.transform(Toy().double(), **STILL).requires_grad_(True)
        model: Any = run
    else:
        model = Toy().double()
        run = torch.compile(model, backend="losia", options={**STILL, "period": 4})
    loss_of(run, batch()).backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.layers[0].mix.weight.requires_grad = False
    with warned() as said:
        for _ in range(60):
            step(run, optimizer)
    named = [text for text in said if "were frozen" in text]
    assert len(named) == 1, said
    assert "1 weights were frozen (layers.0.mix.weight:" in named[0]
    assert "layers.0.mix.weight_subnet" in named[0]


def test_weights_frozen_and_set_free_together_are_not_named() -> None:
    model = losia_fx.transform(Toy().double(), **STILL)
    for learns in (True, False, True):
        model.requires_grad_(learns)
        if learns:
            loss_of(model, batch()).backward()
        else:
            model(batch())


@pytest.mark.parametrize("frozen", ["one block", "all"])
def test_what_was_frozen_before_the_transformation_is_named(frozen: str) -> None:
    model = Toy().double()
    (model.layers[0] if frozen == "one block" else model).requires_grad_(False)
    with warned() as said:
        losia_fx.transform(model, **STILL)
    assert len(said) == (frozen == "one block"), said
    if said:
        assert "3 of the 7 weights that get subnets did not require grad (layers.0.mix.weight" in said[0]
        assert "exclude" in said[0]


@pytest.mark.parametrize("first", ["forward", "state_dict", "double", "part"])
def test_an_average_of_all_parameters_over_a_move(first: str) -> None:
    """As Lightning's StochasticWeightAveraging has it at the end: weights and subnets, by name. The weights count."""
    model = losia_fx.transform(Toy(layers=1).double(), **{**STILL, **MOVING})
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    seen = []
    for _ in range(5):
        step(model, optimizer)
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.stack([each[name] for each in seen]).mean(0))
    mean = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    uses = {
        "forward": lambda: model(batch()),
        "state_dict": model.state_dict,
        "double": model.double,
        "part": lambda: model.layers[0].mix(torch.ones(1, 16, dtype=torch.float64)),
    }
    with warned() as said, torch.set_grad_enabled(first != "part"):
        uses[first]()
    now = model.state_dict()
    for name, subnet in subnets_of(model).items():
        close(now[name], mean[name], 1e-15, name)
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols])
    assert len([text for text in said if "the weights count" in text]) == 1, said
    step(model, optimizer)


def test_a_decay_of_all_parameters_by_hand_is_no_average() -> None:
    """Weights and subnets alike, after every step."""
    model, twin = twins(Toy(layers=1).double(), **MOVING)
    mine, expected = torch.optim.SGD(values_of(model), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(6):
        zero(model, twin)
        ids = batch()
        loss_of(model, ids).backward()
        loss_of(twin, ids).backward()
        mine.step()
        expected.step()
        twin.follow(subnets_of(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
            for name, parameter in twin.plain.named_parameters():
                if name in twin.values:
                    twin.write(name, 0.9 * twin.weight(name))
                else:
                    parameter.mul_(0.9)
    assert_one(model, twin)


def test_a_pair_of_many_that_was_written_both_is_refused_as_before() -> None:
    model = losia_fx.transform(Toy(layers=1).double(), **{**STILL, **MOVING})
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    for _ in range(5):
        step(model, optimizer)
    subnet = subnets_of(model)["layers.0.mix.weight"]
    with torch.no_grad():
        subnet.values.add_(1.0)
        subnet.weight.mul_(2.0)
    with pytest.raises(losia_fx.StateError, match=r"layers\.0\.mix\.weight: both"):
        model(batch())
