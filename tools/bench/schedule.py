"""What of losia does not show in a step: graphs while the subnets move, and what moving them takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

import losia_fx
from losia_fx.config import subnet_size
from losia_fx.method.importance import score_of
from losia_fx.method.selection import select_subnet

from ..forecast import slots
from .clock import Clock, elapsed_ms
from .floors import checkpointed
from .graphs import GraphCounts
from .losia_methods import build_profiled, transformed, trial_of
from .methods import COMPILED, nothing
from .record import RoundsOfSchedule, Row
from .sizes import Setup

PERIOD = 2
REPEATS = 3
LARGEST = (4096, 11008)
"""The largest weight of a block of LLaMA-2-7B."""
WATCHED: dict[str, Callable[[Any], Any]] = {"losia": lambda model: model, "losia, checkpointed": checkpointed}
"""The methods whose graphs are counted over whole rounds, and what becomes of the model first."""


def watched(rows: Sequence[Row]) -> list[str]:
    """Those of WATCHED that were measured compiled."""
    return [row.method for row in rows if row.steps and row.mode == COMPILED and row.method in WATCHED]


def over_rounds(setup: Setup, method: str, mode: str) -> RoundsOfSchedule:
    """Two rounds in which a group is profiled two steps and then moves, the controller left alone."""
    model = WATCHED[method](setup.model())
    trial = trial_of(setup, transformed(setup, mode, model, period=PERIOD))
    controller = losia_fx.controller(trial.model)
    counts = GraphCounts()
    steps = 2 * PERIOD * len(controller.groups)
    for number in range(steps):
        with counts.watching(warm=number > 0):
            trial.step()
    return RoundsOfSchedule(method, steps, len(controller.history), counts)


def reselection_ms(setup: Setup, mode: str, clock: Clock) -> dict[str, float]:
    """What the optimizer's part of the step that re-selects takes longer than that of a step that only profiles.

    By group: one of a block, and the head's. Medians of some tries.
    """
    trial = build_profiled(setup, mode)
    trial.prepare = nothing
    controller = losia_fx.controller(trial.model)
    period = controller.config.period
    found = {}
    for name, group in (("a block's group", len(controller.groups) // 2), ("the head", 0)):
        extra = []
        for _ in range(REPEATS):
            slots.open_slot(controller, group)
            trial.step()
            profiled = clock(trial).optimizer_ms
            controller.step = (group + 1) * period - 1
            extra.append(clock(trial).optimizer_ms - profiled)
        found[name] = statistics.median(extra)
    return found


def selection_ms(device: torch.device, rank_factor: float) -> float:
    """From I and U of a weight of the shape LARGEST to its subnet: the score and the three candidates. A median."""
    importance, uncertainty = torch.rand((2, *LARGEST), device=device)
    rows, cols = (subnet_size(rank_factor, size) for size in LARGEST)

    def select() -> None:
        select_subnet(score_of("mixed", importance, uncertainty), rows, cols)

    return statistics.median(elapsed_ms(device, select) for _ in range(REPEATS))
