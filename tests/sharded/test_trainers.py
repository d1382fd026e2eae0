"""accelerate and transformers' Trainer shard a transformed model with FSDP2: exact, saved, resumed to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sharded.test_training import ROOT, assert_close

CORE = ["accelerate, loaded by one"]
SLOW = ["accelerate", "Trainer", "Trainer, loaded by one", "best"]


def run(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("trainer_worker.py")), str(folder / "found"), "2", *names]
    done = subprocess.run(command, env=environment, timeout=900, check=False)
    assert done.returncode == 0
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("core"), CORE)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("slow"), SLOW)


def assert_exact(ranks: list[dict[str, Any]], name: str) -> None:
    """As one process on the joined batches; and resumed as it had gone on."""
    for outcome in (rank[name] for rank in ranks):
        assert "error" not in outcome, outcome["error"]
        found, expected, resumed = outcome["found"], outcome["expected"], outcome["resumed"]
        assert_close(found, expected, 1e-12)
        assert [event[:2] for event in found["history"]] == [event[:2] for event in expected["history"]]
        assert found["left_out"] == 0
        assert_close(resumed, found, 0.0)
        assert resumed["history"] == found["history"]
        assert len(found["history"]) == 6


@pytest.mark.parametrize("name", CORE)
def test_exact_and_resumed(core: list[dict[str, Any]], name: str) -> None:
    assert_exact(core, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW[:3])
def test_exact_and_resumed_in_more_ways(slow: list[dict[str, Any]], name: str) -> None:
    assert_exact(slow, name)


@pytest.mark.slow
def test_the_best_is_loaded_in_the_end(slow: list[dict[str, Any]]) -> None:
    for outcome in (rank["best"] for rank in slow):
        assert "error" not in outcome, outcome["error"]
        assert outcome["losses"][0] == max(outcome["losses"]) > outcome["losses"][-1]
        assert outcome["best"] == pytest.approx(outcome["losses"][0], rel=1e-6)
