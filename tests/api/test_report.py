"""report(): every parameter once, how it is used and trained, and nothing frozen in silence."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx.errors import LosiaWarning
from losia_fx.method.schedule import round_length
from tests.support import toys

EXPERTS = 3


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, 16))
        self.down = nn.Parameter(torch.randn(EXPERTS, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.down), self.up)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.experts = nn.Linear(16, 16), Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x) + x @ self.mix.weight.square()
        return self.experts(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(toys.VOCABULARY, 16)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


IDS = torch.arange(EXPERTS * 4).reshape(EXPERTS, 4)


def transformed(**options: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LosiaWarning)
        return losia_fx.transform(Model(), compiler="eager", **options)


def rows_of(model: nn.Module) -> dict[str, losia_fx.report]:  # type: ignore[valid-type]
    return {row.name: row for row in losia_fx.report(model).weights}


def test_every_parameter_once_under_its_own_name() -> None:
    names = [name for name, _ in Model().named_parameters()]
    report = losia_fx.report(transformed())
    assert [row.name for row in report.weights] == names
    assert all(row.why for row in report.weights)
    assert {row.trained for row in report.weights} == {"subnet", "frozen"}


def test_tied_and_shared_parameters_come_once() -> None:
    model = losia_fx.transform(toys.Toy(tied=True), compiler="eager")
    names = [row.name for row in losia_fx.report(model).weights]
    assert len(names) == len(set(names)) == len(list(toys.Toy(tied=True).named_parameters()))


def test_plain_values() -> None:
    model = transformed(trainable=["out"])
    model(IDS).sum().backward()
    report = losia_fx.report(model)
    values = json.loads(json.dumps(report.as_dict()))
    assert len(values["weights"]) == len(report.weights)
    row = next(row for row in values["weights"] if row["name"] == "layers.0.experts.up")
    assert row == {
        "name": "layers.0.experts.up",
        "shape": [EXPERTS, 8, 16],
        "trained": "subnet",
        "subnet": [EXPERTS, 1, 2],
        "group": 0,
        "why": "experts of block layers.0",
        "kind": "experts",
        "used": "bmm",
        "products": "",
    }
    assert values["round_steps"] == round_length(losia_fx.controller(model).config, values["groups"])


def test_totals_and_coverage() -> None:
    report = losia_fx.report(transformed(trainable=["out.weight"], exclude=["layers.1.mix"], rank_factor=0.25))
    per_block, experts = 16 * 16, 2 * EXPERTS * 8 * 16
    linear = 2 * (per_block + experts) + 16 * 5
    assert report.coverage == pytest.approx((per_block + 2 * experts) / linear)
    learns = 4 * 4 + 4 * EXPERTS * 2 * 4
    everything = sum(p.numel() for p in Model().parameters())
    assert report.totals() == {"subnet": learns, "full": 80, "frozen": everything - learns - 80}
    text = " ".join(str(report).split())
    assert f"{report.coverage:.1%} of all linear weights' elements" in text
    assert f"{learns:,} elements learn through subnets, 80 in full, of {everything:,}" in text
    assert "named in exclude: 'layers.1.mix'" in text


def test_used() -> None:
    model = transformed()
    assert {row.used for row in rows_of(model).values()} == {""}
    model(IDS).sum().backward()
    rows = rows_of(model)
    assert rows["layers.0.mix.weight"].used == "linear, square; full gradient for square"
    assert rows["layers.1.experts.down"].used == "bmm"
    assert rows["embed.weight"].used == "embedding"
    notes = [note for note in losia_fx.report(model).notes if "cost of a full gradient" in note]
    assert len(notes) == 1
    assert "layers.0.mix.weight" in notes[0]
    assert "experts" not in notes[0]


@pytest.mark.parametrize("options", [{"exclude": ["experts"]}, {"target": ["mix"]}])
def test_frozen_experts_are_loud(options: dict[str, list[str]]) -> None:
    model = Model()
    with pytest.warns(LosiaWarning) as caught:
        losia_fx.transform(model, compiler="eager", **options)
    said = [str(warning.message) for warning in caught if "experts left dense: frozen" in str(warning.message)]
    assert len(said) == 1
    assert "layers.0.experts.up" in said[0]
    assert "named in" in said[0]
    (note,) = [note for note in losia_fx.report(model).notes if note.startswith("experts left dense: frozen")]
    assert "layers.0.experts.up" in note
    assert "experts left dense: frozen" in str(losia_fx.report(model))


def test_no_word_of_experts_that_learn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = losia_fx.transform(Model(), compiler="eager")
    assert not [warning for warning in caught if "experts" in str(warning.message)]
    assert not [note for note in losia_fx.report(model).notes if "experts" in note]


def test_experts_trained_in_full_are_not_frozen() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losia_fx.transform(Model(), compiler="eager", trainable=["experts"])
    assert not [warning for warning in caught if "experts" in str(warning.message)]
