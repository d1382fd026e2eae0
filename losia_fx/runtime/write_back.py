"""S on its way to W: rewarmed after a re-selection, and written to W[rows, cols]."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from losia_fx.config import LosiaConfig
from losia_fx.method import kernels
from losia_fx.method.schedule import rewarm_factor

from . import sharding
from .quantised_weight import put_block
from .state import SubnetState


@torch.no_grad()
def write_back(states: Sequence[SubnetState], compiled: bool) -> None:
    """W[rows, cols] = S, and the rows of what W is packed in. compiled: a block at a time, where large blocks of one
    kind share their compiled form."""
    if states and states[0].shards is not None:
        sharding.write_back(states)
        return
    packed = [state for state in states if state.packed is not None and state.packed.is_of(state.weight)]
    dense = []
    for state in states:
        if state.stored is None:
            dense.append(state)
        else:  # uncompiled: to the bit what agreement.py compares with
            state.write_back()
    if compiled:
        for block in _blocks(dense):
            kernels.write_back(*zip(*(state.written() for state in block), strict=True))
    else:
        for state in dense:
            state.write_back()
    for block in _blocks(packed):  # of what W is packed in otherwise, all is made anew at the next use
        _pack_rows(block, compiled)


def _blocks(states: Sequence[SubnetState]) -> Iterator[list[SubnetState]]:
    return (list(block) for _, block in itertools.groupby(states, key=lambda state: (state.group, state.whole_cols)))


def _pack_rows(states: Sequence[SubnetState], compiled: bool) -> None:
    """Of what these W are packed in, the rows that a write-back has changed."""
    weights, rows = [state.weight for state in states], [state.rows for state in states]
    held = [packed for state in states if (packed := state.packed) is not None]
    numbers, scales = zip(*(packed.tensors for packed in held), strict=True)
    kernels.pack_rows(weights, rows, numbers, scales, held[0].kind, compiled)
    for packed, weight in zip(held, weights, strict=True):
        packed.note(weight)


@torch.no_grad()
def undo_write_back(state: SubnetState, before: Tensor, version: int) -> None:
    """W as it was before the step (``before``: S then), where forwards within the step (SAM's second) have seen it
    moved: ``version``, W's own then, is no longer its version."""
    if state.weight_here._version == version:
        return
    if state.shards is not None:
        sharding.write_back([state], [before])
    else:
        put_block(state.weight, state.rows, state.picked_cols, before)


def rewarm_share(state: SubnetState, config: LosiaConfig, step: int) -> float:
    """The share of optimizer step ``step`` (0 is the first) that counts."""
    return 1.0 if state.rewarm_from is None else rewarm_factor(config, step - state.rewarm_from + 1)


@torch.no_grad()
def rewarm(values: Tensor, before: Tensor, share: float) -> None:
    """S = before + share * (S - before), in place."""
    values.copy_(before + share * (values - before))
