"""A run that ``losia-fx finetune`` wrote, read back from the run.json of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaError
from losia_fx.finetune.bitmaps import decode
from losia_fx.finetune.record import Evaluation, Move, RunRecord, SelectionRecord, StepRecord
from losia_fx.method.schedule import recorded_moves

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Run:
    """The record of a run, what it was asked to do (the settings of ``losia-fx finetune``), and its texts' names."""

    folder: Path
    record: RunRecord
    settings: Mapping[str, Any]
    new: str
    old: str | None

    @property
    def config(self) -> LosiaConfig:
        return LosiaConfig.of(None, losia_settings(self.settings))


def losia_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of LosiaConfig that say how a run trained, as far as it says them."""
    names = {option.name for option in fields(LosiaConfig)} - {"compiler", "track_delta"}
    return {name: value for name, value in settings.items() if name in names}


def is_run(path: Path) -> bool:
    return (path / RUN_FILE).is_file()


def read_run(folder: Path) -> Run:
    """Raises LosiaError where the folder or its run.json is missing, or the file is none that finetune wrote."""
    path = folder / RUN_FILE
    if not folder.is_dir():
        raise LosiaError(f"{folder}: is no folder; give one that losia-fx finetune wrote (--out)")
    if not path.is_file():
        raise LosiaError(f"{folder}: has no {RUN_FILE}, so losia-fx finetune did not write it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Run(folder, _record(content), dict(content["settings"]), **content["domains"])
    except KeyError as error:
        raise LosiaError(f"{path}: lacks {error}: was it written by an earlier version? Run finetune again") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise LosiaError(f"{path}: cannot be read as the record of a run: {error}") from None


def _record(content: dict[str, Any]) -> RunRecord:
    shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
    return RunRecord(
        groups=content["groups"],
        shapes=shapes,
        trained_parameters=content["trained_parameters"],
        all_parameters=content["all_parameters"],
        steps=[StepRecord(**step) for step in content["steps"]],
        evaluations=[Evaluation(**evaluation) for evaluation in content["evaluations"]],
        moves=[Move(**move) for move in content["history"]],
        selections={
            name: [_selection(selection, shapes[name]) for selection in selections]
            for name, selections in content["selections"].items()
        },
        interrupted=content["interrupted"],
        one_of=recorded_moves(LosiaConfig.of(None, losia_settings(content["settings"]))),
    )


def _selection(stored: dict[str, Any], shape: tuple[int, ...]) -> SelectionRecord:
    experts = shape[0] if len(shape) == 3 else None
    rows, cols = decode(stored["rows"], shape[-2], experts), decode(stored["cols"], shape[-1], experts)
    return SelectionRecord(int(stored["step"]), rows, cols)
