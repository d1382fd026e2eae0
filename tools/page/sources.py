"""Where a page's data comes from: a model by itself, or a run with the checkpoint that it left."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import losia_fx
from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaError, LosiaWarning
from losia_fx.finetune.record import SelectionRecord

from ..forecast.explanation import explain
from ..forecast.resize import resize
from ..graphs.capture import capture
from ..load_model import load_model
from ..plot.run_folder import losia_settings, read_run
from .data import page_data

StepSize = tuple[int | None, int | None]
"""Batch size and length of the step that is captured; None leaves either as it is."""


def of_model(name: str | None, config: LosiaConfig, step: StepSize, steps: int) -> dict[str, Any]:
    """Raises what load_model(), transform() and capture() raise."""
    loaded = load_model(name)
    example = resize(loaded.example, *step)
    captured = capture(loaded.model, example, config)
    found = explain(loaded.model, captured, example, steps)
    title = Path(loaded.name).name or loaded.name
    return page_data(title, loaded.model, captured, found, first_selections(loaded.model, config), ())


def of_run(folder: Path, config: LosiaConfig, step: StepSize, steps: int | None) -> dict[str, Any]:
    """The run's own settings go before ``config``. Raises LosiaError where run.json and checkpoint do not agree."""
    run = read_run(folder)
    settings = run.settings
    config = replace(config, **losia_settings(settings))
    batch_size, length = (
        given or settings.get(name) for given, name in zip(step, ("batch_size", "seq_length"), strict=True)
    )
    loaded = load_model(str(folder))
    example = resize(loaded.example, batch_size, length)
    captured = capture(loaded.model, example, config)
    found = explain(loaded.model, captured, example, steps or max(1, len(run.record.steps)))
    here = {weight.name: weight.shape for weight in found.facts.weights}
    if here != dict(run.record.shapes):
        raise LosiaError(f"{folder}: its run.json is of another model than its checkpoint")
    title = folder.name + run.record.gaps
    return page_data(title, loaded.model, captured, found, run.record.selections, run.record.moves)


def first_selections(model: nn.Module, config: LosiaConfig) -> dict[str, list[SelectionRecord]]:
    """The subnets that transform() draws. The model is left as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LosiaWarning)
        losia_fx.transform(model, config)
    found = {
        name: [SelectionRecord(0, subnet.rows.clone(), subnet.cols.clone())]
        for name, subnet in losia_fx.subnets(model).items()
    }
    losia_fx.restore(model)
    return found
