"""The export as a LoRA adapter: PEFT loads it, and at full rank it is the tuned model."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import losia_fx
from losia_fx.cli import main
from losia_fx.delta import lora as lora_export
from losia_fx.delta.format import WeightRecord, digest, write_delta
from losia_fx.method.visits import Piece, as_integers
from tests.delta.made import OPTIONS, train
from tests.support.toys import batch, tiny_llama


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, Path]:
    """The tuned model; beside its delta lies its base."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    losia_fx.transform(model, trainable=("*norm*",), **{**OPTIONS, "rank_factor": 0.25})
    train(model, 8)
    losia_fx.save_delta(model, tmp_path / "d.safetensors")
    return model, tmp_path / "d.safetensors"


def export(delta: Path, rank: int) -> Path:
    out = delta.parent / f"rank{rank}"
    arguments = ["--model", str(delta.parent / "base"), "--out", str(out), "--rank", str(rank)]
    assert main(["delta", "export", str(delta), *arguments]) == 0
    return out


def logits_with(adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", local_files_only=True)
    model = peft.PeftModel.from_pretrained(base, str(adapter))
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def test_at_full_rank_peft_makes_the_tuned_model_of_it(
    llama: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, delta = llama
    ids = batch()
    adapter = export(delta, 48)
    text = capsys.readouterr().out
    assert "0.000% of the energy of all 15 weights is lost" in text
    for norm in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert f"not in the adapter: {norm} (weight of a LlamaRMSNorm)" in text
    plain = losia_fx.restore(copy.deepcopy(model))
    start = tiny_llama().from_pretrained(delta.parent / "base")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():  # what a LoRA cannot hold stays as it was
            if "norm" in name:
                parameter.copy_(start.get_parameter(name))
        expected, before = plain(ids).logits, start(ids).logits
    found = logits_with(adapter, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - before).abs().max()) > 100 * float((found - expected).abs().max())


def test_a_small_rank_loses_what_it_says(llama: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, delta = llama
    adapter = export(delta, 2)
    text = capsys.readouterr().out
    start = tiny_llama().from_pretrained(delta.parent / "base")
    tensors = load_file(adapter / "adapter_model.safetensors")
    subnets = losia_fx.subnets(model)
    assert len(tensors) == 2 * len(subnets)
    for name, subnet in subnets.items():
        values = torch.linalg.svdvals((subnet.weight - start.get_parameter(name)).detach().double())
        lost = float(values[2:].square().sum() / values.square().sum())
        row = re.search(rf"{re.escape(name)} +│.+│ +([\d.]+)%", text)
        assert row is not None
        assert float(row[1]) == pytest.approx(100 * lost, abs=2e-3)
        a = tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"]
        b = tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        assert (a.shape, b.shape) == ((2, subnet.weight.shape[1]), (subnet.weight.shape[0], 2))
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 2, "CAUSAL_LM")
    assert logits_with(adapter, batch()).isfinite().all()


def whole_delta(base: Any, tuned: Any, names: list[str], file: Path) -> None:
    """A delta of weights kept whole, for what this test does not want to train."""
    records, pieces = [], {}
    for name in names:
        before, after = base.get_parameter(name), tuned.get_parameter(name)
        records.append(WeightRecord(name, tuple(before.shape), before.dtype, 0, digest(before), digest(after)))
        pieces[name] = [Piece((as_integers(before) ^ as_integers(after)).reshape(-1))]
    write_delta(file, type(base).__name__, records, pieces)


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    names = ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_proj.weight"]
    with torch.no_grad():
        for name in names:
            tuned.get_parameter(name).add_(torch.randn_like(tuned.get_parameter(name)))
    whole_delta(base, tuned, names, tmp_path / "d.safetensors")
    adapter = export(tmp_path / "d.safetensors", 16)
    ids = batch()
    with torch.no_grad():
        expected = tuned(ids).logits
    torch.testing.assert_close(logits_with(adapter, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_change_that_no_lora_can_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    for name, value, said in (
        ("model.norm.weight", 2.0, "changes no linear weight"),
        ("lm_head.weight", float("nan"), "lm_head.weight: its change is not finite"),
    ):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            tuned.get_parameter(name).view(-1)[0] = value
        whole_delta(base, tuned, [name], tmp_path / "d.safetensors")
        arguments = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--rank", "2"]
        assert main(["delta", "export", str(tmp_path / "d.safetensors"), *arguments]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_large_changes_are_near_the_best_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    change = torch.randn(90, 70) @ torch.diag(torch.linspace(1, 0.01, 70) ** 2) @ torch.randn(70, 80)
    change[::3] = 0
    best = torch.linalg.svdvals(change)[4:].square().sum()
    a, b = lora_export.truncate(change, 4)
    torch.testing.assert_close((change - b @ a).square().sum(), best, rtol=1e-4, atol=0)
    monkeypatch.setattr(lora_export, "LARGEST_EXACT", 8)
    state = torch.get_rng_state()
    a, b = lora_export.truncate(change, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert float((change - b @ a).square().sum()) < 1.01 * float(best)
    again = lora_export.truncate(change, 4)
    assert torch.equal(again[0], a)
    assert torch.equal(again[1], b)
