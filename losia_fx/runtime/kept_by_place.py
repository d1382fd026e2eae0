"""Numbers that somebody keeps of S by its place (masters, slow weights, anchors), and writes back after S has moved.

They are of other elements of W than the subnet has now, and no version tells. So some elements of what S held before
and after its last move are remembered. Whatever trains S where it is knows nothing of what it held elsewhere: where
that explains how S has changed since, somebody has kept it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losia_fx.method.subnet import some_of
from losia_fx.method.transfers import numbers_of

from .state import SubnetState

WATCHED = 32
"""Subnets of one move that are remembered, at most; from all over the model."""
ENOUGH = 32
"""Elements, at least, by which one can tell: of one subnet, or of all that moved at once."""
SHARE, EXPLAINED, CERTAIN = 0.05, 0.3, 60.0
"""Of what S held before: how much of it there is in the change, the share of the change that it explains, and how
certain that is (F of a regression: by chance once in 1e10)."""


@dataclass
class Move:
    states: list[SubnetState]
    before: Tensor
    """Some elements of each, (states, n), padded with zeros."""
    after: Tensor
    writes: int = 0
    """How often somebody else than us was found to have written to them since."""


class LeftPlaces:
    """Some elements of subnets before their last move and after it."""

    def __init__(self) -> None:
        self._moves: list[Move] = []
        self._leaving: tuple[list[SubnetState], Tensor] | None = None

    def known(self, states: Sequence[SubnetState]) -> list[Move]:
        """What is to be judged before ``states`` move: their last moves, and the last of all."""
        moving = set(states)
        return [move for move in self._moves if move is self._moves[-1] or not moving.isdisjoint(move.states)]

    def leaving(self, states: Sequence[SubnetState]) -> None:
        """Not the head: what its rows have in common, its gradients have too, so of it one cannot tell."""
        moving = [state for state in states if not state.whole_cols]
        if moving and self._leaving is None:  # else a move that was cut short goes on: what S held at first counts
            again = set(moving)
            self._moves = [move for move in self._moves if again.isdisjoint(move.states)]
            watched = moving[:: -(-len(moving) // WATCHED)]
            self._leaving = watched, _some(watched)

    def arrived(self) -> None:
        if self._leaving is not None:
            states, before = self._leaving
            self._moves.append(Move(states, before, _some(states)))
            self._leaving = None

    def forget(self) -> None:
        """S was put back to where it was at another time."""
        self._moves, self._leaving = [], None

    def written(self, states: Collection[SubnetState]) -> list[SubnetState]:
        """Where somebody else than us has written to ``states``: which of them hold again, in part, what they held
        before a move. Asked at the first such write since then, the second, the fourth, and so on, when the host waits
        for the device."""
        touched = [move for move in self._moves if any(state in states for state in move.states)]
        for move in touched:
            move.writes += 1
        asked = [move for move in touched if move.writes & (move.writes - 1) == 0]
        return held_again(asked, numbers_of(questions(asked)))


@torch.no_grad()
def _some(states: Sequence[SubnetState]) -> Tensor:
    values = [some_of(state.values_here.detach()) for state in states]
    return pad_sequence([each.to(values[0].device, torch.float32) for each in values], batch_first=True)


@torch.no_grad()
def questions(moves: Iterable[Move]) -> list[Tensor]:
    """Of each move a 1-D tensor, whose numbers ``held_again`` wants."""
    return [_regression(move).flatten() for move in moves]


def held_again(moves: Iterable[Move], answers: Iterable[Sequence[float]]) -> list[SubnetState]:
    """The subnets whose change since a move is explained by what they held before it."""
    found: list[SubnetState] = []
    for move, numbers in zip(moves, answers, strict=True):
        *each, together = zip(*[iter(numbers)] * 3, strict=True)
        found += move.states if _tells(*together) else [s for s, n in zip(move.states, each, strict=True) if _tells(*n)]
    return found


def _tells(count: float, share: float, explained: float) -> bool:
    certain = explained * (count - 2) > CERTAIN * (1 - explained)
    return count >= ENOUGH and abs(share) > SHARE and explained > EXPLAINED and certain


def _regression(move: Move) -> Tensor:
    """Of the change of S since a move on what it held before, with what it held after (a decay is of that) held fixed:
    how many elements have changed in the move, the coefficient, and the share of the rest that it explains, of each
    subnet and of all together, (subnets + 1, 3). NaN where there is nothing to explain, or to explain it by."""
    now = _some(move.states)
    before, after = move.before.to(now), move.after.to(now)
    moved = (before != after).to(now)
    known = moved, (now - after) * moved, before * moved, after * moved
    return torch.cat([_explained(*known), _explained(*(each.view(1, -1) for each in known))])


def _explained(moved: Tensor, change: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """As ``_regression``, row by row."""
    size = _dot(after, after).clamp_min(torch.finfo(after.dtype).tiny)
    before = before - after * (_dot(after, before) / size)
    change = change - after * (_dot(after, change) / size)
    both, length = _dot(before, change), _dot(before, before)
    return torch.cat([moved.sum(1, keepdim=True), both / length, both * both / (length * _dot(change, change))], 1)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1, keepdim=True)
