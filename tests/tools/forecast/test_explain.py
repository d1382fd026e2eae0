"""losia-fx explain: its forecast against what a real step holds, and its arithmetic against sums done by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import losia_fx
from losia_fx.cli import main
from losia_fx.config import LosiaConfig
from losia_fx.method.visits import expected_bytes
from losia_fx.tools import explain
from losia_fx.tools.forecast.estimate import (
    PARTS,
    RoundFit,
    StepFacts,
    full_fine_tuning,
    lora,
    losia,
    profiled_group,
)
from losia_fx.tools.forecast.measure import measure
from losia_fx.tools.forecast.resize import resize
from losia_fx.tools.graphs.capture import capture
from losia_fx.tools.load_model import Example, load_model
from tests.support import tiny

MODELS = [f"tests.support.tiny:{name}" for name in tiny.SEVERAL]


def explained(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["explain", *argv, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("model", [*MODELS, pytest.param(None, marks=pytest.mark.slow)])
def test_the_forecast_is_what_a_step_holds(model: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [model, "--measure"] if model else ["--measure", "--batch-size", "3", "--seq-length", "24"]
    found = explained(capsys, *argv)
    forecast, measured = found["forecast"], found["measured"]
    assert set(forecast) == set(measured) == set(PARTS)
    for part in PARTS:
        assert forecast[part] == pytest.approx(measured[part], rel=0.1), part
    assert forecast["activations"] > 0
    assert forecast["profile"] > 0
    if model is None:
        assert found["inputs"]["input_ids"] == [3, 24]
        assert [group["label"] for group in found["groups"]] == ["lm_head", *(f"model.layers.{n}" for n in range(4))]


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_alone_is_profiled_is_measured_where_it_is(tied: bool) -> None:
    """At its own pace, at the end of its slot; of a head that stays as it is nothing is profiled."""
    model, example = tiny.decoder()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    config = LosiaConfig.roaming(compiler="aot_eager")
    facts = StepFacts.of(model, capture(model, example, config))
    forecast, measured = losia(facts).memory, measure(model, Example.of(example), config, profiled_group(facts))
    assert forecast["profile"] == measured["profile"] == (0 if tied else 3 * 4 * 64 * 32)
    assert forecast["moments"] == pytest.approx(measured["moments"], rel=0.01)
    head = next((weight for weight in facts.weights if weight.head), None)
    assert (head is None) == tied
    without = facts.base_bytes(101) - replace(facts, config=LosiaConfig(head_rows="fixed")).base_bytes(101)
    kept = [expected_bytes(head.shape, head.subnet(config), head.itemsize, n) for n in (3, 1)] if head else [0, 0]
    assert without == kept[0] - kept[1]  # 100 moves of the others, 2 of the head


def test_shards_are_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    """What is sent is held against what processes send in tests/sharded."""
    found = explained(capsys, MODELS[0], "--ranks", "8")["sharded"]
    model = load_model(MODELS[0]).model
    subnets = losia_fx.subnets(losia_fx.transform(model))
    values = sum(4 * -(-s.values.shape[0] // 8) * s.values[0].numel() for s in subnets.values())
    dense = [p for name, p in model.named_parameters() if "_subnet" not in name]
    weights = {name: p.shape for name, p in model.named_parameters()}
    assert found["ranks"] == 8
    assert found["held"]["subnets"] == 4 * values
    assert found["held"]["weights"] == sum(4 * -(-p.shape[0] // 8) * p[0].numel() for p in dense)
    assert found["held"]["indices"] == 8 * sum(s.rows.numel() + s.cols.numel() for s in subnets.values())
    groups = losia_fx.controller(model).groups
    assert found["held"]["gradient"] == 4 * max(sum(math.prod(weights[n]) for n in names) for names in groups)


def test_frozen_products_are_forecast(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory against what a step holds, and the share of FLOPs by hand: all but the head's are in 8 bits."""
    monkeypatch.setattr("losia_fx.tools.forecast.products.share_of_dense", lambda *_: 0.5)
    monkeypatch.setattr("losia_fx.runtime.expected.share_of_dense", lambda *_: 0.5)
    argv = ["tests.support.tiny:decoder", "--frozen-products", "int8"]
    found = explained(capsys, *argv, "--measure")
    for part in PARTS:
        assert found["forecast"][part] == pytest.approx(found["measured"][part], rel=0.1), part
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert found["forecast"]["packed"] == sum(out * inner + 4 * out for out, inner in shapes)
    ours, products = found["methods"][0]["flops"], found["frozen_products"]
    in_8_bits = sum(2 * 2 * 4 * 16 * out * inner for out, inner in shapes)
    assert products["flops_share"] == pytest.approx(in_8_bits / sum(ours.values()))
    assert (products["kind"], products["weights"], products["time_share"]) == ("int8", 7, 0.5)
    assert main(["explain", *argv]) == 0
    assert re.search(r"frozen_products='int8': 7 weights, \d+% .* at 0\.50 of the time", capsys.readouterr().out)


