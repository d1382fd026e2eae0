"""losia-fx delta: from the files that finetune leaves to checkpoints and adapters, and what it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from losia_fx.cli import main
from losia_fx.delta.format import fingerprint, write_delta
from losia_fx.delta.read import DeltaFile
from losia_fx.finetune import job as finetune_job
from losia_fx.finetune.settings import EMBEDDED_MODEL


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)  # tests begin at 0, and one makes another of this
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL, local_files_only=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tuned(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What finetune makes of the base, in the base's dtype and in another."""
    folder = tmp_path_factory.mktemp(request.param)
    data = folder / "numbers.txt"
    data.write_text("".join(f"value_{n} = compute({n % 7})\n" for n in range(1500)), encoding="utf-8")
    size = ("--batch-size", "4", "--seq-length", "32", "--compiler", "eager", "--dtype", request.param)
    run = ("--data", str(data), "--model", str(base), "--steps", "8", "--period", "2", "--lr", "1e-2")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_losses", "plot_subnets"):
            patch.setattr(finetune_job, name, lambda path, *record: path.write_bytes(b""))
        assert main(["finetune", "--out", str(folder / "out"), *run, *size]) == 0
    yield folder / "out"
    shutil.rmtree(folder)


def delta_of(tuned: Path) -> Path:
    return tuned / "delta" / "delta.safetensors"


def test_apply_and_undo_make_the_checkpoints_byte_for_byte(base: Path, tuned: Path, tmp_path: Path) -> None:
    delta, applied, undone = delta_of(tuned), tmp_path / "applied", tmp_path / "undone"
    assert main(["delta", "apply", str(delta), "--model", str(base), "--out", str(applied)]) == 0
    assert (applied / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert AutoTokenizer.from_pretrained(applied, local_files_only=True)("def f")["input_ids"]
    assert main(["delta", "undo", str(delta), "--model", str(tuned), "--out", str(undone)]) == 0
    dtype = AutoModelForCausalLM.from_pretrained(tuned, local_files_only=True).dtype
    expected = load_file(base / "model.safetensors")
    for name, tensor in load_file(undone / "model.safetensors").items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_show(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["delta", "show", str(delta_of(tuned))]) == 0
    text = capsys.readouterr().out
    assert f"{delta_of(tuned)}: what it changes in a LlamaForCausalLM" in text
    elements = 0
    with DeltaFile(delta_of(tuned)) as delta:
        for record in delta.records:
            held = sum(piece.values.numel() for piece in delta.pieces(record))
            elements += held
            row = re.search(rf"{re.escape(record.name)} +│(.+)│", text)
            assert row is not None
            cells = [cell.strip() for cell in row[1].split("│")]
            dtype, shape = str(record.dtype).removeprefix("torch."), " x ".join(map(str, record.shape))
            share = f"{held / record.size:.2%}"
            assert cells == [shape, dtype, str(record.visits), f"{held:,}", share, f"{delta.nbytes(record):,}"]
        assert f"{len(delta.records)} weights, {elements:,} elements of " in text
        assert f"{delta_of(tuned).stat().st_size:,} with the header" in text
        for which in ("base", "tuned"):
            assert re.search(rf"^{which} +{fingerprint(delta.records, which)}$", text, re.MULTILINE)


def test_a_run_that_was_stopped_before_a_step_leaves_no_delta(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for name in ("plot_losses", "plot_subnets"):
        monkeypatch.setattr(finetune_job, name, lambda path, *record: path.write_bytes(b""))
    monkeypatch.setattr(finetune_job.RunTrainer, "training_step", interrupt)
    out = tmp_path / "out"
    size = ("--batch-size", "2", "--seq-length", "32", "--compiler", "eager", "--steps", "2")
    assert main(["finetune", "--model", str(base), "--out", str(out), *size]) == 130
    assert "delta" not in capsys.readouterr().out
    assert (out / "run.json").is_file()
    assert not (out / "delta").exists()


@pytest.mark.parametrize(
    ("action", "model", "more", "said"),
    [
        ("apply", "tuned", [], "is applied already"),
        ("undo", "base", [], "is not applied: there is nothing to undo"),
        ("apply", "nowhere", [], "is no folder with a transformers checkpoint"),
        ("apply", "other", [], "is not that of the base model"),
        ("apply", "broken", [], "cannot be loaded"),
        ("export", "tuned", ["--rank", "2"], "is applied already"),
        ("export", "base", ["--rank", "0"], "--rank 0: give a whole number of at least 1"),
        ("export", "base", [], "the following arguments are required: --rank"),
        ("fly", "base", [], "invalid choice: 'fly'"),
    ],
)
def test_wrong_use_is_one_line(
    base: Path,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    action: str,
    model: str,
    more: Sequence[str],
    said: str,
) -> None:
    folder = {"tuned": tuned, "base": base}.get(model, tmp_path / model)
    if model in ("other", "broken"):
        shutil.copytree(base, folder)
        file = folder / "model.safetensors"
        if model == "other":
            LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(folder)
        else:
            file.write_bytes(b"nothing of the kind")
    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["delta", action, str(delta_of(tuned)), "--model", str(folder), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("losia-fx: ")
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_file_that_is_none_and_a_folder_that_is_full(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "d.safetensors", tmp_path / "out"
    for action in (["show"], ["apply", "--model", str(base), "--out", str(out)]):
        assert main(["delta", action[0], str(file), *action[1:]]) == 2
        assert "there is no such file" in capsys.readouterr().err
    out.mkdir()
    (out / "precious.txt").write_text("mine", encoding="utf-8")
    assert main(["delta", "apply", str(file), "--model", str(base), "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["delta", "apply", str(file), "--model", str(base), "--out", str(base), "--overwrite"]) == 2
    assert "is the folder of the model itself" in capsys.readouterr().err


def test_show_needs_nothing_heavy(tmp_path: Path) -> None:
    file = tmp_path / "empty.safetensors"
    write_delta(file, "Toy", [], {})
    code = (
        "import sys; from losia_fx.cli import main; "
        f"assert main(['delta', 'show', {str(file)!r}]) == 0; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"0 weights, 0 elements" in done.stdout
