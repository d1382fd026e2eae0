"""losia-fx finetune --resume: killed at any moment it goes on, and ends with the very bits of a run that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from losia_fx import finetune_job
from losia_fx.cli import main
from losia_fx.finetune import EMBEDDED_MODEL
from losia_fx.run_state import LOSIA, RUN, WEIGHTS, folders

STEPS = 12
Run = Callable[..., tuple[int, float]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a tiny model with dropout, in bfloat16, and a text."""
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
    options = ["--steps", str(STEPS), "--period", "2", "--batch-size", "2", "--seq-length", "32", "--lr", "3e-3"]
    options += ["--accumulate", "2", "--dtype", "bfloat16", "--compiler", "eager", "--device", "cpu"]
    return ["finetune", "--model", str(folder / "model"), "--data", str(text), *options]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the other processes: bits are promised for the same number of threads only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs losia-fx in a process of its own, if asked for a limited time only; returns its exit code and seconds."""
    path = Path(__file__).with_name("zygote.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def order(argv: list[str], kill_after: float | None = None) -> tuple[int, float]:
        process.stdin.write(json.dumps({"argv": argv, "kill_after": kill_after}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return answer["code"], answer["seconds"]

    yield order
    process.stdin.close()
    process.wait(timeout=60)


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


@pytest.fixture(scope="module")
def whole(inputs: list[str], run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbed and that kept no checkpoints, and how long it took."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, seconds = run([*inputs, "--out", str(out)])
    assert code == 0
    assert not (out / "checkpoints").exists()
    return out, seconds


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    inputs: list[str], run: Run, whole: tuple[Path, float], kills: int, tmp_path: Path
) -> None:
    out, (undisturbed, seconds) = tmp_path / "out", whole
    argv = [*inputs, "--out", str(out), "--resume", "--checkpoint-every", "1"]
    moments = random.Random(kills)
    killed, seen = 0, []
    for _ in range(kills):
        code, _ = run(argv, kill_after=moments.uniform(0.2, 1.2) * seconds)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        seen.append([folder.name for folder in folders(out)])
        assert len(seen[-1]) <= 3  # the last two, and a third while one of them is on its way
    code, _ = run(argv)
    assert code == 0
    assert killed, seen
    assert_same_outcome(undisturbed, out)
    assert not (out / "checkpoints").exists()
    assert not [path for path in out.iterdir() if path.name.endswith(".draft")]
    before = (out / "run.json").read_bytes()
    assert run(argv)[0] == 0  # finished: nothing is done again
    assert (out / "run.json").read_bytes() == before


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], Any]) -> None:
    follow = finetune_job.follow_subnets

    def stop(model: Any, record: Any, now: int) -> None:
        follow(model, record, now)
        if now == step:
            how()

    monkeypatch.setattr(finetune_job, "follow_subnets", stop)


@pytest.fixture
def half(
    inputs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The arguments of a run that Ctrl-C ended after five steps, to be resumed."""
    for name in ("plot_losses", "plot_subnets"):
        monkeypatch.setattr(finetune_job, name, lambda path, *record: path.write_bytes(b""))
    argv = [*inputs, "--out", str(tmp_path / "out"), "--resume", "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        stop_after(5, patch, lambda: signal.raise_signal(signal.SIGINT))
        assert main(argv) == 130
    assert [folder.name for folder in folders(tmp_path / "out")] == ["step-00000004", "step-00000005"]
    capsys.readouterr()
    return argv


def test_ctrl_c_then_resume(
    half: list[str], whole: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(half) == 0
    assert "going on after step 5" in capsys.readouterr().out
    assert_same_outcome(whole[0], tmp_path / "out")
    assert main(half) == 0
    assert "holds a finished run: there is nothing to resume" in capsys.readouterr().out


def test_what_cannot_be_gone_on_from_is_said(
    half: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else entirely\n" * 3000, encoding="utf-8")
    changed = [*half[: half.index("--data")], "--data", str(other), *half[half.index("--data") + 2 :]]
    for argv, said in (
        ([*half, "--lr", "1e-3"], "a run goes on with the settings it began with: --lr was 0.003 and is 0.001"),
        ([*half, "--period", "3"], "--period was 2 and is 3"),
        (changed, "trained on other text"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    newest = folders(tmp_path / "out")[-1]
    for name in (WEIGHTS, LOSIA, RUN):
        file = newest / name
        good = file.read_bytes()
        for bad in (good[:-1], good[:200], good[:-5] + b"\0" + good[-4:-1] + b"\1", b""):
            file.write_bytes(bad)
            assert main(half) == 2
            assert f"{newest.name}/{name}" in capsys.readouterr().err
        file.unlink()
        assert main(half) == 1
        assert name in capsys.readouterr().err
        file.write_bytes(good)


def test_resume_wants_a_run_with_checkpoints(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine", encoding="utf-8")
    assert main([*inputs, "--out", str(out), "--resume"]) == 2
    assert "holds no run with checkpoints" in capsys.readouterr().err
    assert main([*inputs, "--out", str(out), "--checkpoint-every", "0"]) == 2
    assert "--checkpoint-every 0" in capsys.readouterr().err


def test_a_full_disk_keeps_the_checkpoint_before(
    half: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from losia_fx import run_state

    write, calls = run_state.write_tensors, []

    def fail(path: Path, *more: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "write_tensors", fail)
        assert main(half) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [folder.name for folder in folders(tmp_path / "out")] == ["step-00000004", "step-00000005"]
    assert not list((tmp_path / "out" / "checkpoints").glob(".*"))
    assert main(half) == 0
