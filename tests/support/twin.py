"""The oracle of these tests: a plain model that is a function of its subnets, so that S and W cannot differ there."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

import losia_fx
from losia_fx import LosiaWarning
from tests.support.reference import Index, block_index
from tests.support.toys import Toy, batch

STILL: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "output_rank_factor": 0.25, "schedule": "static"}
"""Options under which no subnet ever moves."""


class Twin:
    """A plain copy of a model in which W is made of its base and S whenever it is used: one truth by construction.

    values: S by the weight's name, leaves that learn. Everything else of the model is frozen. Takes the calls of the
    model, with keywords that set its weights aside.
    """

    def __init__(self, plain: nn.Module, subnets: Mapping[str, losia_fx.Subnet]) -> None:
        self.plain = plain.requires_grad_(False)
        self.base = {name: self.plain.get_parameter(name).detach().clone() for name in subnets}
        self.places = {name: _place(subnet) for name, subnet in subnets.items()}
        self.values: dict[str, nn.Parameter] = {}
        for name, subnet in subnets.items():
            self.values[name] = nn.Parameter(self.block(name).to(subnet.values.dtype))

    def block(self, name: str) -> Tensor:
        """W[rows][:, cols] of the base."""
        return self.base[name][self.places[name]].clone()

    def weight(self, name: str) -> Tensor:
        """W, differentiable in S."""
        base = self.base[name]
        return base.index_put(self.places[name], self.values[name].to(base.dtype))

    def weights(self) -> dict[str, Tensor]:
        return {name: self.weight(name) for name in self.values}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.plain, self.weights(), args, kwargs)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.values.values())

    def solid(self) -> nn.Module:
        """A plain model with these weights."""
        plain = copy.deepcopy(self.plain)
        plain.load_state_dict({name: weight.detach() for name, weight in self.weights().items()}, strict=False)
        return plain

    @torch.no_grad()
    def write(self, name: str, weight: Tensor) -> None:
        """W is written as a whole: S follows."""
        self.base[name] = weight.detach().clone()
        self.values[name].copy_(self.block(name))

    @torch.no_grad()
    def follow(self, subnets: Mapping[str, losia_fx.Subnet], optimizer: Optimizer | None = None) -> list[str]:
        """The names of the subnets that have moved elsewhere, after moving here as well; their state starts anew."""
        moved = [name for name, place in self.places.items() if not _same_place(place, _place(subnets[name]))]
        for name in moved:
            self.base[name] = self.weight(name)
            self.places[name] = _place(subnets[name])
            self.values[name].copy_(self.block(name))
            if optimizer is not None:
                optimizer.state.pop(self.values[name], None)
        return moved


def _place(subnet: losia_fx.Subnet) -> Index:
    return tuple(index.clone() for index in block_index(subnet.rows, subnet.cols))


def _same_place(one: Index, other: Index) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def twins(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Twin]:
    """``model`` (or a toy of one block in float64), transformed, and its twin."""
    model = Toy(layers=1).double() if model is None else model
    plain = copy.deepcopy(model)
    losia_fx.transform(model, **{**STILL, **options})
    return model, Twin(plain, subnets_of(model))


def loss_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Of the next token; as wide as the logits, or float32 where they are narrower."""
    scores = logits(model(ids))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


_asked: weakref.WeakKeyDictionary[nn.Module, Mapping[str, losia_fx.Subnet]] = weakref.WeakKeyDictionary()


def subnets_of(model: nn.Module) -> Mapping[str, losia_fx.Subnet]:
    """losia_fx.subnets(model), asked once: to ask is a use of the model, which may mend what a test is to see."""
    found = _asked.get(model)
    held = {id(parameter) for parameter in model.parameters()}
    if found is None or not all(id(subnet.values) in held for subnet in found.values()):
        found = _asked[model] = losia_fx.subnets(model)
    return found


def values_of(model: nn.Module) -> list[nn.Parameter]:
    """S of every subnet, in the order of the twin's."""
    return [subnet.values for subnet in subnets_of(model).values()]


def backward(model: nn.Module, twin: Twin, ids: Tensor | None = None, tolerance: float = 1e-9) -> None:
    """One batch through both, forwards and backwards; losses and gradients agree."""
    ids = batch() if ids is None else ids
    mine, expected = loss_of(model, ids), loss_of(twin, ids)
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=0, msg=lambda m: f"loss: {m}")
    mine.backward()
    expected.backward()
    for (name, value), own in zip(twin.values.items(), values_of(model), strict=True):
        assert value.grad is not None
        assert own.grad is not None, f"{name} has no gradient"
        close(own.grad, value.grad, tolerance, f"gradient of {name}")


def zero(model: nn.Module, twin: Twin) -> None:
    model.zero_grad()
    for value in twin.parameters():
        value.grad = None


def assert_subnets(model: nn.Module, twin: Twin, tolerance: float = 1e-9) -> None:
    """S, and W behind it as it is stored, without a use that could mend it."""
    for name, subnet in subnets_of(model).items():
        close(subnet.values.detach(), twin.values[name].detach(), tolerance, f"S of {name}")
        close(model.get_parameter(name).detach(), twin.weight(name).detach(), tolerance, f"W of {name}")


def assert_one(model: nn.Module, twin: Twin, tolerance: float = 1e-9) -> None:
    """Whatever the model is asked, it answers as its twin."""
    ids = batch()
    with torch.no_grad():
        close(logits(model(ids)), logits(twin(ids)), tolerance, "forward with gradients off")
    close(logits(model(ids)).detach(), logits(twin(ids)).detach(), tolerance, "forward")
    state = model.state_dict()
    for name in twin.values:
        close(state[name], twin.weight(name).detach(), tolerance, f"state_dict: {name}")
    assert_subnets(model, twin, tolerance)


def logits(output: Any) -> Tensor:
    found: Tensor = getattr(output, "logits", output)
    return found


def close(mine: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


@contextmanager
def warned() -> Iterator[list[str]]:
    """What losia_fx warns of meanwhile."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(each.message) for each in caught if issubclass(each.category, LosiaWarning)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer as it is, S and its places too."""
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def refused(action: Callable[[], Any], model: nn.Module, *texts: str, error: Any = losia_fx.LosiaError) -> str:
    """The message of the error with which ``action`` ends; no parameter of ``model`` has changed."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    for text in texts:
        assert text in message, message
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} has changed"
    return message
