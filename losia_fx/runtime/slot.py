"""The slots of the schedule: who is profiled, and at a slot's end the selection and the move to it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from losia_fx.config import LosiaConfig
from losia_fx.method.importance import score_of
from losia_fx.method.schedule import profiled_groups
from losia_fx.method.selection import Selection, select_experts, select_rows, select_subnet, share_moved
from losia_fx.method.transfers import numbers_of

from . import notices
from .bases import keep_places
from .optimizer_state import restart_states
from .profile import Profile
from .state import SubnetState
from .train_state import Event, TrainState

log = logging.getLogger("losia_fx")


class Choice(NamedTuple):
    """A selection, the sum of the whole score that it was made by, and the share of S that moves: 0-dim float32."""

    selection: Selection
    total: Tensor
    moved: Tensor


def open_slot(train: TrainState) -> None:
    """Has the groups of the slot that the next step is in profiled, and no other."""
    profiled = profiled_groups(train.config, len(train.groups), train.progress.step)
    for state in train.states:
        if state.group in train.progress.selecting:
            continue  # its score is still to be used
        if state.group not in profiled:
            state.profile = None
        elif state.profile is None:
            state.profile = Profile()


def select_due(train: TrainState) -> None:
    """Moves the groups whose slot has ended."""
    selecting = train.progress.selecting
    while selecting:
        group = selecting[0]
        if reselect(train, group) is None:
            notices.warn_kept(group)
            _record(train, Event(train.progress.step, group, 0.0, None))
        for state in train.members(group):
            state.profile = None
        selecting.pop(0)


@torch.no_grad()
def reselect(train: TrainState, group: int) -> Event | None:
    """Selects the subnets of a group, and moves them there; None where there is no score to select by."""
    members = train.members(group)
    drawn = ((state, choose(state, train.config, train.progress.generator)) for state in members)
    choices = {state: choice for state, choice in drawn if choice is not None}
    asked = [torch.stack([c.total, c.selection.captured, c.moved]) for c in choices.values()]
    found = dict(zip(choices, numbers_of(asked), strict=True))  # the device waits once
    if train.config.importance != "random":  # what has no score stays
        found = {state: numbers for state, numbers in found.items() if numbers[0] > 0}
    if not found:
        return None
    _move(train, {state: choices[state].selection for state in found})
    total, inside = (sum(numbers[part] for numbers in found.values()) for part in (0, 1))
    moved = sum(numbers[2] * state.values.numel() for state, numbers in found.items())
    elements = sum(state.values.numel() for state in members)
    captured = inside / total if total > 0 else None
    return _record(train, Event(train.progress.step, group, moved / elements, captured))


def choose(state: SubnetState, config: LosiaConfig, generator: torch.Generator) -> Choice | None:
    """None where nothing was measured. All on the device: whether there is any score is not known yet."""
    profile = state.profile
    if config.importance == "random":
        selection = state.random_selection(generator)
        total = torch.zeros_like(selection.captured)
    elif profile is None or profile.importance is None or profile.uncertainty is None:
        return None
    else:
        score = score_of(config.importance, profile.importance, profile.uncertainty)
        selection, total = _select(state, score), score.sum()
    return Choice(selection, total, share_moved((state.rows, state.cols), (selection.rows, selection.cols)))


def _select(state: SubnetState, score: Tensor) -> Selection:
    if score.dim() == 3:
        return select_experts(score, (state.rows, state.cols))
    return select_rows(score, state.size[0]) if state.whole_cols else select_subnet(score, *state.size)


def _move(train: TrainState, selections: Mapping[SubnetState, Selection]) -> None:
    keep_places({state: (selection.rows, selection.cols) for state, selection in selections.items()})
    train.pending.moving = True
    for state, selection in selections.items():
        state.rewarm_from = train.progress.step
        state.pending = (selection.rows, selection.cols)
    finish_moves(train, selections)


def finish_moves(train: TrainState, states: Iterable[SubnetState]) -> None:
    """Every part of a move may be done again, so one that was interrupted is simply made: W has all the numbers."""
    for state in states:
        if state.pending is not None:
            state.move_to(*state.pending)
            restart_states(train.optimizers.known, state)
            train.agreement.remember([state], places=True)
            train.by_hand.pop(state, None)
            state.pending = None
    train.pending.moving = False


def _record(train: TrainState, event: Event) -> Event:
    train.progress.history.append(event)
    log.info("step %d: group %d re-selected, %.0f%% new", event.step, event.group, 100 * event.moved)
    return event
