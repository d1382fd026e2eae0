"""Sharded models: saved by one rank, resumed on any number of them; what the ranks send; what they choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from losia_fx.config import LosiaConfig
from losia_fx.delta.read import DeltaFile
from losia_fx.tools.forecast.ranks import RanksForecast
from tests.sharded.state_worker import DELTAS, PARTS, TRIED
from tests.sharded.test_training import ROOT, assert_close
from tests.support.toys import Toy

CASES = ["mixed losia", f"mixed {PARTS}"]
"""What was trained, and what is loaded first, or that each rank reads its own part."""
MORE = ["mixed weights", "visits weights", f"visits {PARTS}"]
OWN = ["own losia", f"own {PARTS}"]
"""A head with slots of its own, one of which the checkpoint cuts; all else moves with the last step before it, and so
has moments that are new (torch.distributed.checkpoint refused an optimizer without)."""
DELTA, *SLOW_DELTAS = DELTAS


def run(folder: Path, ranks: int, names: list[str]) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    results = folder / f"of {ranks}"
    command = [sys.executable, str(Path(__file__).with_name("state_worker.py")), str(results), str(ranks), *names]
    done = subprocess.run(command, env=environment, timeout=600, check=False)
    assert done.returncode == 0
    found = [torch.load(f"{results}.{rank}", weights_only=True) for rank in range(ranks)]
    for rank in found:
        for outcome in rank.values():
            assert "error" not in outcome, outcome["error"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    resumed = [f"resumed {case}" for case in CASES]
    return run(folder, 2, ["saved mixed", *resumed, f"delta {DELTA}", "traffic", "memory", "selections"])


@pytest.mark.parametrize("case", CASES)
def test_resumed_on_as_many_ranks_to_the_bit(two: list[dict[str, Any]], case: str) -> None:
    assert_goes_on_to_the_bit(two, case)


@pytest.mark.slow
def test_resumed_on_as_many_ranks_to_the_bit_in_more_ways(tmp_path: Path) -> None:
    ranks = run(tmp_path, 2, ["saved mixed", "saved visits", "saved own", *(f"resumed {c}" for c in (*MORE, *OWN))])
    for case in (*MORE, *OWN):
        assert_goes_on_to_the_bit(ranks, case)


def assert_goes_on_to_the_bit(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        found, expected = rank[f"resumed {case}"], rank[f"saved {case.split()[0]}"]
        assert_close(found, expected, 0.0)
        assert [event[:3] for event in found["history"]] == [event[:3] for event in expected["history"]]
        # The ranks' sums over rows come as one from the checkpoint: rounded in another order.
        captured = [event[3] or 0.0 for event in expected["history"]]
        assert [event[3] or 0.0 for event in found["history"]] == pytest.approx(captured, rel=1e-6)
        assert len(captured) == (22 if case in OWN else 6)


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_on_another_number_of_ranks(two: list[dict[str, Any]], folder: Path, ranks: int) -> None:
    """One is a plain process, whose model nobody has sharded."""
    for rank in run(folder, ranks, [f"resumed {case}" for case in CASES]):
        for case in CASES:
            assert_goes_on(rank[f"resumed {case}"], two[0][f"saved {case.split()[0]}"])


@pytest.mark.slow
def test_resumed_on_replicas_to_the_bit(tmp_path: Path) -> None:
    """Two replicas of two shards."""
    cases = [f"resumed replicas {first}" for first in ("losia", PARTS)]
    for rank in run(tmp_path, 4, ["saved replicas", *cases]):
        for case in cases:
            assert_close(rank[case], rank["saved replicas"], 0.0)


@pytest.mark.slow
def test_resumed_on_half_the_ranks(tmp_path: Path) -> None:
    saved = run(tmp_path, 4, ["saved mixed", "saved visits"])
    for rank in run(tmp_path, 2, [f"resumed {case}" for case in (*CASES, *MORE)]):
        for case in (*CASES, *MORE):
            assert_goes_on(rank[f"resumed {case}"], saved[0][f"saved {case.split()[0]}"])


def assert_goes_on(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """As the run would have gone on that was saved."""
    assert_close(found, expected, 1e-12)
    for name, (rows, cols) in expected["places"].items():
        assert torch.equal(found["places"][name][0], rows)
        assert torch.equal(found["places"][name][1], cols)
    assert [event[:2] for event in found["history"]] == [event[:2] for event in expected["history"]]


def test_the_gradients_that_are_reduced_are_a_64th_of_the_full_ones(two: list[dict[str, Any]]) -> None:
    """float32. While everything is profiled G is reduced as well, which is as large as the weights."""
    found = two[0]["traffic"]
    full = 4 * found["linears"]
    plain, profiled = found["plain"], found["profiled"]
    assert plain["_reduce_scatter_base_"] == profiled["_reduce_scatter_base_"] == full // 64
    assert "reduce_scatter_tensor" not in plain
    assert "allreduce_" not in plain
    assert profiled["reduce_scatter_tensor"] == full


def test_the_traffic_is_what_explain_forecasts(two: list[dict[str, Any]]) -> None:
    found = two[0]["traffic"]
    for name, options in {"plain": {"schedule": "static"}, "profiled": {"schedule": "all"}}.items():
        config = LosiaConfig(rank_factor=1 / 8, output_rank_factor=0.0, **options)
        sent = RanksForecast.of(Toy(inner=32), config, 2).sent
        step = sum(size for part, size in sent.items() if part != "selected")
        assert sum(found[name].values()) == step
    assert sent["reduced"] == found["profiled"]["_reduce_scatter_base_"]
    assert sum(found["moved"].values()) == step + sent["selected"]


def test_a_delta_is_that_of_one_process(two: list[dict[str, Any]], folder: Path) -> None:
    assert_deltas(two, run(folder, 1, [f"delta {DELTA}"]), folder, DELTA)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_more_deltas_are_those_of_one_process(tmp_path: Path, ranks: int) -> None:
    names = [f"delta {kind}" for kind in SLOW_DELTAS]
    found, alone = run(tmp_path, ranks, names), run(tmp_path, 1, names)
    for kind in SLOW_DELTAS:
        assert_deltas(found, alone, tmp_path, kind)


def assert_deltas(ranks: list[dict[str, Any]], alone: list[dict[str, Any]], folder: Path, kind: str) -> None:
    """To the bit. (safetensors writes what a header holds in any order, so the files' bytes say nothing.)"""
    for name in (kind, f"{kind}, another base"):
        files = [folder / f"delta of {number}" / name for number in (len(ranks), 1)]
        assert_same(*(load_file(file) for file in files))
        with DeltaFile(files[0]) as found_file, DeltaFile(files[1]) as expected_file:
            assert found_file.model == expected_file.model
            assert found_file.records == expected_file.records
            assert found_file.records
    expected = alone[0][f"delta {kind}"]
    for found in (rank[f"delta {kind}"] for rank in ranks):
        assert_same(found["tuned"], expected["tuned"])
        assert_same(found["again"], expected["tuned"])
        assert_same(found["undone"], expected["base"])
        assert_same(found["values"], expected["values"])
        missing, other = found["refused"]
        assert "no such file: there is no such file" in missing
        assert "is not the same file on all ranks" in other


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


def test_memory_falls_with_the_ranks(two: list[dict[str, Any]], folder: Path) -> None:
    """Weights, subnets, moments, importance and uncertainty: half of them on each of two; indices aside."""
    (alone,) = run(folder, 1, ["memory"])
    for rank in two:
        assert rank["memory"]["bytes"] < 0.55 * alone["memory"]["bytes"]


def test_the_ranks_choose_as_one_process_does(two: list[dict[str, Any]]) -> None:
    assert [rank["selections"]["agree"] for rank in two] == [TRIED, TRIED]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_which_goes_on_from_its_checkpoint(
    two: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Within a minute of its death, whatever the others are waiting for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(Path(__file__).with_name("dying_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    command.append(str(tmp_path / "mixed" / PARTS))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        lines = [job.stdout.readline(), job.stdout.readline()]
        ended = job.wait(timeout=60)
        assert lines == ["trained\n", "trained\n"]
        assert ended != 0
        assert "never" not in job.stdout.read()
    for resumed in run(tmp_path, 2, [f"resumed mixed {PARTS}"]):
        assert_close(resumed[f"resumed mixed {PARTS}"], two[0]["saved mixed"], 0.0)
