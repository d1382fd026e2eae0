"""Many models in one process, each of other shapes: what runs compiled around a step never raises once S has moved."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import optim

import losia_fx
from losia_fx.method import kernels
from losia_fx.runtime.train_state import TrainState
from tests.support.toys import Toy
from tests.support.twin import Twin, assert_one, assert_subnets, backward, subnets_of, twins, values_of, zero

SHAPES = 9
"""One more than Dynamo compiles one code object for."""
OPTIONS: dict[str, Any] = {"schedule": "async", "period": 2, "rewarm": False}


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is worth compiling, and nothing has been yet."""
    monkeypatch.setattr(kernels, "WORTH_COMPILING", 1)
    monkeypatch.setattr(kernels, "_forms", {})
    monkeypatch.setattr(kernels, "_broken", set())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Gives a backend for what is compiled around the step, beside models that are not compiled."""

    def use(backend: Any) -> None:
        monkeypatch.setattr(TrainState, "compiles", True)
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    return use


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def models(count: int = SHAPES, **options: Any) -> Iterator[tuple[Any, Twin]]:
    for number in range(count):
        torch.manual_seed(number)
        yield twins(Toy(layers=1, width=16 + 4 * number, inner=24 + 4 * number), **{**OPTIONS, **options})


def train(model: Any, twin: Twin, steps: int = 4, tolerance: float = 2e-4) -> None:
    """Over two slots, so that the importance is measured and a subnet moves."""
    mine, expected = optim.SGD(values_of(model), lr=0.1), optim.SGD(twin.parameters(), lr=0.1)
    for step in range(steps):
        zero(model, twin)
        backward(model, twin, tolerance=tolerance)
        mine.step()
        expected.step()
        twin.follow(subnets_of(model))
        assert losia_fx.controller(model).step == step + 1
        assert_subnets(model, twin, tolerance)
    assert losia_fx.controller(model).left_out == 0
    assert losia_fx.controller(model).history


def test_nine_shapes(stand_in: Any) -> None:
    """As Dynamo counts: a graph for each kind of block, one for all importances."""
    stand_in("eager")
    for model, twin in models():
        train(model, twin)
    assert not kernels._broken
    assert len(kernels._forms[kernels._write_back]) == 2 * SHAPES - 2  # the head's and the block's, up to the limit
    assert len(kernels._forms[kernels._update]) == 1


def test_more_kinds_than_are_compiled(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("eager")
    monkeypatch.setattr(kernels, "KINDS", 1)
    for model, twin in models(3):
        train(model, twin)
    assert [len(forms) for forms in kernels._forms.values()] == [1, 1]


def test_a_limit_that_is_reached_all_the_same(stand_in: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Other strides, say: Dynamo raises instead of compiling once more, and the plain form runs."""
    stand_in("eager")
    shared: dict[Any, Any] = {}
    monkeypatch.setattr(kernels, "own_code", lambda function: shared.setdefault(function, function))
    with caplog.at_level(logging.WARNING, "losia_fx"), torch._dynamo.config.patch(recompile_limit=2):
        for model, twin in models(4):
            train(model, twin)
    assert kernels._broken
    assert "runs uncompiled" in caplog.text


def test_a_compiler_that_fails(stand_in: Any, caplog: Any) -> None:
    """No C++ compiler, a full disk: W follows S all the same, and the importance is measured."""

    def broken(gm: Any, inputs: Any) -> Any:
        raise RuntimeError("no space left on device")

    stand_in(broken)
    with caplog.at_level(logging.WARNING, "losia_fx"):
        for model, twin in models(2):
            train(model, twin)
            assert_one(model, twin, tolerance=2e-4)
    assert caplog.text.count("runs uncompiled") == len(kernels._broken) > 0


def test_a_notebook_of_importances_and_dtypes(stand_in: Any) -> None:
    """One model after the other, the importance computed otherwise each time: that too has no ninth that fails."""
    stand_in("eager")
    kinds = [{"importance": kind, "beta1": beta} for kind in ("mixed", "first", "second") for beta in (0.5, 0.6, 0.7)]
    for options in kinds:
        for model, twin in models(1, **options):
            train(model, twin, steps=2)
    assert len(kinds) == SHAPES
    assert not kernels._broken
    assert len(kernels._forms[kernels._update]) == SHAPES


@pytest.mark.slow
def test_nine_shapes_by_inductor() -> None:
    for model, twin in models(compiler="inductor"):
        train(model, twin, tolerance=1e-3)
    assert not kernels._broken
