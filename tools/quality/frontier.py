"""From runs to figures: means over seeds, and what each method forgets where all have learnt the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .training import Outcome, Run

LEVELS = 8
"""At how many losses of the learnt text the methods are held against each other."""


@dataclass(frozen=True)
class Mean:
    value: float
    error: float | None
    """The standard error; None of a single value."""
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        count, value = len(values), sum(values) / len(values)
        if count == 1:
            return Mean(value, None, 1)
        spread = math.sqrt(sum((each - value) ** 2 for each in values) / (count - 1))
        return Mean(value, spread / math.sqrt(count), count)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.error is None else f" ±{self.error:.3f}")


@dataclass(frozen=True)
class Point:
    """A method at one learning rate, over its seeds."""

    method: str
    lr: float
    trained: int
    learnt: Mean
    forgotten: Mean
    seconds: Mean


Outcomes = Mapping[Run, Outcome]


def tasks(outcomes: Outcomes) -> list[tuple[str, str]]:
    """Base and text, in the order of the runs."""
    return list(dict.fromkeys((run.base, run.text) for run in outcomes))


def of_task(outcomes: Outcomes, task: tuple[str, str]) -> dict[Run, Outcome]:
    return {run: outcome for run, outcome in outcomes.items() if (run.base, run.text) == task}


def points(outcomes: Outcomes) -> list[Point]:
    """Of one task: by method in the order of the runs, then by learning rate."""
    found: dict[tuple[str, float], list[Outcome]] = {}
    for run, outcome in outcomes.items():
        found.setdefault((run.method, run.lr), []).append(outcome)
    methods = list(dict.fromkeys(method for method, _ in found))
    ordered = sorted(found.items(), key=lambda item: (methods.index(item[0][0]), item[0][1]))
    return [
        Point(
            method,
            lr,
            some[0].trained,
            *(Mean.of([getattr(each, name) for each in some]) for name in ("learnt", "forgotten", "seconds")),
        )
        for (method, lr), some in ordered
    ]


def levels(outcomes: Outcomes) -> list[float]:
    """Losses of the learnt text that two methods or more reach, most where most runs are; none where no two overlap."""
    reached: dict[str, list[float]] = {}
    for point in points(outcomes):
        reached.setdefault(point.method, []).append(point.learnt.value)
    shared = [
        value
        for value in sorted({value for values in reached.values() for value in values}, reverse=True)
        if sum(min(values) <= value <= max(values) for values in reached.values()) > 1
    ]
    if len(shared) <= LEVELS:
        return shared
    return [shared[round(number * (len(shared) - 1) / (LEVELS - 1))] for number in range(LEVELS)]


def at_level(outcomes: Outcomes, method: str, level: float) -> Mean | None:
    """What ``method`` forgets where it has learnt ``level``: between its rates, seed by seed, in a straight line.

    None where no seed reaches it.
    """
    curves: dict[int, list[tuple[float, float]]] = {}
    for run, outcome in outcomes.items():
        if run.method == method:
            curves.setdefault(run.seed, []).append((outcome.learnt, outcome.forgotten))
    found = [value for curve in curves.values() if (value := interpolated(curve, level)) is not None]
    return Mean.of(found) if found else None


def interpolated(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """The forgotten loss at the learnt loss ``level``, along the frontier of (learnt, forgotten) points."""
    best = frontier(curve)
    for (more, high), (less, low) in itertools.pairwise(best):
        if more <= level <= less:
            return high + (low - high) * (level - more) / (less - more)
    return next((forgotten for learnt, forgotten in best if learnt == level), None)


def frontier(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats on both, from the one that learnt most."""
    best: list[tuple[float, float]] = []
    for learnt, forgotten in sorted(curve):
        if not best or forgotten < best[-1][1]:
            best.append((learnt, forgotten))
    return best
