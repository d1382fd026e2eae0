"""The run: every method is built and warmed up, then all take turns, a step each a round; memory comes last."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .clock import Clock, compile_time, no_collection
from .memory import measure_memory
from .methods import COMPILED, Method, Trial, is_missing
from .record import Row, set_ratios
from .sizes import Setup, Size

Report = Callable[[str], None]
"""Is told what is being done; called once a piece of work."""


@dataclass
class Entry:
    """A row of the table and what fills it. trial: None where the row is skipped."""

    row: Row
    method: Method
    trial: Trial | None = None


def entries_of(size: Size, methods: Sequence[Method], modes: Sequence[str]) -> list[Entry]:
    """A row for each method and mode that the size has."""
    entries = []
    for mode in modes:
        for method in methods:
            compiled = any(fnmatchcase(method.name, pattern) for pattern in size.compiled)
            if mode != COMPILED or compiled:
                entries.append(Entry(Row(method.name, mode, method.floor, method.note), method))
    return entries


def run(setup: Setup, entries: Sequence[Entry], clock: Clock, report: Report) -> None:
    """Fills the rows. A method that cannot run is skipped, with the reason."""
    rounds = setup.size.rounds
    for entry in entries:
        report(f"warming up {entry.row.name}")
        _warm_up(setup, entry)
    for number in range(rounds):
        with no_collection():
            for entry in entries:
                report(f"round {number + 1} of {rounds}: {entry.row.name}")
                if entry.trial is not None:
                    with entry.row.graphs.watching(warm=True):
                        entry.row.steps.append(clock(entry.trial))
    set_ratios(entry.row for entry in entries)
    for entry in entries:
        report(f"memory of {entry.row.name}")
        if entry.trial is not None:
            entry.row.memory = measure_memory(entry.trial)
            entry.trial = None
            gc.collect()


def _warm_up(setup: Setup, entry: Entry) -> None:
    """Two steps: the first compiles, the second is held against it."""
    row, package = entry.row, entry.method.needs
    if package is not None and is_missing(package):
        row.skipped = f"package {package} is not installed: pip install {package.replace('_', '-')}"
        return
    try:
        trial = entry.method.build(setup, row.mode)
        with row.graphs.watching(warm=False):
            row.compile_s = compile_time(trial.step)
    except Exception as error:  # whatever a method's own code, or a compiler at work on it, raises
        row.skipped = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return
    entry.trial = trial
    row.trained = sum(parameter.numel() for parameter in trial.trained)
