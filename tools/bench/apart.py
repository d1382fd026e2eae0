"""Each method in a process of its own, with its floor beside it: for models of which a machine holds one at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .catalogue import METHODS
from .clock import StepTime, clock_of
from .graphs import GraphCounts
from .memory import Memory
from .methods import Method, chosen
from .record import Row, write_json
from .rounds import Entry, Report, entries_of, run
from .sizes import Setup, Size

CODE = "import sys; from losia_fx.tools.bench.apart import measure_one; measure_one(*sys.argv[1:])"


def run_apart(
    size: Size, device: torch.device, methods: Sequence[Method], entries: Sequence[Entry], report: Report
) -> list[Row]:
    """The rows of ``entries``, measured. A floor's is that of the first process that measures it.

    A process that dies (of memory, say) costs its method's rows alone.
    """
    modes = list(dict.fromkeys(entry.row.mode for entry in entries))
    found: dict[tuple[str, str], Row] = {}
    for method in sorted(methods, key=lambda each: each.name == each.floor):  # floors alone only if nobody brought them
        wanted = [entry.row for entry in entries if entry.method is method]
        if all((row.method, row.mode) in found for row in wanted):
            continue
        report(f"a process for {method.name}")
        for row in _measured(size, device, method, modes, wanted):
            found.setdefault((row.method, row.mode), row)
    return [found[entry.row.method, entry.row.mode] for entry in entries]


def _measured(
    size: Size, device: torch.device, method: Method, modes: Sequence[str], wanted: Sequence[Row]
) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        job = {"size": asdict(size), "device": str(device), "method": method.name, "modes": modes}
        command = [sys.executable, "-c", CODE, json.dumps(job), str(answer)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if answer.is_file():
            return [row_of(row) for row in json.loads(answer.read_text())]
    for row in wanted:
        row.skipped = f"its process ended with {done.returncode}: {' '.join(done.stderr.split())[-200:]}"
    return list(wanted)


def measure_one(job: str, answer: str) -> None:
    """What a process does: one method and its floor. job: JSON of a size, a device, a method's name and modes."""
    given = json.loads(job)
    torch.set_num_threads(1)
    setup = Setup.of(Size(**given["size"]), torch.device(given["device"]))
    entries = entries_of(setup.size, chosen(METHODS, [given["method"]]), given["modes"])
    run(setup, entries, clock_of(torch.device(given["device"])), _silent)
    write_json(Path(answer), [entry.row.as_dict() for entry in entries])


def _silent(_: str) -> None:
    """Progress is told a process at a time."""


def row_of(found: dict[str, Any]) -> Row:
    """The Row that as_dict() was called on."""
    fields = {name: value for name, value in found.items() if name in Row.__dataclass_fields__}
    fields["steps"] = [StepTime(**step) for step in found["steps"]]
    fields["graphs"] = GraphCounts(**found["graphs"])
    fields["memory"] = None if found["memory"] is None else Memory(**found["memory"])
    return Row(**fields)
