"""The slots of the schedule: who is profiled, and at a slot's end the selection and the move to it."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from losia_fx import registry
from losia_fx.method.schedule import chosen_apart, profiled_groups, rewarmed_steps
from losia_fx.method.selection import Selection, share_moved
from losia_fx.method.sums import sums_shapes, visit
from losia_fx.method.transfers import numbers_of

from . import notices
from .carry import carry_over
from .choose import Choice, choose, share_of_all
from .in_8_bits import leave_places
from .kept_by_place import held_again, questions
from .optimizer_state import corrects_averages, kept_apart, restart_states
from .profile import Profile
from .state import SubnetState
from .train_state import Event, TrainState

log = logging.getLogger("losia_fx")


def open_slot(train: TrainState) -> None:
    """Has the groups of the slot that the next step is in profiled, and no other."""
    profiled = profiled_groups(train.config, len(train.groups), train.progress.step, train.head)
    for state in train.states:
        if state.group in train.progress.selecting:
            continue  # its score is still to be used
        if state.group not in profiled:
            state.profile = None
        elif state.profile is None:
            state.profile = Profile()


def select_due(train: TrainState) -> None:
    """Moves the groups whose slot has ended: one after the other, or with schedule="all" at once, but for a head that
    has an importance of its own."""
    selecting = train.progress.selecting
    while selecting:
        together = train.config.schedule == "all" and not (selecting[0] == train.head and chosen_apart(train.config))
        groups = tuple(selecting) if together else (selecting[0],)
        alone = not together or groups == (train.head,)  # the head has counted amid a slot
        label = groups[0] if alone else None
        if reselect(train, groups, label) is None:
            if not train.idle_groups.issuperset(groups):  # else it was said that nothing there has a gradient
                notices.warn_kept(train, label)
            _record(train, Event(train.progress.step, label, 0.0, None))
        for group in groups:
            for state in train.members(group):
                state.profile = None
        del selecting[: len(groups)]


@torch.no_grad()
def reselect(train: TrainState, groups: Sequence[int], label: int | None) -> Event | None:
    """Selects the subnets of these groups, and moves them there; None where there is no score to select by.

    label: what the event calls the groups. Where all subnets are drawn, and at once, the host does not wait.
    """
    members = [state for group in groups for state in train.members(group)]
    past = train.left.known(members)
    choices = choose(train, members)
    elements = sum(state.values.numel() for state in members)
    if train.config.schedule == "all" and choices and all(choice.total is None for choice in choices.values()):
        selections = {state: choice.selection for state, choice in choices.items()}
        if members[0].weight.device.type == "cpu":
            notices.warn_kept_by_place(train, held_again(past, numbers_of(questions(past))))
        moved = share_of_all(selections, elements)
        _move(train, selections)
        return _record(train, Event(train.progress.step, label, math.nan, None), moved)
    asked = [_asked(state, choice) for state, choice in choices.items()]
    numbers = numbers_of([*asked, *questions(past)])  # the device waits once
    notices.warn_kept_by_place(train, held_again(past, numbers[len(asked) :]))
    found = dict(zip(choices, numbers, strict=False))
    # What has no score stays.
    found = {state: numbers for state, numbers in found.items() if choices[state].total is None or numbers[0] > 0}
    if not found:
        return None
    _move(train, {state: choices[state].selection for state in found})
    total, inside = (sum(numbers[part] for numbers in found.values()) for part in (0, 1))
    share = sum(numbers[2] * state.values.numel() for state, numbers in found.items()) / elements
    return _record(train, Event(train.progress.step, label, share, inside / total if total > 0 else None))


def _asked(state: SubnetState, choice: Choice) -> Tensor:
    """The whole score, its part inside, and the share of S that moves: 3 numbers."""
    selection = choice.selection
    total = torch.zeros_like(selection.captured) if choice.total is None else choice.total
    moved = share_moved((state.rows, state.cols), (selection.rows, selection.cols))
    return torch.stack([total, selection.captured, moved])


def _move(train: TrainState, selections: Mapping[SubnetState, Selection]) -> None:
    notices.warn_shared_memory(train, selections)
    if train.bases is not None:
        places = {state: (selection.rows, selection.cols) for state, selection in selections.items()}
        train.bases.before_move(places, everywhere=train.config.schedule == "all")
    if (origin := registry.numbered(train.copied_from)) is not None:
        origin.copies_moved = True
    leave_places(list(selections), train.progress.generator)
    train.pending.moving = True
    rewarms = rewarmed_steps(train.config) > 1
    for state, selection in selections.items():
        if train.config.importance == "visits":
            _note_visit(state)
        state.rewarm_from = train.progress.step if rewarms else None
        state.pending = (selection.rows, selection.cols)
    finish_moves(train, selections)


def _note_visit(state: SubnetState) -> None:
    """The subnet is about to leave its place."""
    before = state.visits or tuple(state.rows.new_zeros(n) for n in sums_shapes(state.weight))
    state.visits = visit(before[0], state.rows), visit(before[1], state.cols)


def finish_moves(train: TrainState, states: Iterable[SubnetState], again: bool = False) -> None:
    """Every part of a move may be done again, so one that was interrupted is simply made: W has all the numbers.

    again: it was, and some S may hold the numbers of their new places.
    """
    moving = [state for state in states if state.pending is not None]
    apart, unclear = kept_apart(train.optimizers.known, moving, moved=again)
    notices.warn_apart(train, unclear)
    train.left.leaving(moving)
    for optimizer in train.optimizers.known:
        if corrects_averages(optimizer, moving):
            notices.warn_corrected(train, optimizer)
    for state in moving:
        assert state.pending is not None
        state.move_to(*state.pending)
        train.by_hand.pop(state, None)
    carries = functools.partial(carry_over, train) if train.config.carry_moments else None
    restart_states(train.optimizers.known, moving, carries, apart)
    train.agreement.remember(moving, places=True)
    train.left.arrived()
    for state in moving:
        state.pending = None
    train.pending.moving = False


def _record(train: TrainState, event: Event, moved: Tensor | None = None) -> Event:
    """moved: the share, where nobody has waited for it yet."""
    if moved is None:
        log.info("step %d: group %s re-selected, %.0f%% new", event.step, event.group, 100 * event.moved)
    else:
        log.debug("step %d: all groups re-selected", event.step)
    return train.progress.record(event, moved)
