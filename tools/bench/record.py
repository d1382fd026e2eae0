"""What a run leaves: a row a method and mode, and the environment; as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from losia_fx.storage.atomic import write_file

from .clock import CPU_CLOCK, CUDA_CLOCK, StepTime
from .graphs import GraphCounts
from .memory import CPU_TRACKER, CUDA_TRACKER, Memory
from .sizes import Size

PACKAGES = ("transformers", "peft", "galore-torch")


@dataclass(frozen=True)
class Spread:
    """Of several measurements of the same thing."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Row:
    """One method in one mode. skipped: why it was not measured; "" where it was."""

    method: str
    mode: str
    floor: str
    note: str
    skipped: str = ""
    steps: list[StepTime] = field(default_factory=list)
    """One a round."""
    ratios: list[float] = field(default_factory=list)
    """One a round: the step over that of the floor of the same mode, in the same round."""
    trained: int = 0
    """Parameters."""
    graphs: GraphCounts = field(default_factory=GraphCounts)
    compile_s: float = 0.0
    """Wall time of the first step less that of the second, with a compiler cache that was empty when the run began."""
    memory: Memory | None = None

    @property
    def name(self) -> str:
        return f"{self.method} ({self.mode})"

    @property
    def step(self) -> Spread:
        return Spread.of([each.step_ms for each in self.steps])

    @property
    def ratio(self) -> Spread:
        return Spread.of(self.ratios)

    def part(self, name: str) -> float:
        """Median of "forward_ms", "backward_ms" or "optimizer_ms"."""
        return float(statistics.median(getattr(each, name) for each in self.steps))

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        if self.steps:
            found |= {"step_ms": asdict(self.step)}
        if self.ratios:
            found |= {"ratio": asdict(self.ratio)}
        return found


def set_ratios(rows: Iterable[Row]) -> None:
    """Holds every row against the row of its floor and mode, round by round."""
    measured = {(row.method, row.mode): row for row in rows if row.steps}
    for row in measured.values():
        floor = measured.get((row.floor, row.mode))
        if floor is not None:
            pairs = zip(row.steps, floor.steps, strict=True)
            row.ratios = [mine.step_ms / its.step_ms for mine, its in pairs]


@dataclass
class RoundsOfSchedule:
    """Graphs over whole rounds of the schedule, with the subnets moving by themselves every second step."""

    method: str
    steps: int
    moves: int
    """Re-selections that happened."""
    graphs: GraphCounts


@dataclass
class Bench:
    """A run of the bench."""

    command: str
    size: Size
    device: str
    """"cpu" or "cuda": decides what times and memory are measured with."""
    rows: list[Row]
    environment: dict[str, str]
    rounds_of_schedule: list[RoundsOfSchedule] = field(default_factory=list)
    reselection_ms: dict[str, float] = field(default_factory=dict)
    """By group, what the step that re-selects takes longer than another profiled one; and of one weight by itself."""
    import_s: dict[str, float] = field(default_factory=dict)
    warm_start_s: list[float] = field(default_factory=list)

    @property
    def clock(self) -> str:
        return CUDA_CLOCK if self.device == "cuda" else CPU_CLOCK

    @property
    def tracker(self) -> str:
        """What sees the memory."""
        return CUDA_TRACKER if self.device == "cuda" else CPU_TRACKER

    def as_dict(self) -> dict[str, Any]:
        said = {"clock": self.clock, "tracker": self.tracker}
        return {**asdict(self), **said, "rows": [row.as_dict() for row in self.rows]}


def environment(device: torch.device) -> dict[str, str]:
    found = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build, which the package's own version may leave out
        **({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """The model of the CPU, and how many there are."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name or platform.machine()}, {os.cpu_count()} cores"


def write_json(path: Path, found: Any) -> None:
    write_text(path, json.dumps(found, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    def write(draft: Path) -> None:
        draft.write_text(text)

    write_file(path, write)
