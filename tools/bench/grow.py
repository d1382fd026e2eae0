"""Step time and memory of losia along one axis of the model's size, the others as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from losia_fx.errors import LosiaError

from .catalogue import METHODS
from .clock import Clock
from .methods import chosen
from .record import Row
from .rounds import Report, entries_of, run
from .sizes import Setup, Size

BASE = Size("grow", 512, 1408, 8, 8, 4, 2048, 2, 256, rounds=5)
MEASURED = ("floor", "losia", "losia, a block profiled")
AXES: dict[str, tuple[float, ...]] = {
    "layers": (2, 4, 8),
    "width": (256, 512, 1024),
    "length": (128, 256, 512, 1024),
    "rank_factor": (1 / 16, 1 / 8, 1 / 4, 1 / 2),
}
HEAD = 64
"""The width of an attention head, at every width of the model."""


def sized(base: Size, axis: str, value: float) -> Size:
    """``base`` with another value on the axis. width: everything that the hidden size decides goes with it."""
    if axis == "rank_factor":
        return replace(base, rank_factor=value)
    whole = int(value)
    if axis == "width":
        intermediate = base.intermediate * whole // base.hidden
        return replace(base, hidden=whole, intermediate=intermediate, heads=whole // HEAD, kv_heads=whole // HEAD)
    return base.with_overrides({axis: whole})


@dataclass(frozen=True)
class Growth:
    """The rows of MEASURED at every point of the axes."""

    command: str
    base: Size
    environment: dict[str, str]
    points: Mapping[str, Mapping[float, Sequence[Row]]]

    def as_dict(self) -> dict[str, Any]:
        points = {
            axis: [{axis: value, "rows": [row.as_dict() for row in rows]} for value, rows in found.items()]
            for axis, found in self.points.items()
        }
        return {"command": self.command, "environment": self.environment, "base": vars(self.base), "points": points}


def grow(
    axes: Sequence[str], base: Size, device: torch.device, mode: str, clock: Clock, report: Report
) -> dict[str, dict[float, list[Row]]]:
    """By axis and value, the rows of MEASURED in ``mode``. Raises LosiaError where one of them cannot run."""
    found: dict[str, dict[float, list[Row]]] = {}
    for axis in axes:
        for value in AXES[axis]:
            torch.compiler.reset()  # the models of the point before are gone
            setup = Setup.of(sized(base, axis, value), device)
            entries = entries_of(setup.size, chosen(METHODS, MEASURED), [mode])
            run(setup, entries, clock, lambda what, at=f"{axis} {value:g}": report(f"{at}: {what}"))  # type: ignore[misc]
            for row in (entry.row for entry in entries if entry.row.skipped):
                raise LosiaError(f"--grow {axis}: at {value:g}: {row.name}: {row.skipped}")
            found.setdefault(axis, {})[value] = [entry.row for entry in entries]
    return found
