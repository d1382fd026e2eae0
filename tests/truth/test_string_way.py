"""backend="losia": clipping gradients by norm over lists of parameters, from before its subnets were there or after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import losia_fx
from tests.support.toys import Toy, batch, by_string, loss_of
from tests.support.twin import Twin, subnets_of, warned

WAYS = ["transform", "string"]
OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "output_rank_factor": 0.25}


def made(way: str, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Callable[..., Any]]:
    """The model, and what is called to train it."""
    model = Toy().double() if model is None else model
    if way == "transform":
        return model, losia_fx.transform(model, **{**OPTIONS, **options})
    return model, by_string(model, **{**OPTIONS, **options})


def sgd(parameters: Any, rate: float = 0.1) -> optim.Optimizer:
    return optim.SGD(list(parameters), lr=rate)


def linears() -> nn.Module:
    """Blocks whose linears alone learn, in order that a twin has them all."""
    model = Toy().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() == 2 and "embed" not in name)
    return model


def clipped(asked: Callable[[nn.Module], list[nn.Parameter]]) -> tuple[nn.Module, nn.Module, list[str]]:
    """A model trained by string with its gradients clipped, its twin's, and what was said."""
    model = linears()
    plain = copy.deepcopy(model)
    _, call = made("string", model, schedule="static")
    optimizer = sgd(asked(model))
    ids = [batch() for _ in range(3)]
    with warned() as said:
        for number, each in enumerate(ids):
            loss_of(call, each).backward()
            if number == 0:
                twin = Twin(plain, subnets_of(model))
                expected = sgd(twin.parameters())
            loss_of(twin, each).backward()
            nn.utils.clip_grad_norm_(asked(model), 0.01)
            nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
            for each_optimizer in (optimizer, expected):
                each_optimizer.step()
                each_optimizer.zero_grad()
    return model, twin.solid(), said


def test_a_list_that_is_asked_for_at_each_step_clips() -> None:
    model, plain, said = clipped(lambda model: [p for p in model.parameters() if p.requires_grad])
    assert not said
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_from_before_the_first_forward_is_named_once(kind: Any) -> None:
    """Its weights have no gradients any more, their subnets do: nothing would be clipped."""
    held: list[Any] = []

    def asked(model: nn.Module) -> Any:
        if not held:
            held.append(kind(p for p in model.parameters() if p.requires_grad))
        return held[0]

    model, _, said = clipped(asked)
    assert len(said) == 1
    for text in ("7 weights", "layers.0.mix.weight", "clipping", "model.parameters() after the first forward"):
        assert text in said[0]
    assert losia_fx.controller(model).step == 3


def test_lists_of_other_parameters_are_not_named() -> None:
    model, other = linears(), list(Toy().parameters())
    _, call = made("string", model)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = sgd(model.parameters())
    with warned() as said:
        loss_of(call, batch()).backward()
        optimizer.step()
    assert not said
    assert other
    assert norms
