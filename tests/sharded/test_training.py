"""FSDP2: processes that have a part of each weight train as one process that has them whole, on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sharded.worker import CORE, FOUR, POLICIES, SCENARIOS, SLOW

ROOT = Path(__file__).parents[2]
EAGER_POLICY = next(iter(POLICIES))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.0}


def train(folder: Path, ranks: int, names: list[str]) -> list[dict[str, Any]]:
    """By rank, what each scenario came to, in one process group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder / "found"), str(ranks), *names]
    done = subprocess.run(command, env=environment, timeout=1200, check=False)
    assert done.returncode == 0
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("two"), 2, [*CORE, EAGER_POLICY])


@pytest.fixture(scope="module")
def slow_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("slow"), 2, [*SLOW, *list(POLICIES)[1:]])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("four"), 4, list(FOUR))


def assert_as_alone(ranks: list[dict[str, Any]], name: str) -> None:
    scenario = SCENARIOS[name]
    for outcome in (rank[name] for rank in ranks):
        assert "error" not in outcome, outcome["error"]
        found, expected = outcome["found"], outcome["expected"]
        assert found["left_out"] == expected["left_out"] == 0
        assert found["step"] == expected["step"] == scenario.steps
        assert [event[:2] for event in found["history"]] == [event[:2] for event in expected["history"]]
        assert_close(found, expected, TOLERANCE[scenario.dtype])
        for weight, (rows, cols) in expected["places"].items():
            assert torch.equal(found["places"][weight][0], rows), weight
            assert torch.equal(found["places"][weight][1], cols), weight
        moved = [event[2] for event in found["history"]]
        assert moved == pytest.approx([event[2] for event in expected["history"]])
        others = 2 * ("llama" in scenario.model)  # of what is around the blocks
        assert found["graphs"] <= (GRAPHS + others) * (1 if scenario.last == 8 else 2)  # one for any size of a batch


GRAPHS = 4
"""Blocks that are alike share theirs: of the first, whose input asks for no gradient, of the others, of the head; and
those of two kinds of micro-batches."""


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for kind in ("weights", "values"):
        assert found[kind].keys() == expected[kind].keys()
        for key, value in expected[kind].items():
            torch.testing.assert_close(
                found[kind][key], value, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("name", CORE)
def test_two_processes_train_as_one(two: list[dict[str, Any]], name: str) -> None:
    assert_as_alone(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_train_as_one_in_more_ways(slow_two: list[dict[str, Any]], name: str) -> None:
    assert_as_alone(slow_two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_train_as_one(four: list[dict[str, Any]], name: str) -> None:
    assert_as_alone(four, name)


def assert_as_the_policy_says(ranks: list[dict[str, Any]], name: str) -> None:
    for outcome in (rank[name] for rank in ranks):
        assert "error" not in outcome, outcome["error"]
        found, expected = outcome["found"], outcome["expected"]
        assert_close(found, expected, 2e-6)
        assert [event[:2] for event in found["history"]] == expected["history"]
        assert found["left_out"] == 0
        for weight, (rows, cols) in expected["places"].items():
            assert torch.equal(found["places"][weight][0], rows), weight
            assert torch.equal(found["places"][weight][1], cols), weight


def test_a_policy_of_mixed_precision(two: list[dict[str, Any]]) -> None:
    assert_as_the_policy_says(two, EAGER_POLICY)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(POLICIES)[1:])
def test_a_policy_of_mixed_precision_compiled(slow_two: list[dict[str, Any]], name: str) -> None:
    assert_as_the_policy_says(slow_two, name)


def test_the_subnets_learn_and_move(two: list[dict[str, Any]]) -> None:
    """Or the comparisons would say nothing."""
    for name in CORE:
        outcome = two[0][name]["found"]
        assert any(event[2] > 0.3 for event in outcome["history"]), name
