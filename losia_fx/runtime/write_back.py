"""S on its way to W: rewarmed after a re-selection, and written to W[rows, cols]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from losia_fx.config import LosiaConfig
from losia_fx.method import kernels
from losia_fx.method.schedule import rewarm_factor
from losia_fx.method.subnet import scatter

from . import sharding
from .state import SubnetState


@torch.no_grad()
def write_back(states: Sequence[SubnetState], compiled: bool) -> None:
    """W[rows, cols] = S. compiled: a block at a time, where large blocks of one kind share their compiled form."""
    if states and states[0].shards is not None:
        sharding.write_back(states)
        return
    if not compiled:
        for state in states:
            state.write_back()
        return
    for _, block in itertools.groupby(states, key=lambda state: (state.group, state.whole_cols)):
        kernels.write_back(*zip(*(state.written() for state in block), strict=True))


@torch.no_grad()
def undo_write_back(state: SubnetState, before: Tensor, version: int) -> None:
    """W as it was before the step (``before``: S then), where forwards within the step (SAM's second) have seen it
    moved: ``version``, W's own then, is no longer its version."""
    if state.weight_here._version == version:
        return
    if state.shards is not None:
        sharding.write_back([state], [before])
    else:
        scatter(state.weight, state.rows, state.picked_cols, before.to(state.weight.dtype))


def rewarm_share(state: SubnetState, config: LosiaConfig, step: int) -> float:
    """The share of optimizer step ``step`` (0 is the first) that counts."""
    return 1.0 if state.rewarm_from is None else rewarm_factor(config, step - state.rewarm_from + 1)


@torch.no_grad()
def rewarm(values: Tensor, before: Tensor, share: float) -> None:
    """S = before + share * (S - before), in place."""
    values.copy_(before + share * (values - before))
