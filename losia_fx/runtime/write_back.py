"""S on its way to W: rewarmed after a re-selection, and written to W[rows, cols]."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from losia_fx.config import LosiaConfig
from losia_fx.method import kernels
from losia_fx.method.schedule import rewarm_factor
from losia_fx.method.subnet import PlacedBlock

from . import sharding
from .quantised_weight import put_block
from .state import SubnetState


class WriteBack:
    """W[rows, cols] = S, and the rows of what W is packed in, for subnets of one model."""

    def __init__(self, compiled: bool) -> None:
        """compiled: blocks that are worth it, each at a time; those of one kind share their compiled form."""
        self._compiled = compiled
        self._divided: _Divided | None = None
        self._last: _SmallBlocks | None = None

    @torch.no_grad()
    def __call__(self, states: Sequence[SubnetState]) -> None:
        if states and states[0].shards is not None:
            sharding.write_back(states)
            return
        packed = [state for state in states if state.packed is not None and state.packed.is_of(state.weight)]
        stored = [state for state in states if state.packed is not None and state.stored is not None]
        for state in stored:  # uncompiled: to the bit what agreement.py compares with
            state.write_back()
        self._write([state for state in states if state.stored is None] if stored else states)
        for block in _blocks(packed):  # of what W is packed in otherwise, all is made anew at the next use
            _pack_rows(block, self._compiled)

    def _write(self, states: Sequence[SubnetState]) -> None:
        if self._compiled:
            if self._divided is None or not _same(states, self._divided.states):
                self._divided = _Divided(states)
            for block in self._divided.compiled:
                kernels.write_back(*zip(*(state.written() for state in block), strict=True))
            states = self._divided.rest
        if self._last is not None and self._last.are_of(states):
            self._last.write()
        else:
            for state in states:
                state.write_back()
            self._last = _SmallBlocks(states)


class _Divided:
    """Subnets by how they are written: blocks that are worth compiling, and all others."""

    def __init__(self, states: Sequence[SubnetState]) -> None:
        self.states = list(states)
        self.compiled: list[list[SubnetState]] = []
        self.rest: list[SubnetState] = []
        for block in _blocks(states):
            if kernels.worth_compiling([state.weight for state in block]):
                self.compiled.append(block)
            else:
                self.rest += block


def _same(states: Sequence[SubnetState], others: Sequence[SubnetState]) -> bool:
    return len(states) == len(others) and all(map(is_, states, others))


class _SmallBlocks:
    """What many subnets have written last: looked at in a few calls for all, and written again where nothing moved."""

    def __init__(self, states: Sequence[SubnetState]) -> None:
        self._states = list(states)
        placed = {state: placed for state in states if (placed := state.writer.placed) is not None}
        self._placed: list[PlacedBlock] = list(placed.values())
        self._others = [state for state in states if state not in placed]
        """Large ones, and those that have just moved: each sees to itself."""
        parameters = [state.owner._parameters for state in placed]
        buffers = [state.owner._buffers for state in placed]
        self._homes: list[dict[str, Any]] = [*parameters, *parameters, *buffers, *buffers]
        self._keys = [getattr(state, key) for key in _KEYS for state in placed]
        self._tensors = self._now()
        self._marks = self._marks_of(self._tensors)

    def are_of(self, states: Sequence[SubnetState]) -> bool:
        """Whether these are the subnets, with the same tensors, where they were, and the same rows and cols, and no
        more of them can be written so."""
        if not _same(states, self._states):
            return False
        if any(state.writer.placed is not None for state in self._others):
            return False
        now = self._now()
        return all(map(is_, now, self._tensors)) and self._marks_of(now) == self._marks

    def write(self) -> None:
        for placed in self._placed:
            placed.write()
        for state in self._others:
            state.write_back()

    def _now(self) -> list[Any]:
        return list(map(dict.get, self._homes, self._keys))

    def _marks_of(self, tensors: Sequence[Tensor]) -> list[int]:
        half = len(tensors) // 2
        matrices, indices = tensors[:half], tensors[half:]
        return [*map(Tensor.data_ptr, matrices), *map(Tensor.is_contiguous, matrices), *map(_version, indices)]


_version = attrgetter("_version")
_KEYS = ("parameter", "values_name", "rows_name", "cols_name")


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
