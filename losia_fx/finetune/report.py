"""What a fine-tuning run shows: the progress bar, the closing table, and run.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from losia_fx.console import say

from .bitmaps import encode
from .record import Evaluation, Names, RunRecord, SelectionRecord, StepRecord
from .settings import CONFIG_FILE


def step_line(record: RunRecord, step: StepRecord) -> str:
    """What a step came to: its loss, its speed, what LoSiA is doing, and what the last re-selection gave."""
    group = "none" if step.group is None else record.group_label(step.group)
    line = f"loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s  profiling {group}  lr {step.lr:.1e}"
    if not record.moves:
        return line
    move = record.moves[-1]
    holds = "" if move.captured is None else f", holding {move.captured:.0%} of the importance"
    return f"{line}  last re-selected {record.group_label(move.group)} ({move.moved:.0%} new{holds})"


def print_table(
    console: Console, record: RunRecord, names: Names, settings: Mapping[str, Any], out: Path, seconds: float
) -> None:
    if record.evaluations:
        console.print(_loss_table(record.evaluations, names))
    cost = Table(title="What it took", show_header=False, title_justify="left")
    for label, value in _costs(record, settings, seconds):
        cost.add_row(label, value)
    console.print(cost)
    done = f"{len(record.steps)} of {settings['steps']} steps"
    state = f"[yellow]interrupted after {done}: the checkpoint holds what was learnt until then[/]"
    console.print(state if record.interrupted else f"{done} done")
    delta = "delta/delta.safetensors, " if record.steps and settings["track_delta"] else ""
    say(console, f"written to {out}: checkpoint, {delta}run.json, {CONFIG_FILE}, losses.png, subnets.png")


def write_json(path: Path, record: RunRecord, names: Names, settings: Mapping[str, Any]) -> None:
    """settings: what the run did, under short names: at least device, steps, period, rank_factor, seed, lr, batch_size
    and seq_length."""
    memory, memory_kind = peak_memory(str(settings["device"]))
    run = {
        "settings": dict(settings),
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


def _selection(selection: SelectionRecord, shape: tuple[int, ...]) -> dict[str, Any]:
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
        "trl": importlib.metadata.version("trl"),
        "datasets": importlib.metadata.version("datasets"),
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


def _costs(record: RunRecord, settings: Mapping[str, Any], seconds: float) -> Iterator[tuple[str, str]]:
    share = record.trained_parameters / record.all_parameters
    yield "trained parameters", f"{record.trained_parameters:,} of {record.all_parameters:,} ({share:.1%})"
    if record.median_step_seconds is not None:
        yield "time per step", f"{record.median_step_seconds * 1000:.0f} ms (median; compilation left out)"
    memory, kind = peak_memory(str(settings["device"]))
    yield "peak memory", kind if memory is None else f"{memory / 2**20:,.0f} MiB ({kind})"
    yield (
        "re-selections",
        _moves(record, settings),
    )
    yield "wall time", f"{seconds:.0f} s in all"


def _moves(record: RunRecord, settings: Mapping[str, Any]) -> str:
    """Of groups that all move at once the record has some rounds alone, so how many there were is not counted by it.
    A head with a period of its own has moved in fewer, or in none."""
    period = settings["period"]
    slots = f"in slots of {period} steps"
    if settings.get("schedule") == "all":
        who = "all groups but the head" if settings.get("head_period") else "all groups"
        return f"{len(record.steps) // period}, {who} at once, {'one a step' if period == 1 else slots}"
    return f"{len(record.moves)} over {len(record.groups)} groups, {slots}"


def _device(settings: Mapping[str, Any]) -> str:
    device = torch.device(str(settings["device"]))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
