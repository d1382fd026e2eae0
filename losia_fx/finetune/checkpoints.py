"""What a run adds to a Trainer's checkpoints, so that it goes on to the bit from one that is known to be whole.

A Trainer writes checkpoint-N file by file, in place. Here a last file follows: the record of the run, the base that its
delta is told against, and the size and sum of every other file. A folder without it, or with a file that is not as it
says, was cut short or damaged: the one before is taken.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from losia_fx.api.views import controller
from losia_fx.delta.history import history_tensors, restore_history
from losia_fx.errors import ConfigError, StateError, listed
from losia_fx.storage.atomic import flush
from losia_fx.storage.tensors import read_tensors, write_tensors

from .reading import Say
from .record import Evaluation, Move, RunRecord, SelectionRecord, StepRecord
from .settings import CONFIG_FILE, FORMER, FinetuneSettings, flag, read_config

MARK = "losia_run.safetensors"
# options that may be others when a run goes on; the data is compared by its tokens
FREE = ("data", "eval_data", "old_data", "save_steps", "save_total_limit")
FREE_KINDS = ("logging_", "report_to", "run_name", "log_", "hub_", "push_to_hub")


def folders(out: Path) -> list[Path]:
    """The checkpoints of the run in ``out``, oldest first."""
    found = (path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def newest_whole(out: Path, say: Say) -> Path | None:
    """The newest checkpoint with every file as it was written; those after it are passed over with a line each."""
    for folder in reversed(folders(out)):
        fault = _fault(folder)
        if fault is None:
            return folder
        say(f"{folder}: {fault}: passed over")
    return None


def seal(folder: Path, model: nn.Module, record: RunRecord, identity: Mapping[str, Any]) -> None:
    """Writes the last file of a checkpoint, when all others are on the disk."""
    (folder / MARK).unlink(missing_ok=True)
    files = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        files[path.name] = _sum(path)
    tensors, plain = _record_parts(record)
    tensors |= {f"base.{name}": tensor for name, tensor in history_tensors(controller(model)).items()}
    write_tensors(folder / MARK, tensors, {"identity": identity, "files": files, "record": plain})


def take_up(folder: Path, model: nn.Module, record: RunRecord) -> None:
    """Fills ``record``, and the base of ``model``, with those of a checkpoint that is whole."""
    tensors, plain = read_tensors(folder / MARK)
    try:
        found = _read_record(record, plain["record"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{folder}: does not hold what a checkpoint of this model holds: {error!r}") from None
    base = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
    restore_history(controller(model), base)
    record.__dict__.update(found)


def check_finished(settings: FinetuneSettings) -> None:
    """Raises ConfigError where a run that has come to its end was asked for otherwise: it cannot go on as another."""
    path, given = settings.output_dir / CONFIG_FILE, settings.flat()
    before = {**FinetuneSettings().flat(), **({**FORMER, **read_config(path)} if path.is_file() else given)}
    differ = differences({name: before[name] for name in given if name in before}, given)
    if differ:
        raise ConfigError(
            f"--out {settings.output_dir}: holds a finished run of other settings: {listed(differ, 8)}; name another "
            "folder, or --overwrite it without --resume"
        )


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises StateError, naming each option that differs, where the checkpoint is of a run that is not this one."""
    before = read_tensors(folder / MARK)[1]["identity"]
    differ = differences({**FORMER, **before["options"]}, identity["options"])
    differ += [
        f"{n}: was {before[n]} and is {identity[n]}" for n in ("processes", "device") if before[n] != identity[n]
    ]
    if before["data"] != identity["data"]:
        differ.append("that run was trained on other text, or on text that has changed since")
    if differ:
        raise StateError(f"{folder}: a run goes on with the settings it began with: {listed(differ, 8)}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each option that is another, and must not be where a run goes on."""
    names = sorted(name for name in {*old, *new} if name not in FREE and not name.startswith(FREE_KINDS))
    return [
        f"{flag(n)} was {old.get(n, 'not given')} and is {new.get(n, 'not given')}"
        for n in names
        if old.get(n) != new.get(n)
    ]


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (folder / MARK).is_file():
        return "was cut short"
    try:
        files = read_tensors(folder / MARK)[1]["files"]
        wrong = [name for name, found in files.items() if not (folder / name).is_file() or _sum(folder / name) != found]
    except (StateError, OSError, KeyError):
        wrong = [MARK]
    return f"{listed(wrong)}: damaged or missing" if wrong else None


def _sum(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest()


def _record_parts(record: RunRecord) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, steps = {}, {}
    for name, selections in record.selections.items():
        steps[name] = [selection.step for selection in selections]
        for number, selection in enumerate(selections):
            tensors[f"selection.{number}.rows.{name}"] = selection.rows
            tensors[f"selection.{number}.cols.{name}"] = selection.cols
    rows = {key: [list(asdict(r).values()) for r in getattr(record, key)] for key in ("steps", "evaluations", "moves")}
    return tensors, {**rows, "selections": steps}


def _read_record(own: RunRecord, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if plain["selections"].keys() != own.selections.keys():
        raise ValueError("its weights are not the model's")
    return {
        "steps": [StepRecord(*row) for row in plain["steps"]],
        "evaluations": [Evaluation(*row) for row in plain["evaluations"]],
        "moves": [Move(*row) for row in plain["moves"]],
        "selections": {
            name: [
                SelectionRecord(step, *(tensors[f"selection.{number}.{part}.{name}"] for part in ("rows", "cols")))
                for number, step in enumerate(steps)
            ]
            for name, steps in plain["selections"].items()
        },
    }
