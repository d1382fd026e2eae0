"""ShardedBases: as bases.py, of a model that FSDP2 has sharded.

A rank keeps the base of its own portion of each weight, all of it, and where the subnets have been. What one process
would have kept follows from that: it is put together by all ranks, a weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losia_fx.method.subnet import gather
from losia_fx.method.transfers import copies
from losia_fx.method.visits import BaseHistory

from .bases import Bases
from .sharded_agreement import ShardedAgreement
from .sharding import in_order
from .shards import local, placed, reshard_all, whole
from .state import SubnetState


@dataclass
class Kept:
    """Of one parameter, everything on the CPU."""

    part: Tensor
    """This rank's portion of the base."""
    places: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Rows and cols of each visit of its subnet; none of a parameter that trains in full."""
    everywhere: bool = False
    """The subnet moves all the time: its places are not noted any more."""

    @staticmethod
    def of(parameter: Tensor, *place: Tensor) -> Kept:
        rows_and_cols = copies(list(place))
        return Kept(local(parameter).to("cpu", copy=True), [(rows_and_cols[0], rows_and_cols[1])] if place else [])

    @torch.no_grad()
    def history(self, parameter: Tensor) -> BaseHistory:
        """As one process would have kept it. Collective."""
        base = whole(placed(self.part.to(local(parameter)), parameter)).cpu()
        if not self.places:
            return BaseHistory.of_whole(base)
        history = BaseHistory()
        history.open(base, *self.places[0])
        for rows, cols in self.places[1:]:
            if history.follows:
                history.visit(base, rows, cols, gather(base, rows, cols))
        if self.everywhere:
            history.keep_whole(base)
        return history


class ShardedBases(Bases):
    """Costs a copy of what this rank has of every weight that learns. Every rank calls all of it."""

    def __init__(self) -> None:
        super().__init__()
        self._subnets: dict[SubnetState, Kept] = {}
        self._in_full: dict[str, tuple[Tensor, Kept]] = {}

    def before_step(
        self, root: nn.Module, optimizer: Optimizer, states: Sequence[SubnetState], mine: Sequence[SubnetState]
    ) -> None:
        self._look_at_loaded(states)
        for state in mine:
            if state not in self._subnets:
                self._subnets[state] = Kept.of(state.weight, state.rows, state.cols)
        if optimizer not in self._met:
            reshard_all(root)  # by what the module has then an optimizer's parameters are told
        self._keep_full(root, optimizer, states)

    def _keep(self, name: str, parameter: Tensor) -> None:
        self._in_full.setdefault(name, (parameter, Kept.of(parameter)))

    def _look_at_loaded(self, states: Sequence[SubnetState]) -> None:
        """Weights may have been loaded since; those of another run are a base of their own."""
        agreement = states[0].agreement
        assert isinstance(agreement, ShardedAgreement)
        asked = in_order(agreement.loaded & self._subnets.keys())
        agreement.loaded.clear()
        for state in asked:
            history = self._subnets[state].history(state.weight)
            history.loaded(whole(state.weight))
            if history.restarted:
                del self._subnets[state]
                self._in_full.clear()
                self._forget()

    def before_move(self, places: Mapping[SubnetState, tuple[Tensor, Tensor]], everywhere: bool) -> None:
        for state, place in places.items():
            if (kept := self._subnets.get(state)) is not None:
                kept.everywhere |= everywhere
                if not kept.everywhere:
                    rows, cols = copies(list(place))
                    kept.places.append((rows, cols))

    def histories(self, root: nn.Module, states: Iterable[SubnetState]) -> Iterator[tuple[str, Tensor, BaseHistory]]:
        self._look_at_loaded(list(states))
        known = {state.name: (state.weight, kept) for state, kept in self._subnets.items()}
        for name, (parameter, kept) in {**known, **self._in_full}.items():
            yield name, whole(parameter), kept.history(parameter)
