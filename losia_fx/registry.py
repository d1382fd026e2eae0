"""Every table that losia_fx keeps for the whole process, and nothing else that is global.

A leaf: it knows what ``EnteredSubnet`` says of what it holds, and the rooms that fill a table say what is in it, as in
``BY_HANDLE: MutableMapping[int, Profiled] = registry.BY_HANDLE``. All tables hold weakly what users own: a model that
nobody holds any more, or one whose transformation failed, leaves nothing behind. ``enter`` and ``leave`` are the only
ways in and out for a subnet; ``changed`` says that some tensor has taken another's place, so that what was derived from
the tables (whose subnets an optimizer steps) is derived anew.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary


class EnteredSubnet(Protocol):
    """A weight's subnet as the tables know it: losia_fx.runtime.state.SubnetState."""

    @property
    def handle(self) -> Tensor:
        """(1,) int64 on the CPU: the subnet's number, by which graphs know it."""

    @property
    def registered(self) -> bool:
        """Whether its module has the subnet: that of a copy which is still being made has no parameters yet."""

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the subnet's."""


BY_HANDLE: MutableMapping[int, Any] = weakref.WeakValueDictionary()
"""Every subnet, by handle."""

RETIRED: MutableMapping[Tensor, Any] = WeakIdKeyDictionary()
"""S that was taken off again, with the model that it was of, weakly held: an optimizer may still step it."""

TAPPED: dict[int, Any] = {}
"""Inputs kept for a backward, by ticket; each goes with its ticket, that is with its graph, or with its step."""

TRAINED: weakref.WeakSet[Any] = weakref.WeakSet()
"""The models whose training is followed: losia_fx.runtime.train_state.TrainState."""

COPIES: weakref.WeakSet[Any] = weakref.WeakSet()
"""Subnets of copied modules whose controller has not been copied with them (yet)."""

BACKENDS: MutableMapping[Any, None] = WeakIdKeyDictionary()
"""What torch.compile is given as a backend and that trains subnets: ours, and functions of users around ours."""

RAN_OUTSIDE: weakref.WeakSet[Any] = weakref.WeakSet()
"""Subnets whose weight ran outside a rewritten graph since that was last said."""

RAN_WITHOUT_GRAD: weakref.WeakSet[Any] = weakref.WeakSet()
"""Subnets whose weight ran with gradients off in the midst of a forward that has them on."""

AT_ODDS: weakref.WeakSet[Any] = weakref.WeakSet()
"""Subnets that learn while their weight was frozen by itself, or the other way round, since that was last said."""

DENSE: MutableMapping[int, nn.Parameter] = weakref.WeakValueDictionary()
"""Weights that backend="losia" looked at and that are to learn in full, by id."""

GRADIENT_HOOKS: MutableMapping[Tensor, tuple[bool, RemovableHandle]] = WeakIdKeyDictionary()
"""Of each weight that has asked for its gradient: whether it required grad by itself then, and the hook."""

ASKING: MutableMapping[Tensor, None] = WeakIdKeyDictionary()
"""The weights that require grad because they were asked to, and for no longer."""

STEPPING: MutableMapping[int, Any] = weakref.WeakValueDictionary()
"""The calls of optimizers' steps that are under way, by thread; a thread that ends takes its own along."""

OWNED: MutableMapping[Any, Any] = weakref.WeakKeyDictionary()
"""What each optimizer steps of ours, as far as it has been asked."""

CONSTRUCTED: MutableMapping[Any, MutableMapping[Any, Any]] = weakref.WeakKeyDictionary()
"""By optimizer and subnet: the entries of its state that an optimizer's constructor makes."""

APART: MutableMapping[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
"""By optimizer: what its constructor makes for its subnets elsewhere than in its state."""


@dataclass
class GraphUses:
    """What graphs have been seen to do with a parameter, in fx's words ("linear", "addmm", "embedding", ...)."""

    named: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    """Of a weight with a subnet, those that cost its full gradient."""
    unpacked: set[str] = field(default_factory=set)
    """Of a weight that is packed (LosiaConfig.frozen_products), products that take it as it is all the same."""


GRAPH_USES: MutableMapping[Tensor, GraphUses] = WeakIdKeyDictionary()

tickets = itertools.count(1)
_numbers = itertools.count(1)
_handles = itertools.count(1)
_numbered: MutableMapping[int, Any] = weakref.WeakValueDictionary()
_by_weight: MutableMapping[int, EnteredSubnet] = weakref.WeakValueDictionary()
_without: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
"""Weights that were looked for in vain, with the generation in which they were."""
_generation = 0


def generation() -> int:
    """Grows whenever a subnet comes or goes, or a tensor takes another's place."""
    return _generation


def changed() -> None:
    global _generation
    _generation += 1


def number(trained: Any) -> int:
    """A number of its own for a model in training, by which copies of it know it."""
    found = next(_numbers)
    _numbered[found] = trained
    return found


def numbered(number: int | None) -> Any:
    """The model in training of that number, while it lives; else None."""
    return None if number is None else _numbered.get(number)


def enter(subnet: EnteredSubnet) -> int:
    """Makes a subnet known to graphs, and returns its handle; to be entered under its weight with ``place``."""
    handle = next(_handles)
    BY_HANDLE[handle] = subnet
    changed()
    return handle


def place(weight: Tensor, subnet: EnteredSubnet) -> None:
    """``weight`` is that of ``subnet`` from now on."""
    _by_weight[id(weight)] = subnet
    changed()


def leave(subnet: EnteredSubnet) -> None:
    """Forgets all about a subnet."""
    BY_HANDLE.pop(int(subnet.handle), None)
    for key in [key for key, other in _by_weight.items() if other is subnet]:
        del _by_weight[key]
    for table in (COPIES, RAN_OUTSIDE, RAN_WITHOUT_GRAD):
        table.discard(subnet)
    changed()


def retire(values: Tensor | None, root: nn.Module) -> None:
    """``values`` was S of a weight of ``root``, and is to be taken off."""
    if values is not None:
        RETIRED[values] = weakref.ref(root)


def find(weight: Tensor) -> EnteredSubnet | None:
    """The subnet of ``weight``, by identity, or None; quick, and blind to a weight that has replaced another."""
    subnet = _by_weight.get(id(weight))
    return subnet if subnet is not None and subnet.holds(weight) else None


def resolve(weight: Tensor) -> EnteredSubnet | None:
    """As ``find``, but a weight that took another's place (a copy's, load_state_dict(assign=True)) is looked for."""
    subnet = find(weight)
    if subnet is None and _without.get(weight) != _generation:
        entered = (each for each in list(BY_HANDLE.values()) if each.registered)
        subnet = next((each for each in entered if each.holds(weight)), None)
        if subnet is None:
            _without[weight] = _generation
        else:
            place(weight, subnet)
    return subnet
