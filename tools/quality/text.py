"""Text on this machine -> a train and a held-out part, split by file -> blocks of tokens."""

from __future__ import annotations

import gzip
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losia_fx.errors import LosiaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LENGTH = 128
"""Tokens of a block."""
WINDOWS = 128
"""Held-out blocks that a text is judged by."""
HELD_OUT_SHARE = 0.08
NO_PROSE = frozenset({"test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3", "site-packages", "__pycache__"})
"""Folders of the standard library that hold tests and tables: they would be the easiest part to predict."""
PERL = Path(__file__).resolve().parents[2] / "losia_fx" / "assets" / "old_domain_heldout.txt.gz"
"""Of the Perl manual, what the shipped model has not seen."""


@dataclass(frozen=True)
class Corpus:
    """A text, by documents: what is trained on, and what is judged by."""

    name: str
    train: list[str]
    held_out: list[str]


def standard_library() -> Corpus:
    """The sources of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in root.rglob("*.py") if NO_PROSE.isdisjoint(file.relative_to(root).parts))
    return _by_file("python", root, files)


def perl_manual() -> Corpus:
    """The shipped part of the Perl manual. It is one text: the end of it is held out."""
    text = gzip.decompress(PERL.read_bytes()).decode()
    cut = round(len(text) * (1 - HELD_OUT_SHARE))
    return Corpus("perl", [text[:cut]], [text[cut:]])


def unseen_perl() -> Corpus:
    """The same, all of it held out: for the model that the rest of the manual has made."""
    return Corpus("perl", [], [gzip.decompress(PERL.read_bytes()).decode()])


def folder(path: Path) -> Corpus:
    """Every text file in a folder; one that is gzipped, not UTF-8, hidden or has a zero byte is passed over."""
    if not path.is_dir():
        raise LosiaError(f"{path}: no such folder")
    return _by_file(path.resolve().name, path, (file for file in path.rglob("*") if file.is_file()))


def installed_documentation() -> Path | None:
    """The reST sources of Debian's newest python3-doc, where it is installed."""
    found = sorted(Path("/usr/share/doc").glob("python3*/html/_sources"), key=lambda path: (len(str(path)), str(path)))
    return found[-1] if found else None


def _by_file(name: str, root: Path, files: Iterable[Path]) -> Corpus:
    sides: tuple[list[str], list[str]] = ([], [])
    for file in sorted(files):
        inside = file.relative_to(root)
        if any(part.startswith(".") for part in inside.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            sides[_share_below(inside.as_posix()) < HELD_OUT_SHARE].append(text)
    if not all(sides):
        raise LosiaError(f"{root}: {sum(map(len, sides))} files of text: too few to hold some out")
    return Corpus(name, *sides)


def _share_below(name: str) -> float:
    """From 0 to 1, the same on every machine: the split is a fact of the names, not of a seed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def token_blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(n, LENGTH) int64: all of the texts, each with an end token. Raises LosiaError for less than a block."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    count = len(tokens) // LENGTH
    if not count:
        raise LosiaError(f"{len(tokens)} tokens of text are less than one block of {LENGTH}")
    return torch.tensor(tokens[: count * LENGTH], device="cpu").view(count, LENGTH)


def windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """At most WINDOWS blocks, spread evenly over the text: every run is judged by the same."""
    blocks = token_blocks(texts, tokenizer)
    return blocks[torch.linspace(0, len(blocks) - 1, min(WINDOWS, len(blocks)), device="cpu").long()]
