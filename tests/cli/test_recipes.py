"""The programs of docs/recipes.md, each as it stands there, on a tiny model."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import losia_fx
from losia_fx.finetune.inputs import TEMPLATE
from tests.cli.tiny import chats, numbers, save_model

PAGE = (Path(losia_fx.__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_there_are_five_and_they_are_short() -> None:
    assert len(RECIPES) == 5
    assert all(program.count("\n") < 25 for program in RECIPES.values())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if "GRPO" in n or "domain" in n else []) for n in RECIPES]
)
def test_a_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(losia_fx, "transform", functools.partial(losia_fx.transform, compiler="eager"))
    save_model(tmp_path / "my-model", TEMPLATE, max_position_embeddings=256)
    write_lines(tmp_path / "chats.jsonl", chats(16))
    (tmp_path / "notes").mkdir()
    for number in range(3):
        (tmp_path / "notes" / f"{number}.txt").write_text(numbers(200), encoding="utf-8")
    prompts = [f"my $x{n} =" for n in range(16)]
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    pairs = [{"prompt": prompt, "chosen": " shift;", "rejected": " print print"} for prompt in prompts]
    write_lines(tmp_path / "preferences.jsonl", pairs)
    reviews = "".join(f"text number {n},{n % 2}\n" for n in range(16))
    (tmp_path / "reviews.csv").write_text("text,label\n" + reviews, encoding="utf-8")

    exec(compile(RECIPES[name], f"docs/recipes.md: {name}", "exec"), {"__name__": "__main__"})

    kind = AutoModelForSequenceClassification if name == "A classifier" else AutoModelForCausalLM
    tuned, start = (kind.from_pretrained(tmp_path / folder, local_files_only=True) for folder in ("tuned", "my-model"))
    before = dict(start.named_parameters())
    blocks = [(n, p) for n, p in tuned.named_parameters() if "layers.0" in n and p.dim() == 2]
    assert blocks
    for parameter_name, parameter in blocks:
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, before[parameter_name]), parameter_name
