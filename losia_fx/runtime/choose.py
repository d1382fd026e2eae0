"""Where the subnets of a group go: by what their slot has measured, by how often labels were seen, or at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losia_fx.config import BY_SUMS
from losia_fx.method.importance import score_of
from losia_fx.method.selection import Selection, select_experts, select_rows, select_subnet, share_moved, top
from losia_fx.method.subnet import draw, draw_all
from losia_fx.method.sums import in_proportion, per_visit, select_by_sums

from .state import SubnetState
from .train_state import TrainState


class Choice(NamedTuple):
    """A selection, and the sum of the whole score that it was made by, 0-dim float32; None of one that was drawn."""

    selection: Selection
    total: Tensor | None


def choose(train: TrainState, members: Sequence[SubnetState]) -> dict[SubnetState, Choice]:
    """Without those of which nothing was measured. All on the device: whether there is any score is not known yet."""
    drawn = [state for state in members if _is_drawn(train, state)]
    if train.config.schedule == "all":
        selections = _drawn_at_once(train, drawn)
    else:
        selections = {state: random_selection(state, train.progress.generator) for state in drawn}
    choices: dict[SubnetState, Choice] = {state: Choice(found, None) for state, found in selections.items()}
    for state in members:
        if state not in choices and (choice := _scored(train, state)) is not None:
            choices[state] = choice
    return choices


def _is_drawn(train: TrainState, state: SubnetState) -> bool:
    how = train.config.head_rows if state.whole_cols else "importance"
    return how == "random" or (how == "importance" and train.config.importance == "random")


def random_selection(state: SubnetState, generator: torch.Generator) -> Selection:
    """Rows and cols drawn without replacement, sorted; on W's device."""
    device = state.weight.device
    rows, cols = (drawn.to(device, non_blocking=True) for drawn in draw(state.shape, state.size, generator))
    return Selection(rows, cols, torch.zeros((), device=device))


def _drawn_at_once(train: TrainState, states: Sequence[SubnetState]) -> dict[SubnetState, Selection]:
    by_device: dict[torch.device, list[SubnetState]] = {}
    for state in states:
        by_device.setdefault(state.weight.device, []).append(state)
    found: dict[SubnetState, Selection] = {}
    for device, some in by_device.items():
        nothing = torch.zeros((), device=device)
        shapes, sizes = [state.shape for state in some], [state.size for state in some]
        places = draw_all(shapes, sizes, train.progress.generator, device)
        found |= {state: Selection(*place, nothing) for state, place in zip(some, places, strict=True)}
    return found


def _scored(train: TrainState, state: SubnetState) -> Choice | None:
    profile, kind = state.profile, train.config.scored_by(state.whole_cols)
    if state.whole_cols and train.config.head_rows in ("frequent", "fixed"):
        return _frequent(state)
    if profile is None or kind is None:
        return None
    if kind in BY_SUMS:
        if profile.row_sums is None or profile.col_sums is None:
            return None
        sums = (profile.row_sums, profile.col_sums)
        if state.shards is not None:
            sums = state.shards.whole_sums(*sums)
        scores = sums
        if kind == "sample":
            scores = (
                in_proportion(sums[0], train.progress.generator),
                in_proportion(sums[1], train.progress.generator),
            )
        else:
            rows, cols = (None, None) if state.visits is None else state.visits
            scores = (per_visit(sums[0], rows, state.rows), per_visit(sums[1], cols, state.cols))
        return Choice(*select_by_sums(scores, sums, (state.rows, state.cols), state.whole_cols))
    if profile.importance is None or profile.uncertainty is None:
        return None
    score = score_of(kind, profile.importance, profile.uncertainty)
    if state.shards is not None:
        return Choice(*state.shards.select(score))
    return Choice(_select(state, score), score.sum())


def _select(state: SubnetState, score: Tensor) -> Selection:
    if score.dim() == 3:
        return select_experts(score, (state.rows, state.cols))
    return select_rows(score, state.size[0]) if state.whole_cols else select_subnet(score, *state.size)


def _frequent(state: SubnetState) -> Choice | None:
    """The head's rows that were most often a label; of equals the lowest."""
    counts = state.label_counts
    if counts is None:
        return None
    rows = top(counts, state.size[0])
    return Choice(Selection(rows, state.cols.clone(), counts[rows].sum().float()), counts.sum().float())


def share_of_all(selections: Mapping[SubnetState, Selection], elements: int) -> Tensor:
    """The share, 0-dim, of ``elements`` elements of S that will be new; in few calls, where many are of one size."""
    alike: dict[tuple[int, int, torch.device], list[SubnetState]] = {}
    for state in selections:
        alike.setdefault((*_size(state), state.rows.device), []).append(state)
    shares: list[Tensor] = []
    for (rows, cols, _), states in alike.items():
        old = (_joined(rows, (s.rows for s in states)), _joined(cols, (s.cols for s in states)))
        chosen = [selections[state] for state in states]
        new = (_joined(rows, (c.rows for c in chosen)), _joined(cols, (c.cols for c in chosen)))
        shares.append(share_moved(old, new) * (old[0].shape[0] * rows * cols / elements))
    return torch.stack([share.to(shares[0].device) for share in shares]).sum()


def _size(state: SubnetState) -> tuple[int, int]:
    return state.rows.shape[-1], state.cols.shape[-1]


def _joined(length: int, indices: Iterable[Tensor]) -> Tensor:
    return torch.cat([index.reshape(-1, length) for index in indices])
