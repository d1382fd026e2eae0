"""When a look compares values: the policy by itself, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from losia_fx.runtime.vigilance import FIRST_LOOKS, LATER_LOOKS, UNSEEN_MOVES, Vigilance


@dataclass
class Agreement:
    """Stands in for that of a model."""

    vigilant: bool = False
    written: bool = False

    def shows_a_write(self) -> bool:
        return self.written


def looks(vigilance: Vigilance, count: int, agreement: Any = None) -> list[bool]:
    """What ``count`` forwards that learn compare."""
    found = []
    for _ in range(count):
        found.append(vigilance.compares(True, agreement or Agreement()))  # type: ignore[arg-type]
        vigilance.looked(True)
    return found


def at_rest() -> Vigilance:
    """After the first looks, and a step."""
    vigilance = Vigilance()
    looks(vigilance, FIRST_LOOKS + 1)
    vigilance.stepped([])
    return vigilance


def test_the_first_looks_compare_and_a_loop_of_forward_and_step_does_not() -> None:
    vigilance = Vigilance()
    assert all(looks(vigilance, 1 + FIRST_LOOKS))  # the very first goes from no forward to one that learns
    for _ in range(5):
        vigilance.stepped([])
        assert looks(vigilance, 1) == [False]


def test_every_other_use_and_every_change_of_mode_compares() -> None:
    vigilance: Any = at_rest()
    assert vigilance.compares(None, Agreement())
    assert vigilance.compares(False, Agreement())
    assert vigilance.compares(True, Agreement(vigilant=True))
    assert vigilance.compares(True, Agreement(written=True))
    assert not vigilance.compares(True, Agreement())


def test_more_forwards_than_usual_without_a_step_compare_at_first_and_then_now_and_again() -> None:
    found = looks(at_rest(), 1 + 2 * LATER_LOOKS)
    unusual = [number for number, compared in enumerate(found) if compared]
    assert unusual == [*range(1, 1 + FIRST_LOOKS), LATER_LOOKS, 2 * LATER_LOOKS]


def test_micro_batches_are_usual_once_a_step_has_ended_them() -> None:
    vigilance = at_rest()
    looks(vigilance, 4)
    vigilance.stepped([])
    assert looks(vigilance, 4) == [False] * 4


def test_a_change_of_the_optimizers_mode_explains_a_move_once() -> None:
    vigilance: Any = at_rest()
    vigilance.stepped([True])
    assert vigilance.still(["a"], [False]) == []
    assert vigilance.still(["a", "b"], [False]) == ["a"]


def test_unseen_moves_are_told_once_and_after_a_slot_where_that_is_shorter() -> None:
    for period, told in ((100, UNSEEN_MOVES), (4, 4)):
        vigilance = at_rest()
        assert [n for n in range(1, 50) if vigilance.moves_unseen(period)] == [told]
