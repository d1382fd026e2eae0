"""The models that are fine-tuned, each with the text that it knows."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ..pretrain.command import new_model, pretrain, train_tokenizer
from . import text
from .text import Corpus, token_blocks

SHIPPED = text.PERL.parent / "default_model"
BASES = ("perl", "python")
"""By what they were pretrained on."""


@dataclass(frozen=True)
class Base:
    """A folder with a model and its tokenizer; known: what it was pretrained on, held out."""

    name: str
    path: Path
    known: Corpus

    def tokenizer(self) -> PreTrainedTokenizerFast:
        found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(self.path, local_files_only=True)
        return found

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path, local_files_only=True)


def base_of(name: str, cache: Path, steps: int, device: torch.device, console: Console) -> Base:
    """The shipped model, or one that is pretrained here on the standard library, once, and kept in ``cache``."""
    if name == "perl":
        return Base(name, SHIPPED, text.unseen_perl())
    known, path = text.standard_library(), cache / f"base-{name}-{steps}"
    if not path.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _pretrain(path, known, steps, device, console)
    return Base(name, path, known)


def _pretrain(path: Path, known: Corpus, steps: int, device: torch.device, console: Console) -> None:
    """As the shipped model was made. The folder appears once all of it is there."""
    tokenizer = train_tokenizer(known.train)
    model: Any = new_model(tokenizer, seed=0)
    model.to(device)
    pretrain(model, token_blocks(known.train, tokenizer).to(device), steps=steps, seed=0, console=console)
    made = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if not path.is_dir():  # another part of the runs may have been first, and made the same
            made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)
