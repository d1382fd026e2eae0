"""A run of three groups, one with expert weights, as losia-fx finetune would have written it, but without training."""

from __future__ import annotations

from pathlib import Path

import torch

from losia_fx.finetune.record import Evaluation, Move, Names, RunRecord, SelectionRecord, StepRecord
from losia_fx.finetune.report import write_json
from losia_fx.method.subnet import draw

PERIOD, STEPS = 4, 30
SHAPES: dict[str, tuple[int, ...]] = {
    "lm_head.weight": (40, 16),
    "model.layers.0.q_proj.weight": (16, 24),
    "model.layers.0.up_proj.weight": (33, 16),
    "model.layers.1.q_proj.weight": (16, 24),
    "model.layers.1.experts.down_proj": (3, 16, 20),
}
GROUPS = [list(SHAPES)[:1], list(SHAPES)[1:3], list(SHAPES)[3:]]
NAMES = Names("new.txt", "old.txt")


def record() -> RunRecord:
    generator = torch.Generator().manual_seed(0)
    made = RunRecord(GROUPS, dict(SHAPES), 900, 3000)
    for step in range(1, STEPS + 1):
        group = (step - 1) // PERIOD % len(GROUPS)
        made.steps.append(StepRecord(step, 4 - step / 20, 1e-3 * min(1, step / 5), 0.1, 320.0, group))
    made.evaluations += [Evaluation(0, 4.0, 3.0), Evaluation(STEPS, 2.5, 3.1)]
    for group in range(len(GROUPS)):
        _select(made, group, 0, generator)
    for step in range(PERIOD, STEPS + 1, PERIOD):
        group = (step // PERIOD - 1) % len(GROUPS)
        _select(made, group, step, generator)
        made.moves.append(Move(step, group, 0.7, 0.25 + group / 10))
    return made


def _select(made: RunRecord, group: int, step: int, generator: torch.Generator) -> None:
    for name in GROUPS[group]:
        shape = SHAPES[name]
        cols = shape[-1] if name == "lm_head.weight" else 3
        rows, picked = draw(shape, (2, cols), generator)
        made.selections.setdefault(name, []).append(SelectionRecord(step, rows, picked))


def write_run(folder: Path) -> RunRecord:
    folder.mkdir(parents=True, exist_ok=True)
    made = record()
    settings = {"period": PERIOD, "steps": STEPS, "device": "cpu", "lr": 1e-3, "compiler": "eager"}
    write_json(folder / "run.json", made, NAMES, settings)
    return made
