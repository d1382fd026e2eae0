"""ShardedAgreement: as agreement.py, of weights that FSDP2 has sharded.

W's rows and S's lie on different ranks, so whether the two agree is for all ranks to find out together. What one of
them could see alone is not looked at: versions and places grow alike everywhere, and values are compared only at times
that are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from losia_fx import registry
from losia_fx.errors import StateError, Torn, listed

from .agreement import Agreement
from .evidence import marks_of
from .sharding import gather_anew, same_values, shards_of, write_back
from .state import SubnetState


class ShardedAgreement:
    """What the W and S of some subnets, as far as this rank has them, were when they last agreed."""

    vigilant = False
    """Values are never compared at every look: that would be a collective more a forward."""

    def __init__(self, states: Sequence[SubnetState]) -> None:
        self.states = list(states)
        self.averaged = False
        self.unclear: list[SubnetState] = []
        """Nothing, as there compare() raises."""
        self.waiting: set[SubnetState] = set()
        """A LoSiA state was loaded, and the weights of these are still to come: nothing is to agree yet."""
        self.fresh: set[SubnetState] = set(states)
        """W is new, or nobody has compared yet: S is taken from it at the next forward or step, on all ranks."""
        self.loaded: set[SubnetState] = set()
        """Weights were loaded into these since that was last asked: of this run or not, a base of their own or not."""
        self._marks: dict[SubnetState, tuple[Mark, Mark]] = {}
        for state in states:
            state.agreement = self

    stands = True
    """What has been sharded is whole no more."""

    def remember(self, states: Iterable[SubnetState] | None = None, places: bool = False) -> None:
        """S and W of ``states`` (None: of all) agree as they are now."""
        for state in self.states if states is None else states:
            self._marks[state] = _marks(state)
            self.fresh.discard(state)

    def differing(self) -> list[SubnetState]:
        """The subnets of which W or S is not the tensor, the version or the storage that it was."""
        return [state for state in self.states if any(self.moved(state))]

    def moved(self, state: SubnetState) -> tuple[bool, bool]:
        """Whether W, and whether S, is another tensor, version or storage than when they last agreed."""
        now, then = _marks(state), self._marks.get(state)
        if state in self.fresh or then is None:
            return True, False
        return now[0] != then[0], now[1] != then[1]

    @torch.no_grad()
    def settle(self, states: Iterable[SubnetState], idle: bool = False) -> list[SubnetState]:
        """As Agreement.settle. Collective: every rank finds the same to have moved."""
        moved = {state: self.moved(state) for state in states}
        for state in moved:
            registry.place(state.weight, state)
        same = same_values(list(moved))
        stale = [state for state, equal in zip(moved, same, strict=True) if not equal]
        torn = [state for state in stale if all(moved[state]) and not idle]
        written = [state for state in stale if moved[state] == (False, True)]
        write_back(written)
        gather_anew([state for state in stale if state not in written and state not in torn])
        self.remember(state for state in moved if state not in torn)
        _refuse(
            torn, "both the weight and the values of its subnet were written since they last agreed, and they differ"
        )
        return written

    @torch.no_grad()
    def compare(self, states: Sequence[SubnetState] | None = None) -> list[SubnetState]:
        """By value, what no version shows. Collective. Raises Torn: nobody can tell which was written, and where."""
        chosen = list(self.states if states is None else states)
        stale = [state for state, equal in zip(chosen, same_values(chosen), strict=True) if not equal]
        _refuse(stale, "the weight and the values of its subnet differ, and no version shows which of them was written")
        return []

    def values_of(self, state: SubnetState) -> Tensor | None:
        return state.values

    def shows_a_write(self) -> bool:
        return False

    def is_ahead(self, state: SubnetState) -> bool:
        raise StateError(
            f"{state.name}: a model that FSDP2 has sharded cannot be copied or pickled: gather its state_dict() "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict) and load that into a plain model"
        )

    def follow_beneath(self) -> None:
        raise StateError(
            "torch.export and the like of a model that FSDP2 has sharded: gather its state_dict() and load that into a "
            "plain model, which can be exported"
        )


AnyAgreement = Agreement | ShardedAgreement


Mark = tuple[int, int, int]
"""Of a sharded tensor: its version; that of this rank's part, which grows where that alone is written; its place."""


def _marks(state: SubnetState) -> tuple[Mark, Mark]:
    shards = shards_of(state)
    shards.refresh()
    whole: list[Tensor] = [shards.weight, shards.values]
    versions, places = marks_of([state.weight_here, state.values_here])
    weight, values = zip([tensor._version for tensor in whole], versions, places, strict=True)
    return weight, values


def _refuse(states: Sequence[SubnetState], why: str) -> None:
    if states:
        raise Torn(
            f"{listed([state.name for state in states])}: {why}. Write one of them only, by its parameter and not by "
            "its .data; model.load_state_dict(...) makes a model whole again"
        )
