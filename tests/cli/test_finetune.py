"""losia-fx finetune, from its arguments to the files it leaves."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from losia_fx.cli import main
from losia_fx.config import LosiaConfig
from losia_fx.errors import ConfigError
from losia_fx.finetune import job as finetune_job
from losia_fx.finetune import trainer as finetune_trainer
from losia_fx.finetune.inputs import TEMPLATE, default_rate
from losia_fx.finetune.options import add_arguments, training_options
from losia_fx.finetune.record import RunRecord
from losia_fx.finetune.settings import ASSETS, EMBEDDED_MODEL, EMBEDDED_OLD_TEXT, FinetuneSettings
from losia_fx.finetune.trainer import RunTrainer
from losia_fx.optim import SubnetRMS
from losia_fx.storage.atomic import write_file
from losia_fx.tools.pretrain.text import Document, held_out_blocks, held_out_loss
from tests.cli.tiny import chats, completions, numbers, save_model

SMALL = ("--batch-size", "4", "--seq-length", "32", "--compiler", "eager")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Some thousand tokens of a text with a pattern that is quickly learnt."""
    path = tmp_path / "numbers.txt"
    path.write_text(numbers(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer and so two groups, random, with the embedded tokenizer: compiled in a second."""
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the run of such a test; the first test looks at real pictures."""
    for name in ("plot_losses", "plot_subnets"):
        monkeypatch.setattr(finetune_job, name, lambda path, *record: path.write_bytes(b""))


def finetune(out: Path, data: Path, *more: str) -> int:
    return main(["finetune", "--out", str(out), "--data", str(data), *SMALL, *more])


def run_json(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text(encoding="utf-8")))


def test_a_run_learns_and_leaves_everything(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert finetune(out, data, "--steps", "20", "--period", "2") == 0
    text = capsys.readouterr().out
    assert re.search(r"step 20/20  loss \d\.\d+  [\d,]+ tokens/s  profiling \S+  lr", text)
    before, after = (float(x) for x in re.search(r"new: numbers.txt │ +([\d.]+) │ +([\d.]+)", text).groups())  # type: ignore[union-attr]
    assert after < before - 0.3
    assert re.search(r"old: Perl manual │ +3\.\d+ │", text)
    for line in (r"trained parameters │ [\d,]+ of 1,303,680", r"time per step +│ \d+ ms", r"peak memory +│ [\d,]+ MiB"):
        assert re.search(line, text)
    assert re.search(r"re-selections +│ 10 over 5 groups", text)

    for picture in ("losses.png", "subnets.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    run = run_json(out)
    assert [step["step"] for step in run["steps"]] == list(range(1, 21))
    assert run["evaluations"][-1]["new"] == pytest.approx(after, abs=1e-3)
    assert (
        run["settings"] | {"steps": 20, "period": 2, "lr": 1e-2, "device": run["settings"]["device"]} == run["settings"]
    )
    assert [event["group"] for event in run["history"]] == [0, 1, 2, 3, 4] * 2
    assert not list(out.glob(".*"))  # no drafts


@pytest.mark.usefixtures("no_pictures")
def test_the_checkpoint_it_wrote_is_a_model_to_go_on_from(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert finetune(first, data, "--model", str(tiny), "--steps", "5") == 0
    assert "old:" not in capsys.readouterr().out  # what this model knew before, nobody has said
    lines = tmp_path / "lines.jsonl"
    texts = [f"def f{n}():\n    return {n}\n" * 20 for n in range(40)]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    options = ("--dtype", "bfloat16", "--gradient-checkpointing", "--accumulate", "2", "--old-data", str(data))
    assert finetune(second, lines, "--model", str(first), "--steps", "5", "--lr", "3e-3", *options) == 0
    text = capsys.readouterr().out
    assert "new: lines.jsonl" in text
    assert f"{lines}: read as JSON lines, column text: 40 examples\n{data}: read as plain text\n" in text
    assert "old: numbers.txt" in text
    assert AutoModelForCausalLM.from_pretrained(second, local_files_only=True).dtype == torch.bfloat16
    assert (run_json(first)["settings"]["lr"], run_json(second)["settings"]["lr"]) == (1e-2, 3e-3)


@pytest.mark.usefixtures("no_pictures")
def test_what_was_judged_is_what_was_written(tmp_path: Path, tiny: Path, data: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert finetune(first, data, "--model", str(tiny), "--steps", "5") == 0
    assert finetune(second, data, "--model", str(first), "--steps", "1") == 0
    before, after = run_json(second)["evaluations"][0], run_json(first)["evaluations"][-1]
    assert before["new"] == pytest.approx(after["new"], abs=1e-4)
    assert run_json(first)["evaluations"][0]["new"] > after["new"] + 0.01


@pytest.mark.usefixtures("no_pictures")
def test_the_best_of_a_run_is_what_was_written(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate far too high: what comes after the first step is worse, and the table's last figure is not the model's."""
    few = (
        "--model",
        str(tiny),
        "--steps",
        "3",
        "--period",
        "1",
        "--eval-steps",
        "1",
        "--lr-scheduler-type",
        "constant",
    )
    options = ("--lr", "1", "--load-best-model-at-end", "--warmup-steps", "2")
    assert finetune(tmp_path / "out", data, *few, *options) == 0
    judged = run_json(tmp_path / "out")["evaluations"][1:]
    best = min(judged, key=lambda evaluation: float(evaluation["new"]))
    assert best["step"] < 3
    assert f"the model is taken back to step {best['step']}, the best by loss" in capsys.readouterr().out
    assert finetune(tmp_path / "again", data, "--model", str(tmp_path / "out"), "--steps", "1") == 0
    assert run_json(tmp_path / "again")["evaluations"][0]["new"] == pytest.approx(best["new"], abs=1e-4)


@pytest.mark.usefixtures("no_pictures")
def test_runs_of_one_seed_are_alike(tmp_path: Path, tiny: Path, data: Path) -> None:
    losses = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert finetune(tmp_path / name, data, "--model", str(tiny), "--steps", "3", "--seed", seed) == 0
        losses.append([step["loss"] for step in run_json(tmp_path / name)["steps"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-5)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "5", "--period", "3"], "--period 2 would fit"),
        (["--steps", "1", "--rule", "paper"], "give at least 2 steps"),
        (["--steps", "4", "--period", "2"], ""),
        (["--steps", "3", "--period", "3", "--schedule", "all"], ""),
        (["--steps", "2", "--period", "3", "--schedule", "all"], "(1 group x period 3 = 3)"),
    ],
)
def test_a_run_shorter_than_a_round_says_which_period_fits(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str], options: Sequence[str], said: str
) -> None:
    assert finetune(tmp_path / "out", data, "--model", str(tiny), *options) == 0
    text = capsys.readouterr().out
    assert said in text
    assert ("warning" in text) == bool(said)


@pytest.mark.usefixtures("no_pictures")
def test_groups_that_move_with_every_step_are_counted_and_recorded_now_and_then(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roaming = ["--schedule", "all", "--importance", "random", "--head-rows", "frequent", "--count-steps", "3"]
    assert finetune(tmp_path / "out", data, "--model", str(tiny), "--steps", "20", "--period", "1", *roaming) == 0
    assert re.search(r"re-selections +│ 20, all groups at once, one a step", capsys.readouterr().out)
    moves = [(move["step"], move["group"]) for move in run_json(tmp_path / "out")["history"]]
    assert moves == [(3, 0), (16, 1), (20, 1)]  # the head once, when it had counted; the others at the end too


@pytest.mark.usefixtures("no_pictures")
def test_a_head_at_its_own_pace_is_recorded_by_itself(tmp_path: Path, tiny: Path, data: Path) -> None:
    argv = ["--model", str(tiny), "--steps", "20", "--rule", "roaming", "--head-period", "8", "--profile-steps", "2"]
    assert finetune(tmp_path / "out", data, *argv) == 0
    record = run_json(tmp_path / "out")
    moves = [(move["step"], move["group"], move["captured"] is None) for move in record["history"]]
    assert moves == [(16, 0, False), (16, 1, True), (20, 1, True)]
    assert [step["group"] for step in record["steps"]] == [0 if t % 8 in (6, 7) else None for t in range(20)]


@pytest.mark.parametrize(
    ("given", "roams"),
    [
        ({}, True),
        ({"rank_factor": 0.25, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}, True),
        ({"head_period": 5}, True),
        ({"period": 5}, False),
        ({"importance": "first"}, False),
        ({"optim": "sgd"}, False),
        ({"adam_beta2": 0.99}, False),
        ({"optim": "sgd", "rule": "roaming"}, True),
        ({"period": 5, "rule": "roaming"}, True),
        ({"rule": "paper"}, False),
    ],
)
def test_which_rule_is_taken(given: Mapping[str, Any], roams: bool) -> None:
    settings = FinetuneSettings.of(given)
    assert settings.roams is roams
    assert settings.flat()["rule"] == ("roaming" if roams else "paper")
    assert (settings.config().importance == "random") is roams
    assert settings.config().head_period == (given.get("head_period", 50) if roams else None)
    assert settings.config().period == given.get("period", 1 if roams else 50)


def test_a_run_in_8_bits_alone_tracks_no_delta_unless_asked() -> None:
    given: dict[str, Any] = {"frozen_products": "int8", "keep_dense": False}
    assert not FinetuneSettings.of(given).config().track_delta
    assert FinetuneSettings.of({"frozen_products": "int8"}).config().track_delta
    with pytest.raises(ConfigError, match="--keep-dense False and track_delta=True"):
        FinetuneSettings.of({**given, "track_delta": True})


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("options", "optimizer", "head", "said"),
    [
        ([], SubnetRMS, (3, 3), "subnets drawn anew after every step (the head's rows chosen after 3)"),
        (["--rule", "roaming", "--period", "4", "--optim", "sgd"], torch.optim.SGD, (3, 4), "after 4 steps (the head"),
        (
            ["--rule", "roaming", "--head-period", "13"],
            SubnetRMS,
            (13, 10),
            "warning: 12 steps are less than the head's",
        ),
        (["--head-period", "2"], SubnetRMS, (2, None), "(the head's rows chosen after 2)"),
        (["--rule", "roaming", "--profile-steps", "5"], SubnetRMS, (5, 5), "(the head's rows chosen after 5)"),
        (["--profile-steps", "5"], torch.optim.AdamW, (None, 5), "period 5:"),
        (["--rule", "paper"], torch.optim.AdamW, (None, None), "period 1:"),
    ],
)
def test_a_rule_brings_its_pace_and_its_optimizer(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], optimizer: type[torch.optim.Optimizer], head: tuple[int | None, int | None], said: str,
) -> None:  # fmt: skip
    made: list[Any] = []
    plain = RunTrainer.create_optimizer
    monkeypatch.setattr(RunTrainer, "create_optimizer", lambda *args: made.append(plain(*args)) or made[-1])
    assert finetune(tmp_path / "out", data, "--model", str(tiny), "--steps", "12", *options) == 0
    assert {type(each) for each in made} == {optimizer}
    settings = run_json(tmp_path / "out")["settings"]
    assert (settings["head_period"], settings["profile_steps"]) == head
    text = capsys.readouterr().out
    assert said in " ".join(text.split())
    assert ("warning" in text) == said.startswith("warning")


@pytest.mark.usefixtures("no_pictures")
def test_norms_do_not_decay(tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[tuple[float, int, set[int]]] = []

    def watch(trainer: RunTrainer) -> torch.optim.Optimizer:
        found = plain(trainer)
        groups.extend((g["weight_decay"], len(g["params"]), {p.dim() for p in g["params"]}) for g in found.param_groups)
        return found

    plain = RunTrainer.create_optimizer
    monkeypatch.setattr(RunTrainer, "create_optimizer", watch)
    argv = ["--model", str(tiny), "--steps", "2", "--weight-decay", "0.1", "--trainable", "*norm*"]
    assert finetune(tmp_path / "out", data, *argv) == 0
    assert groups[:2] == [
        (0.1, 8, {2}),
        (0.0, 3, {1}),
    ]  # seven linears and the head; two norms of the block, and the last


@pytest.mark.usefixtures("no_pictures")
def test_no_delta_where_none_is_wanted(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["--model", str(tiny), "--steps", "4", "--resume", "--track-delta", "false"]
    assert finetune(out, data, *argv) == 0
    assert "delta.safetensors" not in capsys.readouterr().out
    assert not (out / "delta").exists()
    assert "track_delta: false" in (out / "finetune.yaml").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "options", [["--output-rank-factor", "0"], ["--head-rows", "fixed"], ["--exclude", "lm_head"]], ids=" ".join
)
def test_of_a_head_that_does_not_move_no_pace_is_told(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    pace = ["--rule", "roaming", "--head-period", "9"]
    assert finetune(tmp_path / "out", data, "--model", str(tiny), "--steps", "3", *pace, *options) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "drawn anew after every step: for" in text
    assert "warning" not in text


@pytest.mark.usefixtures("no_pictures")
def test_the_rows_of_a_head_are_recorded_as_of_when_it_moved(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were as of the step at which all moves are looked at."""
    pace = ("--rule", "roaming", "--head-period", "9", "--profile-steps", "2")
    assert finetune(tmp_path / "out", data, "--model", str(tiny), "--steps", "20", *pace) == 0
    assert "20, all groups but the head at once, one a step" in capsys.readouterr().out
    run = run_json(tmp_path / "out")
    assert [(move["step"], move["group"]) for move in run["history"]] == [(9, 0), (16, 1), (18, 0), (20, 1)]
    assert [selection["step"] for selection in run["selections"]["lm_head.weight"]] == [0, 9, 18]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, presses: int) -> None:
    follow = finetune_trainer.follow_subnets

    def press(model: Any, record: RunRecord, now: int) -> None:
        follow(model, record, now)
        if now == step:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(finetune_trainer, "follow_subnets", press)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_leaves_a_checkpoint(
    tmp_path: Path,
    tiny: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    presses: int,
) -> None:
    interrupt_at(3, monkeypatch, presses)
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGINT)
    assert finetune(out, data, "--model", str(tiny), "--steps", "50") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "interrupted after 3 of 50 steps" in capsys.readouterr().out
    run = run_json(out)
    assert run["interrupted"]
    assert len(run["steps"]) == 3
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    start = AutoModelForCausalLM.from_pretrained(tiny, local_files_only=True)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, start.get_parameter(name))]
    assert changed
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert (out / "subnets.png").is_file()


def test_ctrl_c_before_training_writes_nothing(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(settings: FinetuneSettings, on_cpu: bool) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_job, "load", load)
    assert finetune(tmp_path / "out", data) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--steps", "0"], "--steps 0: give a whole number of at least 1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--seq-length", "1"], "--seq-length 1: give a whole number of at least 2"),
        (["--seq-length", "4096"], "--seq-length 4096: this model has positions for 512 tokens"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--accumulate", "0"], "--accumulate 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--lr", "0"], "--lr 0.0: give a number above 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--rank-factor", "1.5"], "--rank-factor 1.5: give a number in (0, 1]"),
        (["--period", "0"], "--period 0"),
        (["--epochs", "0"], "--epochs 0.0: give a number above 0"),
        (["--held-out", "1"], "--held-out 1.0: give a share"),
        (["--target", "nothing"], "nothing"),
        (["--schedule", "often"], "argument --schedule: invalid choice: 'often'"),
        (["--profile-steps", "9", "--period", "3"], "--profile-steps 9"),
        (["--packing", "maybe"], "argument --packing: 'maybe': give true or false"),
        (["--lr-scheduler-type", "wavy"], "wavy"),
        (["--optim", "magic"], "magic"),
        (["--resume-from-checkpoint", "x"], "--resume goes on from the newest"),
        (["--seed", "4294967296"], "--seed 4294967296: give a whole number of at least 0, below 2**32"),
        (["--eval-steps", "0"], "--eval-steps 0.0: give a whole number of at least 1"),
        (["--per-device-eval-batch-size", "0"], "--per-device-eval-batch-size 0: give a whole number of at least 1"),
        (["--eval-accumulation-steps", "0"], "--eval-accumulation-steps 0: give a whole number of at least 1"),
        (["--batch-size", "99999999999"], "--batch-size 99999999999: give a whole number below 2**31"),
        (["--dataloader-num-workers", "-1"], "--dataloader-num-workers -1: give a whole number of at least 0"),
        (["--weight-decay", "nan"], "--weight-decay nan: give a finite number"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: give a number of at least 0"),
        (["--lr", "inf"], "--lr inf: give a finite number"),
        (["--lr-scheduler-kwargs", "0.1"], "argument --lr-scheduler-kwargs: '0.1': give a JSON object"),
        (["--dataset-kwargs", '{"skip_prepare_dataset": true}'], "--dataset-kwargs: its one key"),
        (["--held-out", "0.5", "--eval-data", "a"], "--held-out 0.5: --eval-data says what to judge by"),
        (
            ["--eval-strategy", "no", "--eval-data", "a"],
            "--eval-data: with --eval-strategy no there is nothing to judge",
        ),
        (["--held-out", "0", "--old-data", "a"], "--old-data: with --held-out 0 there is nothing to judge by"),
        (
            ["--held-out", "0", "--load-best-model-at-end"],
            "--load-best-model-at-end: with --held-out 0 there is nothing",
        ),
        (["--data", ""], "data '': names nothing"),
        (["--device", "meta"], "--device meta: there is no such device here"),
        (["--out", __file__ + "/out"], f"--out {__file__}/out: {__file__} cannot be written to"),
        (["--warmup-rato", "0.1"], "unrecognized arguments: --warmup-rato 0.1: did you mean --warmup-"),
        (["--trust-remote-code"], "--trust-remote-code: a checkpoint's own code is never run"),
        (["--chat-template", "nowhere.jinja"], "--chat-template nowhere.jinja: cannot be read"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--compiler", "gcc"], "argument --compiler: invalid choice: 'gcc'"),
        (["--device", "toaster"], "--device toaster:"),
        (["--model", "nowhere"], "--model nowhere: is no folder with a transformers checkpoint"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--old-data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: Sequence[str], said: str
) -> None:
    assert main(["finetune", "--out", str(tmp_path / "out"), *args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("losia-fx: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--packing-strategy", "magic"], "trl.SFTTrainer: Invalid packing strategy 'magic'"),
        (["--max-length", "none"], "trl.SFTTrainer: When packing is enabled, `max_length` can't be `None`"),
        (["--assistant-only-loss"], "the dataset is not conversational"),
        (["--completion-only-loss"], "--completion-only-loss: the data holds text, and no prompts with completions"),
        (["--eos-token", "nope"], "(given: --eos-token nope)"),
        (["--report-to", "magic"], "magic is not supported, only "),
        (["--log-level", "magic"], "trl.SFTTrainer: KeyError: 'magic' (given: --log-level magic)"),
        (["--save-strategy", "best"], "`args.metric_for_best_model` must be provided"),
        (
            ["--load-best-model-at-end", "--metric-for-best-model", "accuracy"],
            "--metric-for-best-model accuracy: there are loss and eval_loss",
        ),
        (["--lr-scheduler-type", "cosine_with_min_lr"], "schedule: One of min_lr or min_lr_rate should be set"),
        (["--optim", "lomo"], "the optimizer or its schedule: You need to install `lomo_optim`"),
        (["--optim-args", "x"], "(given: --optim-args x)"),
        (["--eval-data", "{long}"], "--eval-data: nothing is left to judge by within --seq-length 32: raise it"),
    ],
)
def test_what_the_libraries_refuse_is_one_line(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    """And it is refused before anything is written; which options were given is said where the library does not."""
    if args[-1] == "{long}":
        args[-1] = str(write_lines(tmp_path / "long.jsonl", [{"prompt": "x = 1\n" * 40, "completion": "y"}]))
        data = write_lines(tmp_path / "pairs.jsonl", completions())
    assert finetune(tmp_path / "out", data, "--model", str(tiny), "--steps", "1", *args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("losia-fx: ")
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_no_and_unknown_commands_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["fly"]):
        assert main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("no_pictures")
def test_out_is_not_written_over_unasked(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine", encoding="utf-8")
    assert finetune(out, data, "--steps", "2") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert finetune(out / "precious.txt", data) == 2
    assert "is a file" in capsys.readouterr().err
    assert finetune(out, data, "--model", str(tiny), "--steps", "2", "--overwrite") == 0
    assert (out / "precious.txt").read_text(encoding="utf-8") == "mine"


def test_checkpoints_of_another_program_are_not_removed(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Trainer that keeps the last two would take them for its own."""
    other = tmp_path / "out" / "checkpoint-5"
    other.mkdir(parents=True)
    assert finetune(tmp_path / "out", data, "--overwrite", "--checkpoint-every", "1") == 2
    assert "holds checkpoint-5 of another program" in capsys.readouterr().err


def test_a_model_is_never_written_over_by_its_own_run(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, model)
    assert finetune(model, data, "--model", str(model), "--overwrite") == 2
    assert "is the folder of the model itself" in capsys.readouterr().err


def test_a_broken_checkpoint_is_named(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, model)
    (model / "model.safetensors").write_bytes(b"nothing of the kind")
    assert finetune(tmp_path / "out", data, "--model", str(model)) == 2
    error = capsys.readouterr().err
    assert "cannot be loaded as a causal language model" in error
    assert error.count("\n") == 1


def test_help_needs_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, shown in (("--help", "--rank-factor"), ("--help-all", "--neftune-noise-alpha")):
        with pytest.raises(SystemExit) as end:
            main(["finetune", flag])
        assert end.value.code == 0
        assert shown in capsys.readouterr().out


def test_every_option_of_the_libraries_is_there() -> None:
    from trl import SFTConfig

    known = {option.name for option in fields(SFTConfig)}
    assert {option.name for option in training_options()} == known
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    written = {flag for action in parser._actions for flag in action.option_strings}
    for name in known | {option.name for option in fields(LosiaConfig)}:
        assert {f"--{name}", f"--{name.replace('_', '-')}"} <= written, name


def test_the_embedded_model_is_what_its_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, local_files_only=True)
    text = gzip.decompress(EMBEDDED_OLD_TEXT.read_bytes()).decode()
    blocks = held_out_blocks([Document("held out", text)], tokenizer, 128, limit=128)
    readme = (ASSETS / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"held-out, Perl manual +([\d.]+) nats", readme)
    assert stated is not None
    assert held_out_loss(model, blocks, 16) == pytest.approx(float(stated[1]), rel=0.02)
    assert (EMBEDDED_MODEL / "model.safetensors").stat().st_size <= 6_000_000
    assert not model.config.tie_word_embeddings


def test_the_learning_rate_is_chosen_by_the_size() -> None:
    assert default_rate(1_300_000) == default_rate(100_000) == 1e-2
    assert default_rate(7_000_000_000) == 5e-5
    rates = [default_rate(10**power) for power in range(6, 12)]
    assert rates == sorted(rates, reverse=True)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.usefixtures("no_pictures")
def test_chats_and_completions(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss on the answers alone; an example is shown as the model sees it."""
    talk, template = write_lines(tmp_path / "talk.jsonl", chats()), tmp_path / "template.jinja"
    few = ("--model", str(tiny), "--steps", "2", "--period", "1", "--show-example")
    assert finetune(tmp_path / "no", talk, *few) == 2
    error = capsys.readouterr().err
    assert "the tokenizer has no template for them: give --chat-template FILE" in error
    assert TEMPLATE in error  # one to copy
    template.write_text("{% broken", encoding="utf-8")
    assert finetune(tmp_path / "no", talk, *few, "--chat-template", str(template)) == 2
    assert f"does not fit {talk}: line 1: " in capsys.readouterr().err
    template.write_text(TEMPLATE, encoding="utf-8")
    assert finetune(tmp_path / "chats", talk, *few, "--chat-template", str(template)) == 0
    printed = capsys.readouterr().out
    assert "loss on the assistant's turns, judging by 2 held out" in printed
    assert re.search(r"<\|user\|>What follows \d+\?<\|assistant\|>>>It is \d+\.<\|endoftext\|><<", printed)
    assert AutoTokenizer.from_pretrained(tmp_path / "chats", local_files_only=True).chat_template == TEMPLATE

    pairs, judge = (write_lines(tmp_path / f"{n}.jsonl", completions(n)) for n in (24, 6))
    assert finetune(tmp_path / "pairs", pairs, *few, "--eval-data", str(judge), "--old-data", str(template)) == 0
    printed = capsys.readouterr().out
    assert "training on 24 examples of 24.jsonl, loss on completions, judging by 6 held out" in printed
    assert re.search(r"my \$x\d+ =>> \d+ \* shift;<\|endoftext\|><<", printed)
    assert "old: template.jinja" in printed


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said before it is all that such a test looks at."""
    for name in ("train", "write", "print_table"):
        monkeypatch.setattr(finetune_job, name, lambda *args: None)


def said_of(
    rows: Sequence[dict[str, Any]], template: str, out: Path, tiny: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    """All that a run over these chats says, in whichever stream."""
    (path := out.with_suffix(".jinja")).write_text(template, encoding="utf-8")
    chats_of = write_lines(out.with_suffix(".jsonl"), rows)
    few = ("--model", str(tiny), "--steps", "1", "--period", "1", "--held-out", "0")
    finetune(out, chats_of, *few, "--chat-template", str(path), *more)
    printed = capsys.readouterr()
    return printed.out + printed.err


@pytest.mark.usefixtures("no_training")
def test_a_template_that_does_not_fit_is_refused(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it makes of the chats would be trained on."""
    strict = "{% for m in messages %}{% if m.role == 'bot' %}{{ raise_exception('no bots') }}{% endif %}{{ m.content }}"
    bot = {"messages": [{"role": "bot", "content": "hello"}]}
    question = {"messages": [{"role": "user", "content": "hello?"}]}
    out = tmp_path / "out"
    for template, rows, said in (
        ("hello", chats(), "out.jsonl: line 1 say, but 'hello'"),
        ("{% for m in messages %}{{ m.contents }}{% endfor %}", chats(), "writes nothing of what the messages of"),
        (strict + "{% endfor %}", [*chats(3), bot], "out.jsonl: line 4: the chat template does not fit it: no bots"),
        (TEMPLATE, [*chats(3), question], "out.jsonl: line 4: no turn of the assistant, on which alone the loss is"),
    ):
        assert said in said_of(rows, template, out, tiny, capsys)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "missing prefix-preservation or `{% generation %}`" in said_of(
        chats(), plain, out, tiny, capsys, "--assistant-only-loss"
    )


@pytest.mark.usefixtures("no_training")
def test_what_a_template_leaves_out_is_said(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    unmarked, endless = "the chat template marks no turns of the assistant", "the chat template never writes '<|endoft"
    for template, said in ((plain, {unmarked, endless}), (plain + "{{ eos_token }}", {unmarked}), (TEMPLATE, set())):
        printed = said_of(chats(), template, tmp_path / "out", tiny, capsys)
        assert {line for line in (unmarked, endless) if line in printed} == said


@pytest.mark.usefixtures("no_training")
def test_chats_need_not_be_alike(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other keys, other tools, other arguments: each is trained on as it stands in its own line."""
    template = TEMPLATE.replace("{{ m.content }}{{ eos", "{{ m.content }}{{ m.tool_calls | tojson }}{{ eos")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "?", name: value},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {name: value}}}]},
            ],
            "tools": [{"type": "function", "function": {"name": name, "parameters": {name: value}}}],
        }
        for name, value in (("one", 1), ("two", "x"), ("one", ["y"]))
    ]
    for row, call in zip(rows, ('{"one": 1}', '{"two": "x"}', '{"one": ["y"]}'), strict=True):
        others = [row, *(other for other in rows if other is not row)]
        printed = said_of(others, template, tmp_path / "out", tiny, capsys, "--show-example", "--seq-length", "64")
        assert f'"arguments": {call}' in printed
        assert "null" not in printed


@pytest.mark.usefixtures("no_training")
def test_what_goes_before_what_is_said(
    tmp_path: Path, tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, said in (
        (("--steps", "5", "--epochs", "2"), "--steps 5 goes before --epochs 2"),
        (
            ("--steps", "5", "--warmup-steps", "9"),
            "warning: --warmup-steps 9: the learning rate never comes to its peak",
        ),
        (("--steps", "400"), ", 3 times over, loss on every token"),
        (("--epochs", "4"), ", 4 times over, loss on every token"),
        (("--steps", "5", "--eval-strategy", "no"), "training on 587 blocks of 32 tokens"),
        (("--steps", "5"), "training on 541 blocks of 32 tokens of numbers.txt, loss on every token, judging by 46"),
    ):
        assert finetune(tmp_path / "out", data, "--model", str(tiny), "--period", "1", *options) == 0
        assert said in capsys.readouterr().out


@pytest.mark.usefixtures("no_training")
def test_data_of_ones_own_is_passed_over_three_times(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded model's steps are those of its own text."""
    assert finetune(tmp_path / "out", data, "--epochs", "1") == 0
    once = re.findall(r"([\d,]+) steps", capsys.readouterr().out)[0]
    assert finetune(tmp_path / "out", data, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert int(re.findall(r"([\d,]+) steps", printed)[0]) == 3 * int(once)
    assert ", 3 times over, " in printed


@pytest.mark.usefixtures("no_pictures")
def test_what_is_cut_or_left_out_is_said(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*completions(8), {"prompt": "x = 1\n" * 40, "completion": "y"}, {"prompt": "x", "completion": " y" * 90}]
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    few = ("--model", str(tiny), "--steps", "1", "--period", "1", "--held-out", "0")
    assert finetune(tmp_path / "out", pairs, *few) == 0
    printed = capsys.readouterr().out
    assert "1 of them reach --seq-length 32 and end there" in printed
    assert "1 more have no token with loss within it, and are left out" in printed
    assert "Held-out loss" not in printed


@pytest.mark.usefixtures("no_pictures")
def test_a_run_writes_the_yaml_that_repeats_it(tmp_path: Path, tiny: Path, data: Path) -> None:
    options = ("--model", str(tiny), "--steps", "3", "--learning-rate", "2e-3", "--weight_decay", "0.1")
    more = ("--period", "1", "--importance", "gradient", "--exclude", "q_proj", "v_proj", "--beta1", "0.5")
    assert finetune(tmp_path / "one", data, *options, *more) == 0
    config = tmp_path / "one" / "finetune.yaml"
    assert main(["finetune", "--config", str(config), "--out", str(tmp_path / "two")]) == 0
    one, two = run_json(tmp_path / "one"), run_json(tmp_path / "two")
    assert [step["loss"] for step in one["steps"]] == [step["loss"] for step in two["steps"]]
    assert one["settings"] == two["settings"]
    assert (one["settings"]["exclude"], one["settings"]["beta1"]) == (["q_proj", "v_proj"], 0.5)
    assert config.read_text(encoding="utf-8") == (tmp_path / "two" / "finetune.yaml").read_text(encoding="utf-8")
    assert main(["finetune", "--config", str(config), "--out", str(tmp_path / "three"), "--steps", "1"]) == 0
    assert len(run_json(tmp_path / "three")["steps"]) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: fast\n", "options.yaml: argument --lr: invalid float value: 'fast'"),
        ("colour: red\n", "options.yaml: unrecognized arguments: --colour red"),
        ("- lr\n", "options.yaml: give names of options and their values"),
        ("lr: [\n", "options.yaml: not YAML"),
        ("rank-factor: 2\n", "--rank-factor 2.0: give a number in (0, 1]"),
        ("lr: 1\nlearning-rate: 2\n", "options.yaml: learning-rate: --lr is there twice, under two names"),
        ("help: true\n", "options.yaml: help: a file of options has no such option"),
        ("model: null\ntarget: null\nlr: 0\n", "--lr 0.0: give a number above 0"),
    ],
)
def test_a_wrong_yaml_is_one_line(tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
    assert main(["finetune", "--config", str(tmp_path / "options.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("no_pictures")
def test_a_tied_head_is_said(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = save_model(tmp_path / "tied", tie_word_embeddings=True)
    few = ("--model", str(tied), "--steps", "1", "--period", "1")
    assert finetune(tmp_path / "one", data, *few) == 0
    remedy = "--train-tied-head trains it"
    assert remedy in capsys.readouterr().out
    assert finetune(tmp_path / "two", data, *few, "--train-tied-head") == 0
    assert remedy not in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_logs_go_to_tensorboard(tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    few = ("--model", str(tiny), "--steps", "4", "--period", "2", "--logging-steps", "1")
    assert finetune(tmp_path / "out", data, *few, "--report-to", "tensorboard") == 0
    found = EventAccumulator(str(tmp_path / "logs")).Reload()
    losses = [event.value for event in found.Scalars("train/loss")]
    assert losses == pytest.approx([step["loss"] for step in run_json(tmp_path / "out")["steps"]], rel=1e-4)
    names = set(found.Tags()["scalars"])
    assert {"eval/loss", "train/losia/active_group", "train/losia/moved", "train/losia/captured"} <= names


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old", encoding="utf-8")

    def fail(draft: Path) -> None:
        draft.write_text("half", encoding="utf-8")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(path, fail)
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
