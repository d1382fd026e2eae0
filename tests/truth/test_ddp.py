"""DistributedDataParallel, and what its users do beside: two processes go on training as one on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loop.ddp_worker import joined_batches
from tests.loop.test_distributed import _Joined, assert_like, scenario
from tests.truth.ddp_worker import STEPS

ROOT = Path(__file__).parents[2]
LONGEST = 240
"""Seconds; a deadlock ends here."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, what each scenario came to."""
    results = tmp_path_factory.mktemp("ddp") / "found"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("ddp_worker.py")), str(results)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            assert process.wait(LONGEST) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    return [torch.load(f"{results}.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def joined() -> _Joined:
    one = _Joined()
    for ids in joined_batches(STEPS):
        one.step(ids=ids)
    assert one.controller.history
    return one


TRAINING = [
    "a_bare_forward",
    "a_bare_forward_on_one_rank",
    "an_evaluation_on_one_rank",
    "a_second_wrapper",
    "zero_redundancy",
    "zero_redundancy_in_one_bucket",
]


@pytest.mark.parametrize("name", TRAINING)
def test_two_processes_train_as_one(found: list[dict[str, Any]], joined: _Joined, name: str) -> None:
    outcome = scenario(found, name)
    assert_like(joined, outcome)
    assert outcome["left_out"] == 0
    assert outcome["state"]["step"] == STEPS


def test_rows_and_cols_are_not_sent_round(found: list[dict[str, Any]]) -> None:
    """The model's own buffer is; and what keeps ours at home goes when the subnets do."""
    assert scenario(found, "buffers") == {"sent": ["seen"], "seen": 1.0, "left": []}


def test_a_product_that_only_autograd_sees_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "layers.0.mlp.up.weight" in rank["an_unseen_product"]["error"]
        assert "exclude" in rank["an_unseen_product"]["error"]


def test_uneven_batches_are_refused_where_subnets_move(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "throw_on_early_termination" in rank["uneven_batches"]["error"]


def test_uneven_batches_of_still_subnets(found: list[dict[str, Any]]) -> None:
    """In the end both have the weights of the rank that had most batches."""
    one, other = (rank["uneven_batches_of_still_subnets"] for rank in found)
    for part in ("state_dict", "values"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
