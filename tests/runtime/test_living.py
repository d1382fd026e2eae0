"""What is found among the objects of the process."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.optim import Optimizer

from losia_fx.runtime.living import living


class Unhashable(type):
    """A metaclass that compares, and so leaves its classes without a hash."""

    def __eq__(cls, other: object) -> bool:
        raise AssertionError("no class is compared")

    __hash__ = None  # type: ignore[assignment]


class Strange(metaclass=Unhashable):
    pass


def test_every_object_of_the_classes_and_of_their_subclasses() -> None:
    linear, optimizer, strange = nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))]), Strange()
    found = living(nn.Linear, Optimizer)
    assert {id(linear), id(optimizer)} <= {id(each) for each in found}
    assert all(issubclass(type(each), (nn.Linear, Optimizer)) for each in found)
    assert len({id(each) for each in found}) == len(found)
    assert id(linear) not in {id(each) for each in living(Optimizer)}
    assert any(each is strange for each in living(Strange))


def test_a_proxy_of_what_is_gone_is_no_object() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    proxy = weakref.proxy(optimizer)
    del optimizer  # isinstance(proxy, ...) raises from here on
    assert not any(each is proxy for each in living(Optimizer))


def test_a_class_that_nobody_has_an_object_of() -> None:
    class Nobody:
        pass

    assert living(Nobody) == []
