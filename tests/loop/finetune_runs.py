"""What a run of losia-fx finetune came to, and when two came to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file


class RunResult(NamedTuple):
    """By rank: exit codes, and what was printed to stdout and stderr."""

    codes: list[int]
    seconds: float
    out: list[str]
    err: list[str]


class Run(Protocol):
    def __call__(
        self,
        argv: list[str],
        kill_after: float | None = None,
        kill_when: Path | None = None,
        ranks: int = 1,
        victim: int | None = None,
    ) -> RunResult: ...


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], list[Any], list[Any], list[Any]]:
    """What must be the same of two runs: weights, losses, evaluations, re-selections."""
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    losses = [(step["step"], step["loss"], step["lr"], step["group"]) for step in record["steps"]]
    return load_file(out / "model.safetensors"), losses, record["evaluations"], record["history"]


def assert_same_outcome(one: Path, other: Path) -> None:
    (weights, *record), (others, *other_record) = outcome(one), outcome(other)
    assert record == other_record
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name
    first, second = (read_delta(out / "delta" / "delta.safetensors") for out in (one, other))
    assert first == second  # both tell the difference to the first base, not to a checkpoint


def read_delta(path: Path) -> tuple[str, dict[str, list[Any]]]:
    with safe_open(path, "pt") as opened:
        return opened.metadata()["delta"], {name: opened.get_tensor(name).tolist() for name in sorted(opened.keys())}
