"""A tiny model and text for losia-fx finetune, and processes of its own to run it in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.loop.finetune_runs import Run, RunResult


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a tiny model with dropout, in bfloat16, and a text."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from losia_fx.finetune.settings import EMBEDDED_MODEL

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL, local_files_only=True).save_pretrained(folder / "model")
    text = folder / "numbers.txt"
    text.write_text("".join(f"value_{n} = compute({n % 7})\n" for n in range(1500)), encoding="utf-8")
    options = ["--steps", "12", "--period", "2", "--seq-length", "32", "--lr", "3e-3", "--accumulate", "2"]
    options += ["--compiler", "eager", "--device", "cpu"]
    return ["finetune", "--model", str(folder / "model"), "--data", str(text), *options]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs losia-fx in processes of its own, if asked for a limited time only."""
    path, prints = Path(__file__).with_name("zygote.py"), tmp_path_factory.mktemp("prints") / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def order(
        argv: list[str],
        kill_after: float | None = None,
        kill_when: Path | None = None,
        ranks: int = 1,
        victim: int | None = None,
    ) -> RunResult:
        when = None if kill_when is None else str(kill_when)
        asked = {"argv": argv, "ranks": ranks, "kill_after": kill_after, "kill_when": when, "victim": victim}
        process.stdin.write(json.dumps({**asked, "prints": str(prints)}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        said = [Path(f"{prints}.{r}.{s}").read_text(encoding="utf-8") for r in range(ranks) for s in ("out", "err")]
        return RunResult(answer["codes"], answer["seconds"], said[::2], said[1::2])

    yield order
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in those processes: bits are promised for the same number of threads only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
