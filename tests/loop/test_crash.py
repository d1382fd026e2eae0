"""losia-fx finetune --resume: killed at any moment it goes on, and ends with the very bits of a run that was not."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from losia_fx.cli import main
from losia_fx.finetune import job as finetune_job
from losia_fx.finetune import trainer as finetune_trainer
from losia_fx.finetune.checkpoints import MARK, folders, newest_whole
from losia_fx.storage.tensors import read_tensors, write_tensors
from tests.loop.finetune_runs import Run, assert_same_outcome


@pytest.fixture(scope="module")
def argv(inputs: list[str]) -> list[str]:
    return [*inputs, "--dtype", "bfloat16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def whole(argv: list[str], run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbed and that kept no checkpoints, and how long it took."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run([*argv, "--out", str(out)])
    assert done.codes == [0], done.err
    assert not folders(out)
    return out, done.seconds


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    argv: list[str], run: Run, whole: tuple[Path, float], kills: int, tmp_path: Path
) -> None:
    out, (undisturbed, seconds) = tmp_path / "out", whole
    argv = [*argv, "--out", str(out), "--resume", "--checkpoint-every", "1"]
    moments = random.Random(kills)
    assert run(argv, kill_when=out / "checkpoint-*" / MARK).codes == [-signal.SIGKILL]
    for _ in range(kills - 1):
        assert run(argv, kill_after=moments.uniform(0.2, 1.2) * seconds).codes[0] in (0, -signal.SIGKILL)
        assert len(folders(out)) <= 3  # the last two, and a third while the oldest is on its way out
    assert run(argv).codes == [0]
    assert_same_outcome(undisturbed, out)
    assert not folders(out)
    assert not [path for path in out.iterdir() if path.name.endswith(".draft")]
    before = (out / "run.json").read_bytes()
    assert run(argv).codes == [0]  # finished: nothing is done again
    assert (out / "run.json").read_bytes() == before


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], Any]) -> None:
    follow = finetune_trainer.follow_subnets

    def stop(model: Any, record: Any, now: int) -> None:
        follow(model, record, now)
        if now == step:
            how()

    monkeypatch.setattr(finetune_trainer, "follow_subnets", stop)


@pytest.fixture
def half(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The arguments of a run that Ctrl-C ended after five steps, to be resumed."""
    for name in ("plot_losses", "plot_subnets"):
        monkeypatch.setattr(finetune_job, name, lambda path, *record: path.write_bytes(b""))
    argv = [*argv, "--out", str(tmp_path / "out"), "--resume", "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        stop_after(5, patch, lambda: signal.raise_signal(signal.SIGINT))
        assert main(argv) == 130
    assert [folder.name for folder in folders(tmp_path / "out")] == ["checkpoint-4", "checkpoint-5"]
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


def test_a_roaming_run_goes_on_from_a_checkpoint(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("plot_losses", "plot_subnets"):
        monkeypatch.setattr(finetune_job, name, lambda path, *record: path.write_bytes(b""))
    argv = [*argv, "--rule", "roaming"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    cut = [*argv, "--out", str(tmp_path / "cut"), "--resume", "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        stop_after(5, patch, lambda: signal.raise_signal(signal.SIGINT))
        assert main(cut) == 130
    assert main(cut) == 0
    assert_same_outcome(tmp_path / "whole", tmp_path / "cut")


def test_killed_after_the_last_checkpoint(half: list[str], whole: tuple[Path, float], tmp_path: Path) -> None:
    """All steps are made, and nothing is written yet: no step more."""
    out = tmp_path / "out"

    def interrupted(*args: object) -> None:  # not a signal: a shell that puts jobs behind has them ignore it
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_job, "write", interrupted)
        assert main(half) == 130
    assert not (out / "run.json").exists()
    assert main(half) == 0
    assert_same_outcome(whole[0], out)


def test_a_finished_run_of_other_settings_is_no_success(
    half: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(half) == 0
    assert main([*half, "--lr", "1e-3", "--period", "3"]) == 2
    said = (
        f"--out {tmp_path / 'out'}: holds a finished run of other settings: --lr was 0.003 and is 0.001, --period was"
    )
    assert said in capsys.readouterr().err
    assert main(half) == 0


def test_a_run_from_before_there_were_rules_goes_on_by_the_paper_s(
    half: list[str], whole: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def forget_the_rule() -> None:
        options = (out / "finetune.yaml").read_text(encoding="utf-8")
        (out / "finetune.yaml").write_text(options.replace("rule: paper\n", ""), encoding="utf-8")
        for folder in folders(out):
            tensors, plain = read_tensors(folder / MARK)
            assert plain["identity"]["options"].pop("rule") == "paper"
            write_tensors(folder / MARK, tensors, plain)

    forget_the_rule()
    assert main([*half, "--rule", "roaming"]) == 2
    assert "--rule was paper and is roaming" in capsys.readouterr().err
    assert main(["finetune", "--config", str(out / "finetune.yaml"), "--out", str(out), "--resume"]) == 0
    assert_same_outcome(whole[0], out)
    forget_the_rule()
    assert main(half) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert main([*half, "--rule", "roaming"]) == 2
    assert "--rule was paper and is roaming" in capsys.readouterr().err


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


def test_a_damaged_checkpoint_is_passed_over(
    half: list[str], whole: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with it is said, and the one before is taken: to the bit, all the same."""
    newest, said = tmp_path / "out" / "checkpoint-5", list[str]()
    for file in sorted(newest.iterdir()):
        good = file.read_bytes()
        for bad in (good[:-1], good[:200], good[:-5] + b"\0" + good[-4:-1] + b"\1", b""):
            file.write_bytes(bad)
            found = newest_whole(tmp_path / "out", said.append)
            if bad == good:
                continue
            assert found is not None
            assert found.name == "checkpoint-4"
            assert said.pop() == f"{newest}: {file.name}: damaged or missing: passed over"
        file.write_bytes(good)
    (newest / MARK).unlink()
    assert main(half) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-5: was cut short: passed over" in printed
    assert "going on after step 4" in printed
    assert_same_outcome(whole[0], tmp_path / "out")


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
    from losia_fx.finetune import checkpoints

    def fail(path: Path, *more: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensors", fail)
        assert main(half) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert main(half) == 0
    printed = capsys.readouterr().out
    assert f"checkpoint-6: {MARK}: damaged or missing: passed over" in printed
    assert "going on after step 5" in printed