def test_weights_in_8_bits_alone_are_forecast(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what a step holds: the dense ones are gone, and those of full fine-tuning and LoRA stay."""
    monkeypatch.setattr("losia_fx.tools.forecast.products.share_of_dense", lambda *_: 0.5)
    monkeypatch.setattr("losia_fx.runtime.expected.share_of_dense", lambda *_: 0.5)
    argv = ["tests.support.tiny:decoder", "--frozen-products", "int8"]
    beside = explained(capsys, *argv)
    found = explained(capsys, *argv, "--no-keep-dense", "--measure")
    for part in PARTS:
        assert found["forecast"][part] == pytest.approx(found["measured"][part], rel=0.1), part
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    gone = 4 * sum(out * inner for out, inner in shapes)
    assert found["forecast"]["packed"] == beside["forecast"]["packed"]
    assert found["forecast"]["weights"] == beside["forecast"]["weights"] - gone
    for mine, other in zip(found["methods"][1:], beside["methods"][1:], strict=True):
        assert mine == other


@pytest.fixture(scope="module")
def facts() -> StepFacts:
    """Of the decoder, as captured with the default options."""
    model, example = tiny.decoder()
    return StepFacts.of(model, capture(model, example, LosiaConfig(compiler="aot_eager")))


def test_other_factors_are_forecast_without_another_capture(facts: StepFacts) -> None:
    model, example = tiny.decoder()
    other = LosiaConfig(compiler="aot_eager", rank_factor=0.25, output_rank_factor=0.5)
    measured = measure(model, Example.of(example), other, 0)
    forecast = losia(facts.at(other)).memory
    for part in set(PARTS) - {"tapped", "profile"}:  # of another group here
        assert forecast[part] == pytest.approx(measured[part], rel=0.1), part


def test_the_methods_by_hand(facts: StepFacts) -> None:
    """Tokens 4 x 16; of the decoder's weights q (32, 32), k and v (16, 32), o, gate, up, down and the head (64, 32)."""
    shapes = [weight.shape for weight in facts.weights]
    assert len(shapes) == 8
    tokens = 4 * 16
    products = sum(2 * tokens * out * inner for out, inner in shapes)
    small = sum(2 * tokens * (out // 8) * (inner // 8) for out, inner in shapes if (out, inner) != (64, 32))
    ours, full, thin = losia(facts), full_fine_tuning(facts), lora(facts, 4)
    assert ours.flops["forward"] == ours.flops["input gradients"] == full.flops["weight gradients"] == products
    assert ours.flops["weight gradients"] == small + 2 * tokens * 8 * 32
    assert ours.flops["profiling"] == products // 2
    assert thin.flops["forward"] == products + sum(2 * tokens * 4 * (out + inner) for out, inner in shapes)
    assert thin.trained == sum(4 * (out + inner) for out, inner in shapes)
    assert full.trained == sum(math.prod(shape) for shape in shapes)
    assert full.memory["moments"] == pytest.approx(8 * full.trained, rel=0.01)
    # where the dense graph keeps x whole, ours keeps an eighth of it
    assert full.memory["activations"] > ours.memory["activations"]


@pytest.mark.parametrize("model", [pytest.param("decoder", marks=pytest.mark.slow), "experts"])
def test_what_track_delta_costs_is_what_is_held(model: str) -> None:
    """Random subnets, which all move at once; where they move to is kept before they do."""
    found, example = getattr(tiny, model)()
    options: dict[str, Any] = {"rank_factor": 0.25, "trainable": ("*norm*",)}
    forecast = StepFacts.of(found, capture(found, example, LosiaConfig(compiler="aot_eager", **options)))
    steps = {"schedule": "sync", "period": 1, "importance": "random", "compiler": "eager"}
    losia_fx.transform(found, track_delta=True, **steps, **options)
    controller = losia_fx.controller(found)
    optimizer = torch.optim.SGD([p for p in found.parameters() if p.requires_grad], lr=0.1)
    for _ in range(60):
        found(**example).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        places = 1 + len(controller.history) // len(controller.groups)
        held = sum(state.base.nbytes for state in controller.states if state.base is not None)
        held += sum(history.nbytes for history in controller.bases.full.values())
        assert forecast.base_bytes(places) == pytest.approx(held, rel=0.05), places
    assert places > 20


@pytest.mark.parametrize(
    ("schedule", "steps", "fits", "period"),
    [
        ("async", 150, True, 50),
        ("async", 149, False, 49),
        ("async", 2, False, None),
        ("async", None, True, None),
        ("sync", 50, True, 50),
    ],
)
def test_a_round_against_the_steps(schedule: str, steps: int | None, fits: bool, period: int | None) -> None:
    fit = RoundFit.of(LosiaConfig(period=50, schedule=schedule), 3, steps)
    assert (fit.fits, fit.fitting_period) == (fits, period)


def test_the_tables_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([MODELS[0], "--steps", "10", "--rank-factor", "0.25", "--trainable", "norm*"]) == 0
    text = capsys.readouterr().out
    assert "a round is 100 optimizer steps (2 groups, slots of 50 steps): more than 10 steps" in text
    assert "--period 5 would fit" in text
    for label in PARTS.values():
        assert f"│ {label} " in text
    assert "full fine-tuning" in text
    assert re.search(r"track_delta=True, which save_delta needs, .* in host memory: [0-9.]+ kB after 1 visits", text)
    assert "measured" not in text.split("Memory of a step")[1].split("kept for the backward:")[0]


def test_inputs_grow_and_shrink() -> None:
    _, example = tiny.encoder()
    grown = resize(Example.of(example), 7, 9).kwargs
    assert {tuple(value.shape) for value in grown.values()} == {(7, 9)}
    assert (grown["labels"][4:] == example["labels"][:3, :9]).all()


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, why in (
        (["no/such/model"], "no such file or folder"),
        ([MODELS[0], "--rank-factor", "2"], "rank_factor=2.0"),
        ([MODELS[0], "--steps", "0"], "--steps 0"),
        ([MODELS[0], "--ranks", "1"], "--ranks 1: give a whole number of at least 2"),
        ([MODELS[0], "--target", "nowhere"], "matches no linear weight"),
        ([MODELS[0], "--seq-length", "0"], "--seq-length 0"),
        (["tests.support.tiny:no_tokens", "--seq-length", "4"], "have no tokens"),
        (["tests.support.tiny:SEVERAL"], "has no function"),
    ):
        assert main(["explain", *argv]) == 2
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1
