"""What a fine-tuning run shows: the progress bar, the closing table, and run.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .bitmaps import encode
from .command import FinetuneSettings
from .record import Evaluation, RunRecord, Selection, StepRecord

LINES_WITHOUT_TERMINAL = 10


@dataclass(frozen=True)
class Names:
    """What to call the new and the old domain."""

    new: str
    old: str | None

    @staticmethod
    def of(settings: FinetuneSettings) -> Names:
        new = _listed(settings.data) if settings.data else "Python standard library"
        embedded = settings.model is None and not settings.old_data
        return Names(new, "Perl manual" if embedded else _listed(settings.old_data) if settings.old_data else None)


@contextmanager
def progress_bar(
    record: RunRecord, settings: FinetuneSettings, console: Console
) -> Iterator[Callable[[StepRecord], None]]:
    """A bar that follows the steps; where the output is no terminal, a line every tenth of the run."""
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    every = max(1, settings.steps // LINES_WITHOUT_TERMINAL)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=settings.steps, completed=len(record.steps))

        def show(step: StepRecord) -> None:
            group = "none" if step.group is None else record.group_label(step.group)
            line = f"loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s  profiling {group}  lr {step.lr:.1e}"
            progress.update(task, advance=1, description=line)
            if not console.is_terminal and step.step % every == 0:
                console.print(f"step {step.step}/{settings.steps}  {line}")

        yield show


def print_table(console: Console, record: RunRecord, names: Names, settings: FinetuneSettings, seconds: float) -> None:
    if record.evaluations:
        console.print(_loss_table(record.evaluations, names))
    cost = Table(title="What it took", show_header=False, title_justify="left")
    for label, value in _costs(record, settings, seconds):
        cost.add_row(label, value)
    console.print(cost)
    done = f"{len(record.steps)} of {settings.steps} steps"
    state = f"[yellow]interrupted after {done}: the checkpoint holds what was learnt until then[/]"
    console.print(state if record.interrupted else f"{done} done")
    delta = "delta/delta.safetensors, " if record.steps else ""
    console.print(f"written to {settings.out}: checkpoint, {delta}run.json, losses.png, subnets.png", soft_wrap=True)


def write_json(path: Path, record: RunRecord, names: Names, settings: FinetuneSettings) -> None:
    memory, memory_kind = peak_memory(str(settings.device))
    run = {
        "settings": asdict(settings),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "device": _device(settings)},
        "domains": asdict(names),
        "interrupted": record.interrupted,
        "trained_parameters": record.trained_parameters,
        "all_parameters": record.all_parameters,
        "median_step_seconds": record.median_step_seconds,
        "peak_memory_bytes": memory,
        "peak_memory_kind": memory_kind,
        "groups": [list(names) for names in record.groups],
        "evaluations": [asdict(evaluation) for evaluation in record.evaluations],
        "steps": [asdict(step) for step in record.steps],
        "history": [asdict(move) for move in record.moves],
        "shapes": {name: list(shape) for name, shape in record.shapes.items()},
        "selections": {
            name: [_selection(selection, record.shapes[name]) for selection in selections]
            for name, selections in record.selections.items()
        },
    }
    path.write_text(json.dumps(run, indent=1, default=str) + "\n", encoding="utf-8")


def _selection(selection: Selection, shape: tuple[int, ...]) -> dict[str, Any]:
    rows, cols = encode(selection.rows, shape[-2]), encode(selection.cols, shape[-1])
    return {"step": selection.step, "rows": rows, "cols": cols}


def versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("losia_fx")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed (run from a checkout)"
    return {
        "losia_fx": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def peak_memory(device: str) -> tuple[int | None, str]:
    """Peak memory in bytes and what was measured; None where the platform does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA tensors"
    if sys.platform == "win32":
        return None, "not measured on Windows"
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident memory of the process"


def _loss_table(evaluations: Sequence[Evaluation], names: Names) -> Table:
    before, after = evaluations[0], evaluations[-1]
    table = Table(title="Held-out loss (nats a token)", title_justify="left")
    table.add_column("text")
    for heading in ("before", f"after {after.step} steps", "change"):
        table.add_column(heading, justify="right")
    _loss_row(table, f"new: {names.new}", before.new, after.new)
    if before.old is not None and after.old is not None:
        _loss_row(table, f"old: {names.old}", before.old, after.old)
    return table


def _loss_row(table: Table, label: str, before: float, after: float) -> None:
    colour = "green" if after < before else "red"
    table.add_row(label, f"{before:.3f}", f"{after:.3f}", f"[{colour}]{after - before:+.3f}[/]")


def _costs(record: RunRecord, settings: FinetuneSettings, seconds: float) -> Iterator[tuple[str, str]]:
    share = record.trained_parameters / record.all_parameters
    yield "trained parameters", f"{record.trained_parameters:,} of {record.all_parameters:,} ({share:.1%})"
    if record.median_step_seconds is not None:
        yield "time per step", f"{record.median_step_seconds * 1000:.0f} ms (median; compilation left out)"
    memory, kind = peak_memory(str(settings.device))
    yield "peak memory", kind if memory is None else f"{memory / 2**20:,.0f} MiB ({kind})"
    yield "re-selections", f"{len(record.moves)} over {len(record.groups)} groups, in slots of {settings.period} steps"
    yield "wall time", f"{seconds:.0f} s in all"


def _device(settings: FinetuneSettings) -> str:
    device = torch.device(str(settings.device))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _listed(paths: Sequence[Path]) -> str:
    return paths[0].name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
