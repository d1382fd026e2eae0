"""Every table that losia_fx keeps for the whole process, and nothing else that is global.

All of them hold weakly what users own: a model that nobody holds any more, or one whose transformation failed, leaves
nothing behind. ``enter`` and ``leave`` are the only ways in and out for a subnet; ``changed`` says that some tensor has
taken another's place, so that what was derived from the tables (whose subnets an optimizer owns) is derived anew.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from losia_fx.ops.localization import Profile, Tapped

    from .controller import Controller
    from .optimizers import Entry, Owned
    from .state import SubnetState
    from .steps import Running

PROFILES: weakref.WeakValueDictionary[int, Profile] = weakref.WeakValueDictionary()
"""What is profiled, by handle: every subnet (and, in tests, stand-ins)."""

TAPPED: dict[int, Tapped] = {}
"""Inputs kept for a backward, by ticket; each goes with its ticket, that is with its graph, or with its step."""

CONTROLLERS: weakref.WeakSet[Controller] = weakref.WeakSet()

COPIES: weakref.WeakSet[SubnetState] = weakref.WeakSet()
"""States of copied modules whose controller has not been copied with them (yet)."""

RAN_OUTSIDE: weakref.WeakSet[SubnetState] = weakref.WeakSet()
"""Subnets whose weight ran outside a rewritten graph since the controller last looked."""

RAN_BLIND: weakref.WeakSet[SubnetState] = weakref.WeakSet()
"""Subnets whose weight ran with gradients off in the midst of a forward that has them on."""

DENSE: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
"""Weights that backend="losia" looked at and that are to learn in full, by id."""

CUT_DOWN: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()
"""The hook of each weight that has asked for its gradient."""

STEPPING: dict[int, list[Running]] = {}
"""The calls of optimizers' steps that are under way, by thread."""

OWNED: MutableMapping[Optimizer, Owned] = weakref.WeakKeyDictionary()
"""What each optimizer steps of ours, as far as it has been asked."""

MADE: MutableMapping[Optimizer, MutableMapping[SubnetState, dict[str, Entry]]] = weakref.WeakKeyDictionary()
"""The entries of its state that an optimizer's constructor makes, for the subnets that it steps."""


@dataclass
class GraphUses:
    """What graphs have been seen to do with a parameter, in fx's words ("linear", "addmm", "embedding", ...)."""

    named: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    """Of a weight with a subnet, those that cost its full gradient."""


GRAPH_USES: MutableMapping[Tensor, GraphUses] = WeakIdKeyDictionary()

tickets = itertools.count(1)
_numbers = itertools.count(1)
_handles = itertools.count(1)
_numbered: weakref.WeakValueDictionary[int, Controller] = weakref.WeakValueDictionary()
_by_weight: weakref.WeakValueDictionary[int, SubnetState] = weakref.WeakValueDictionary()
_without: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
"""Weights that were looked for in vain, with the generation in which they were."""
_generation = 0


def generation() -> int:
    """Grows whenever a subnet comes or goes, or a tensor takes another's place."""
    return _generation


def changed() -> None:
    global _generation
    _generation += 1


def number(controller: Controller) -> int:
    """A number of its own for ``controller``, by which copies of it know it."""
    found = next(_numbers)
    _numbered[found] = controller
    return found


def numbered(number: int | None) -> Controller | None:
    """The controller of that number, while it lives."""
    return None if number is None else _numbered.get(number)


def follower(state: SubnetState) -> Controller | None:
    """The controller that follows a subnet."""
    return next((each for each in list(CONTROLLERS) if state in each.states), None)


def enter(state: SubnetState) -> int:
    """Makes ``state`` known to graphs, and returns its handle; to be entered under its weight with ``place``."""
    handle = next(_handles)
    PROFILES[handle] = state
    changed()
    return handle


def place(weight: Tensor, state: SubnetState) -> None:
    """``weight`` is that of ``state`` from now on."""
    _by_weight[id(weight)] = state
    changed()


def leave(state: SubnetState, handle: int) -> None:
    """Forgets all about ``state``."""
    PROFILES.pop(handle, None)
    for key in [key for key, other in _by_weight.items() if other is state]:
        del _by_weight[key]
    for table in (COPIES, RAN_OUTSIDE, RAN_BLIND):
        table.discard(state)
    changed()


def find(weight: Tensor) -> SubnetState | None:
    """The state of the subnet of ``weight``, by identity; quick, and blind to a weight that has replaced another."""
    state = _by_weight.get(id(weight))
    return state if state is not None and state.holds(weight) else None


def resolve(weight: Tensor) -> SubnetState | None:
    """As ``find``, but a weight that took another's place (a copy's, load_state_dict(assign=True)) is looked for."""
    state = find(weight)
    if state is None and _without.get(weight) != _generation:
        state = next((other for other in live_states() if other.holds(weight)), None)
        if state is None:
            _without[weight] = _generation
        else:
            place(weight, state)
    return state


def live_states() -> Iterator[SubnetState]:
    """Every registered subnet of the process."""
    from .state import SubnetState  # the tables hold it, and it enters itself into them

    return (each for each in list(PROFILES.values()) if isinstance(each, SubnetState) and each.registered)
