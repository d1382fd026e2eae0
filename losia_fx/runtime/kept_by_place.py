"""Numbers that somebody keeps of S by its place (masters, slow weights, anchors) and writes back after S has moved.

They are of other elements of W than the subnet has now, and no version tells. So what S held before and after its last
move is remembered in part, and the first write to S that is not ours is held against both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from losia_fx.method.subnet import some_of
from losia_fx.method.transfers import numbers_of

from .state import SubnetState

WATCHED = 32
"""Subnets of one move that are remembered, at most: whoever keeps copies keeps them of many."""
STEPS, FEW = 12, 4
"""Steps after a move in which an optimizer is looked at that may keep copies (Lookahead takes its slow weights every
five or ten), and of how many subnets then."""
SHARE = 0.25
"""Of the way back to what S held before the move, that a write has to go to be one of numbers kept by place: an average
or slow weights go a part of it. A write that scales S by c goes (1 - c) / 2."""
REST = 0.05
"""Of the squared length of that way, what the write may do besides: a step of the optimizer."""


class LeftPlaces:
    """Some elements of subnets before their last move and after it, until somebody else than us writes to them."""

    def __init__(self) -> None:
        self._before: dict[SubnetState, Tensor] = {}
        self._moved: dict[SubnetState, tuple[Tensor, Tensor]] = {}
        self._steps_left = 0

    def leaving(self, states: Sequence[SubnetState]) -> None:
        """May come again for a move that was cut short: what S held at first is what counts."""
        for state in states[:WATCHED]:
            self._before.setdefault(state, _some(state).clone())

    def arrived(self) -> None:
        self._moved.update((state, (before, _some(state).clone())) for state, before in self._before.items())
        self._before.clear()
        self._steps_left = STEPS

    def forget(self) -> None:
        """S was put back to where it was at another time."""
        self._before.clear()
        self._moved.clear()

    @property
    def lately(self) -> bool:
        """Whether a subnet has moved so lately that ``written_in_step`` is worth asking."""
        return bool(self._moved) and self._steps_left > 0

    def written_in_step(self, states: Iterable[SubnetState]) -> list[SubnetState]:
        """As ``written_again``, after a step of an optimizer that may keep copies: of a few subnets, several times."""
        self._steps_left -= 1
        few = itertools.islice((state for state in states if state in self._moved), FEW)
        return _hold({state: self._moved[state] for state in few})

    def written_again(self, states: Iterable[SubnetState]) -> list[SubnetState]:
        """Which of ``states``, whose S somebody has written, hold numbers of the place that they have left. Asked for
        the first time since a move, the host waits for the device once."""
        return _hold({state: self._moved.pop(state) for state in list(states) if state in self._moved})


@torch.no_grad()
def _hold(known: Mapping[SubnetState, tuple[Tensor, Tensor]]) -> list[SubnetState]:
    """Which of these subnets hold what they held before their last move, in part or whole; by what they held before
    that, and after it."""
    found = numbers_of([_way_back(_some(state), *both) for state, both in known.items()])
    return [state for state, (share, rest) in zip(known, found, strict=True) if share > SHARE and rest < REST]


def _some(state: SubnetState) -> Tensor:
    return some_of(state.values_here.detach())


def _way_back(now: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """How much of the way from ``after`` to ``before`` lies between ``after`` and ``now``, and the squared length of
    the rest in that of the whole way; (2,), NaN where there is no way."""
    way, gone = before.to(now) - after.to(now), now - after.to(now)
    length = way.dot(way)
    share = gone.dot(way) / length
    rest = gone - share * way
    return torch.stack([share, rest.dot(rest) / length])
