"""What a fine-tuning run writes down as it goes: the one source of its table, its plots and its run.json."""

from __future__ import annotations

import posixpath
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """An optimizer step: its number from 1, mean loss (nats a token), wall time, and the group that was profiled."""

    step: int
    loss: float
    lr: float
    seconds: float
    tokens_per_second: float
    group: int | None


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses (nats a token) after ``step`` optimizer steps."""

    step: int
    new: float
    old: float | None


@dataclass(frozen=True)
class SelectionRecord:
    """The subnet of one weight from ``step`` completed steps on; int64 indices on the CPU, copies.

    rows (r,) and cols (c,); of an expert weight rows (E, r) and cols (E, c).
    """

    step: int
    rows: Tensor
    cols: Tensor


@dataclass(frozen=True)
class Move:
    """A re-selection: the fraction of the group's subnets that is new, and the share of the importance they hold."""

    step: int
    group: int
    moved: float
    captured: float | None


@dataclass(frozen=True)
class Names:
    """What to call the new and the old domain."""

    new: str
    old: str | None


@dataclass
class RunRecord:
    """Groups are lists of weight names, ``shapes`` the dense shapes of those weights."""

    groups: Sequence[Sequence[str]]
    shapes: Mapping[str, tuple[int, ...]]
    trained_parameters: int
    all_parameters: int
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    selections: dict[str, list[SelectionRecord]] = field(default_factory=dict)
    interrupted: bool = False
    one_of: int = 1
    """Of so many moves of groups that all move at once the last is here: of the places of most nothing is known."""

    @property
    def gaps(self) -> str:
        """What a title has to add where not all moves are here."""
        return f" (on record: one move of {self.one_of})" if self.one_of > 1 else ""

    @property
    def median_step_seconds(self) -> float | None:
        """Median over the steps; compilation falls into the first ones and does not move it."""
        return statistics.median(step.seconds for step in self.steps) if self.steps else None

    def group_label(self, group: int) -> str:
        """As group_label, without "model." before it."""
        return group_label([name.removeprefix("model.") for name in self.groups[group]]) or f"group {group}"


def group_label(names: Sequence[str]) -> str:
    """What the names of a group share: "model.layers.0", or "lm_head" for a group of one; "" where it is nothing."""
    return posixpath.commonpath([name.removesuffix(".weight").replace(".", "/") for name in names]).replace("/", ".")
