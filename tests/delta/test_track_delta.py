"""The base is kept where track_delta asks for it, and nowhere else: then it costs nothing, and save_delta says how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import losia_fx
from losia_fx import DeltaError, LosiaConfig
from losia_fx.delta.history import history_tensors, restore_history
from losia_fx.method import visits
from losia_fx.runtime import bases
from tests.delta.made import OPTIONS, make, same, train, weights
from tests.support.toys import Toy, batch, by_string, loss_of

OFF = {name: value for name, value in OPTIONS.items() if name != "track_delta"}


def by_keywords(model: nn.Module, **options: Any) -> Any:
    return losia_fx.transform(model, trainable=("norm",), **options)


def by_config(model: nn.Module, **options: Any) -> Any:
    return losia_fx.transform(model, config=LosiaConfig(trainable=("norm",), **options))


WAYS = pytest.mark.parametrize("way", [by_keywords, by_config, by_string])


@WAYS
def test_without_it_nothing_is_kept(way: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("nobody asked for it")

    for holder, name in ((visits, "_checksum"), (visits, "Piece"), (bases, "copies"), (bases, "gather")):
        monkeypatch.setattr(holder, name, fail)
    model = Toy(layers=2)
    call = way(model, **OFF)
    steps(call, model)
    controller = losia_fx.controller(model)
    assert controller.history
    assert controller.bases is None
    assert all(state.base is None for state in controller.states)
    assert history_tensors(controller) == {}
    with pytest.raises(DeltaError) as caught:
        losia_fx.save_delta(call, tmp_path / "d.safetensors")
    for part in (str(tmp_path), "before training", "losia_fx.transform(model, track_delta=True)", "host memory"):
        assert part in str(caught.value)
    assert not (tmp_path / "d.safetensors").exists()


@WAYS
def test_with_it_the_delta_is_known(way: Callable[..., Any], tmp_path: Path) -> None:
    model = Toy(layers=2)
    base = copy.deepcopy(model)
    call = way(model, **OFF, track_delta=True)
    steps(call, model)
    losia_fx.save_delta(call, tmp_path / "d.safetensors")
    losia_fx.load_delta(base, tmp_path / "d.safetensors")
    assert same(base, weights(model))


@pytest.mark.parametrize("tracked", [False, True])
def test_a_state_may_be_loaded_either_way(tracked: bool, tmp_path: Path) -> None:
    """What is loaded is the base from then on."""
    made = make(tmp_path, track_delta=True) if tracked else None
    model = Toy(layers=2, bias=True) if made is None else made.model
    if made is None:
        losia_fx.transform(model, **OFF)
        train(model)
    other = Toy(layers=2, bias=True)
    losia_fx.transform(other, **OFF, track_delta=not tracked)
    other.load_state_dict(weights(model))
    losia_fx.load_state_dict(other, losia_fx.state_dict(model))
    base = Toy(layers=2, bias=True)
    base.load_state_dict(weights(model))
    train(other, 4)
    assert (losia_fx.controller(other).bases is None) == tracked
    if not tracked:
        losia_fx.save_delta(other, tmp_path / "other.safetensors")
        losia_fx.load_delta(base, tmp_path / "other.safetensors")
        assert same(base, weights(other))


def test_a_run_that_goes_on_with_its_history_keeps_tracking(tmp_path: Path) -> None:
    made = make(tmp_path, trainable=("norm",))
    resumed = copy.deepcopy(made.base)
    losia_fx.transform(resumed, trainable=("norm",), **OFF)
    controller = losia_fx.controller(resumed)
    restore_history(controller, {})
    assert controller.bases is None
    restore_history(controller, history_tensors(losia_fx.controller(made.model)))
    resumed.load_state_dict(made.tuned)
    train(resumed, 4)
    losia_fx.save_delta(resumed, tmp_path / "more.safetensors")
    losia_fx.load_delta(made.base, tmp_path / "more.safetensors")
    assert same(made.base, weights(resumed))


def steps(call: Any, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        loss_of(call, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
