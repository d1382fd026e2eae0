"""What the HTML page shows, as plain values for JSON: blocks, layers, graphs before and after, subnets, forecasts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from losia_fx.api.report import WeightReport
from losia_fx.config import LosiaConfig
from losia_fx.finetune.bitmaps import encode
from losia_fx.finetune.plots import coverage_of
from losia_fx.finetune.record import Move, SelectionRecord
from losia_fx.model.blocks import block_of, find_blocks

from ..forecast.estimate import PARTS, MethodCost, RoundFit, StepFacts, full_fine_tuning, lora, losia
from ..forecast.explanation import Explanation, round_text
from ..forecast.step_cost import WeightUse
from ..graphs.capture import Captured
from ..graphs.layer_nodes import before_and_after
from ..plot.overlap import jaccard

RANK_FACTORS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
PERIODS = (10, 20, 50, 100, 200)
RANKS = (8, 16, 64)

Selections = Mapping[str, Sequence[SelectionRecord]]


def page_data(
    title: str, model: nn.Module, captured: Captured, found: Explanation, selections: Selections, moves: Sequence[Move]
) -> dict[str, Any]:
    """model: the plain one; found: of the same model and step, with the steps of a run in found.fit.

    selections: of every weight with a subnet, the first at step 0. moves: the re-selections, empty before a run.
    """
    facts, totals = found.facts, found.report.totals()
    assert found.fit.steps is not None
    return {
        "title": title,
        "model": captured.model,
        "steps": found.fit.steps,
        "moved": bool(moves),
        "config": asdict(facts.config),
        "inputs": {name: list(shape) for name, shape in found.inputs.items()},
        "totals": {**totals, "all": sum(totals.values())},
        "notes": list(found.report.notes),
        "round": round_text(found.fit, facts),
        "blocks": _blocks(model, captured, found, selections, moves),
        "parts": PARTS,
        "methods": [{**_method(method), "note": note} for method, note in methods(facts)],
        "periods": [_period(found, period) for period in sorted({*PERIODS, facts.config.period})],
    }


def methods(facts: StepFacts) -> Iterator[tuple[MethodCost, str]]:
    """LoSiA at several rank factors, full fine-tuning and LoRA, each with what is special about it."""
    own = facts.config.rank_factor
    for factor in sorted({*RANK_FACTORS, own}):
        name = f"LoSiA p = {_fraction(factor)}"
        yield (
            replace(losia(facts.at(replace(facts.config, rank_factor=factor))), name=name),
            ("as here" if factor == own else ""),
        )
    yield full_fine_tuning(facts), "the same weights"
    for rank in RANKS:
        yield lora(facts, rank), "on the same weights"


def _fraction(factor: float) -> str:
    return f"1/{round(1 / factor)}" if math.isclose(1 / factor, round(1 / factor)) else f"{factor:g}"


def _method(method: MethodCost) -> dict[str, Any]:
    return {**asdict(method), "bytes": method.bytes, "all_flops": method.all_flops}


def _period(found: Explanation, period: int) -> dict[str, Any]:
    config = LosiaConfig.of(found.facts.config, {"period": period, "profile_steps": None})
    fit = RoundFit.of(config, len(found.facts.groups), found.fit.steps)
    assert fit.steps is not None
    here = period == found.facts.config.period
    return {"period": period, "round": fit.round_steps, "rounds": fit.steps / fit.round_steps, "here": here}


def _blocks(
    model: nn.Module, captured: Captured, found: Explanation, selections: Selections, moves: Sequence[Move]
) -> list[dict[str, Any]]:
    """The matrices of the model in its own order, those of a block together; vectors are in no graph of interest."""
    nodes, names = before_and_after(captured), find_blocks(model)
    blocks: list[dict[str, Any]] = []
    for weight in found.report.weights:
        if len(weight.shape) < 2:
            continue
        block = block_of(weight.name, names)
        label = block or weight.name.removesuffix(".weight")
        if not blocks or block is None or blocks[-1]["label"] != label:
            blocks.append({"label": label, "block": block is not None, "layers": []})
        uses = [use for use in found.facts.uses if use.weight == weight.name]
        before, after = nodes.get(weight.name, ([], []))
        blocks[-1]["layers"].append(
            {
                **asdict(weight),
                "label": weight.name.removesuffix(".weight").rpartition(".")[2],
                "before": before,
                "after": after,
                "cost": _cost(weight, uses, found.facts),
                "selections": _selections(weight, selections.get(weight.name, ()), moves),
            }
        )
    return blocks


def _cost(weight: WeightReport, uses: Sequence[WeightUse], facts: StepFacts) -> dict[str, int] | None:
    if weight.subnet is None or not uses:
        return None
    plan = next(known for known in facts.weights if known.name == weight.name)
    one = replace(facts, weights=(plan,), uses=tuple(uses), full=(), groups=(), tapped={})
    ours = losia(replace(one, config=LosiaConfig.of(facts.config, {"schedule": "static"})))
    whole = sum(use.tokens * use.inner * use.itemsize for use in uses)
    kept = sum(use.tokens * _columns(use, weight) * use.itemsize for use in uses)
    return {
        "forward": ours.flops["forward"],
        "full": ours.flops["forward"],
        "subnet": ours.flops["weight gradients"],
        "whole_x": whole,
        "kept_x": kept,
    }


def _columns(use: WeightUse, weight: WeightReport) -> int:
    """Of x's features, how many the subnet keeps: its cols, or its rows where the weight is stored transposed."""
    assert weight.subnet is not None
    return weight.subnet[-1] if use.inner == weight.shape[-1] else weight.subnet[-2]


def _selections(weight: WeightReport, some: Sequence[SelectionRecord], moves: Sequence[Move]) -> list[dict[str, Any]]:
    by_step = {move.step: move for move in moves if move.group == weight.group}
    shares = coverage_of(some, weight.shape)
    made = []
    for number, selection in enumerate(some):
        move = by_step.get(selection.step)
        made.append(
            {
                "step": selection.step,
                "rows": encode(selection.rows, weight.shape[-2]),
                "cols": encode(selection.cols, weight.shape[-1]),
                "jaccard": None if number == 0 else jaccard(some[number - 1], selection),
                "captured": None if move is None else move.captured,
                "reached": shares[number],
            }
        )
    return made
