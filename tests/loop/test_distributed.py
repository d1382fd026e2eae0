"""DistributedDataParallel: two processes train as one on the joined batch, with p*p of the traffic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import losia_fx
from losia_fx.finetune.checkpoints import MARK, newest_whole
from losia_fx.optim import SubnetRMS
from tests.loop.ddp_worker import RANKS, joined_batches, model_of, roaming_model
from tests.loop.finetune_runs import Run, assert_same_outcome
from tests.support.pair import PERIOD, Pair
from tests.support.toy_runs import same
from tests.support.toys import Toy, loss_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, what each scenario of ddp_worker.py came to."""
    results = tmp_path_factory.mktemp("ddp") / "found"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker = Path(__file__).with_name("ddp_worker.py")
    done = subprocess.run([sys.executable, str(worker), str(results)], env=environment, timeout=300, check=False)
    assert done.returncode == 0
    return [torch.load(f"{results}.{rank}", weights_only=True) for rank in (0, 1)]


def scenario(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Rank 0's outcome, after a look that rank 1's is the same to the bit."""
    first, second = (rank[name] for rank in found)
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    assert same(first, second)
    return dict(first)


class _Joined(Pair):
    """One process on the joined batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(lambda parameters: optim.AdamW(parameters, lr=5e-3))


def assert_like(one: _Joined, outcome: dict[str, Any]) -> None:
    state = losia_fx.state_dict(one.model)
    for key, value in outcome["state"].items():
        if key.endswith((":rows", ":cols")) or key in ("step", "rewarm_from", "left_out"):
            assert same(value, state[key]), key
    for name, value in outcome["weights"].items():
        torch.testing.assert_close(value, one.reference.model.state_dict()[name], rtol=1e-6, atol=1e-9)


def test_the_trajectory_of_one_process_on_the_joined_batch(found: list[dict[str, Any]]) -> None:
    outcome, one = scenario(found, "trajectory"), _Joined()
    for number, ids in enumerate(joined_batches()):
        for loss in one.losses(ids):
            loss.backward()
        if number == 0:
            for name, weight in one.reference.weights.items():
                grad = weight.weight.grad
                assert grad is not None
                block = grad[weight.rows][:, weight.cols]
                torch.testing.assert_close(outcome["gradients"][name], block, rtol=1e-9, atol=1e-12)
        nn.utils.clip_grad_norm_(one.model.parameters(), 0.3)
        one.finish(clip_norm=0.3)
    assert_like(one, outcome)
    assert len(outcome["state"]["history"]) == 4
    assert outcome["left_out"] == 0


def test_the_traffic_is_that_of_the_subnets(found: list[dict[str, Any]]) -> None:
    outcome = scenario(found, "trajectory")
    subnets = losia_fx.subnets(model_of())
    assert outcome["traffic"] == sum(s.values.numel() * 8 for s in subnets.values())
    dense = sum(p.numel() * 8 for name, p in Toy(layers=1).named_parameters() if name in subnets)
    assert outcome["traffic"] < 0.15 * dense  # p * p = 1/16 of the blocks, p of the head


@pytest.mark.parametrize("name", ["accumulation", "two_forwards_before_a_backward", "compiled_around"])
def test_other_forms_of_a_step(found: list[dict[str, Any]], name: str) -> None:
    outcome, one = scenario(found, name), _Joined()
    for ids in joined_batches(PERIOD + 2):
        one.step(ids=ids)
    assert_like(one, outcome)
    assert one.controller.history


def test_ranks_in_groups_of_their_own_are_not_averaged(found: list[dict[str, Any]]) -> None:
    for rank, outcomes in enumerate(found):
        outcome, one = outcomes["group_of_its_own"], _Joined()
        assert "error" not in outcome, outcome["error"]
        for ids in joined_batches(PERIOD + 2):
            one.step(ids=ids.chunk(RANKS)[rank])
        assert_like(one, outcome)
        assert one.controller.history


def test_ranks_go_on_to_the_bit(found: list[dict[str, Any]]) -> None:
    outcome = scenario(found, "resumed")
    assert same(outcome["whole"], outcome["resumed"])
    assert outcome["whole"]["state"]["step"] == len(joined_batches())


def test_means_by_rows_and_columns_are_those_of_the_joined_batch(found: list[dict[str, Any]]) -> None:
    outcome, model = scenario(found, "by_rows_and_columns"), model_of()
    optimizer = SubnetRMS(model, 5e-3)
    for ids in joined_batches(PERIOD + 2):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    assert state.keys() == outcome["optimizer"].keys()
    torch.testing.assert_close(outcome["optimizer"], state, rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(outcome["weights"], dict(model.state_dict()), rtol=1e-6, atol=1e-9)


def test_labels_of_all_ranks_count_and_carried_moments_are_those_of_the_joined_batch(
    found: list[dict[str, Any]],
) -> None:
    outcome, model = scenario(found, "roaming"), roaming_model()
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for ids in joined_batches(PERIOD + 2):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = losia_fx.state_dict(model)
    assert state.keys() == outcome["state"].keys()
    whole = [key for key, value in state.items() if not (isinstance(value, Tensor) and value.is_floating_point())]
    assert {"head.weight:rows", "head.weight:label_counts"} <= set(whole)
    for key in whole:
        assert same(outcome["state"][key], state[key]), key
    torch.testing.assert_close(outcome["weights"], dict(model.state_dict()), rtol=1e-6, atol=1e-9)


# -- losia-fx finetune in several processes ---------------------------------------------------------------------------


def losses(out: Path) -> list[float]:
    return [step["loss"] for step in json.loads((out / "run.json").read_text(encoding="utf-8"))["steps"]]


@pytest.mark.slow
def test_finetune_in_two_processes(inputs: list[str], run: Run, tmp_path: Path) -> None:
    """The world size multiplies the batch; only the first prints and writes; killed, it goes on to the bit."""
    argv = [*inputs, "--batch-size", "2"]
    done = run([*argv, "--out", str(tmp_path / "two")], ranks=2)
    assert done.codes == [0, 0], done.err
    assert "12 steps" in done.out[0]
    assert done.out[1] == ""
    lines = [line for line in done.out[0].splitlines() if line.startswith("step 12/12")]
    assert len(lines) == 1

    resumable = [*argv, "--out", str(tmp_path / "again"), "--resume", "--checkpoint-every", "1"]
    cut = run(resumable, ranks=2, kill_after=0.6 * done.seconds)
    assert set(cut.codes) <= {0, -signal.SIGKILL}
    assert run(resumable, ranks=2).codes == [0, 0]
    assert_same_outcome(tmp_path / "two", tmp_path / "again")


def test_a_process_that_dies_ends_the_job(inputs: list[str], run: Run, tmp_path: Path) -> None:
    argv = [*inputs, "--batch-size", "2", "--steps", "100000", "--out", str(tmp_path / "out"), "--resume"]
    done = run(
        [*argv, "--checkpoint-every", "2"], ranks=2, kill_when=tmp_path / "out" / "checkpoint-*" / MARK, victim=1
    )
    assert done.codes[1] == -signal.SIGKILL
    assert done.codes[0] not in (0, -signal.SIGKILL), "the other went on, or had to be killed too"
    assert done.err[0]
    said: list[str] = []
    newest = newest_whole(tmp_path / "out", said.append)
    assert newest is not None, said
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", MARK} <= {file.name for file in newest.iterdir()}


@pytest.mark.slow
def test_torchrun(inputs: list[str], tmp_path: Path) -> None:
    """The very command, on halves of the batch: the losses of one process on the whole one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    model = ["-m", "losia_fx.cli", *inputs]
    two = [*torchrun, *model, "--batch-size", "2", "--out", str(tmp_path / "two")]
    subprocess.run(two, env=environment, timeout=300, check=True)
    one = [sys.executable, *model, "--batch-size", "4", "--out", str(tmp_path / "one")]
    subprocess.run(one, env=environment, timeout=300, check=True)
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=0.05)  # dropout differs
    assert len(losses(tmp_path / "two")) == 12
