"""When a look at a model compares S and W by value, and whose moves of S are a surprise: counters, and no tensor.

Versions and places in memory are looked at before every use. Values cost a pass over the subnets, and a wait for the
device, so they are compared where a write that no version shows is likely, or would last.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .sharded_agreement import AnyAgreement
from .state import SubnetState

FIRST_LOOKS = 3
"""Looks at a model after a change of its weights or subnets that compare values, whatever the versions say."""
LATER_LOOKS = 16
"""One in so many forwards between which no step was seen compares values, once the first few were found right."""
UNSEEN_MOVES = 20
"""Forwards in a row, or a slot if that is shorter, that find S moved without a step: somebody else is stepping it."""


@dataclass
class Vigilance:
    """What the looks at one model have been like."""

    first_looks: int = FIRST_LOOKS
    """How many are left that compare values whatever the versions say."""
    learned: bool | None = None
    """Whether the last forward had gradients on."""
    step_seen: bool = True
    """A step was followed since the last forward that had."""
    waits: int = 0
    """Forwards since the one after the last followed step."""
    usual_waits: int = 0
    """The most of them that a followed step has ended."""
    unseen_moves: int = 0
    modes: list[bool] = field(default_factory=list)
    """Of the optimizers, training or evaluation, at the last step."""
    modes_of: dict[SubnetState, list[bool]] = field(default_factory=dict)
    """Those in which a subnet was found moved since then."""

    def compares(self, learns: bool | None, agreement: AnyAgreement) -> bool:
        """Whether a look compares values too. learns: of a forward, whether gradients are on; None for another use."""
        if learns is None or agreement.vigilant or learns != self.learned:
            return True
        if self.first_looks:
            self.first_looks -= 1
            return True
        if agreement.shows_a_write():
            return True
        if not learns or self.step_seen:
            return False
        self.waits += 1  # a further micro-batch, as in the steps before; or a step that nobody tells us of
        unusual = self.waits - self.usual_waits
        return unusual > 0 and (unusual <= FIRST_LOOKS or unusual % LATER_LOOKS == 0)

    def looked(self, learns: bool | None) -> None:
        if learns is not None:
            self.learned = learns
        if learns:
            self.step_seen = False

    def stepped(self, modes: list[bool]) -> None:
        """A step was followed, after which the optimizers are in these modes."""
        self.step_seen, self.unseen_moves, self.modes = True, 0, modes
        self.modes_of.clear()
        self.usual_waits, self.waits = max(self.usual_waits, self.waits), 0

    def still(self, moved: list[SubnetState], modes: list[bool]) -> list[SubnetState]:
        """Of subnets that were found moved outside of a step, those that no optimizer's change of mode has moved."""
        still = [state for state in moved if self.modes_of.get(state, self.modes) == modes]
        self.modes_of.update(dict.fromkeys(moved, modes))
        return still

    def moves_unseen(self, period: int) -> bool:
        """A forward that learns found S moved without a step; whether that is now too often for chance."""
        self.unseen_moves += 1
        return self.unseen_moves == min(UNSEEN_MOVES, period)
