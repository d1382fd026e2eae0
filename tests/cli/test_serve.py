"""What the command leaves goes on elsewhere: transformers' pipeline serves it, PEFT loads the adapter made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from losia_fx.cli import main
from losia_fx.finetune import job as finetune_job
from tests.cli.tiny import numbers, save_model


def test_served_and_as_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    for name in ("plot_losses", "plot_subnets"):
        monkeypatch.setattr(finetune_job, name, lambda path, *record: path.write_bytes(b""))
    base, out, adapter = save_model(tmp_path / "base"), tmp_path / "out", tmp_path / "adapter"
    data = tmp_path / "numbers.txt"
    data.write_text(numbers(400), encoding="utf-8")
    size = ("--seq-length", "32", "--batch-size", "4", "--compiler", "eager", "--steps", "4", "--period", "1")
    assert main(["finetune", "--model", str(base), "--data", str(data), "--out", str(out), *size]) == 0

    served = pipeline("text-generation", model=str(out), device="cpu")
    text = served("value_7 = ", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("value_7 = ")

    delta = str(out / "delta" / "delta.safetensors")
    assert main(["delta", "export", delta, "--model", str(base), "--out", str(adapter), "--rank", "32"]) == 0
    plain, tuned = (AutoModelForCausalLM.from_pretrained(f, local_files_only=True).eval() for f in (base, out))
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        before, expected = plain(ids).logits, tuned(ids).logits
        found = peft.PeftModel.from_pretrained(plain, str(adapter)).eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float((expected - before).abs().max()) > 100 * float((found - expected).abs().max())
