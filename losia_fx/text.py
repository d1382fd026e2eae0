"""Text on disk -> documents -> a train and a held-out part -> blocks of tokens of one length.

The split is a fact of the files' names, not of a seed: two runs over the same files hold out the same text, so
their figures can be compared, and text held out by one run is never trained on by the next.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import LosiaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.08
PIECE = 4096  # characters: some 1000 tokens, long against a block
PIECES_AT_ONCE = 64  # tokenizers work on them in parallel
# Tests are no prose of the library, and the others are mostly tables: they would be the easiest part to predict.
LEFT_OUT_OF_STDLIB = frozenset(
    {"test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True)
class Document:
    """One text and the name that decides on which side of the split it falls."""

    name: str
    text: str


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Every document of the given files and folders, in order of name within each path.

    A file ending in .jsonl holds one object a line, whose field "text" is a document; any other file is a document.
    Both may be gzipped (.gz). In a folder, hidden and binary files are passed over; a binary file named by itself is
    an error. Raises LosiaError naming the path (and line) for anything missing, unreadable or without text.
    """
    documents = [document for path in paths for document in _documents_of(path)]
    if not any(document.text.strip() for document in documents):
        raise LosiaError(f"no text in {', '.join(map(str, paths)) or 'an empty list of paths'}")
    return documents


def standard_library() -> list[Document]:
    """The sources of the running interpreter's standard library, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    kept = [name for name in names if LEFT_OUT_OF_STDLIB.isdisjoint(name.parts)]
    # A few files keep old encodings on purpose; what matters here is text, so they are replaced, not refused.
    documents = [Document(name.as_posix(), (root / name).read_text("utf-8", errors="replace")) for name in kept]
    if not documents:
        raise LosiaError(f"{root}: this interpreter has no standard library sources; name your own text with --data")
    return documents


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out): by the hash of each name, or, where that leaves a side empty, by position in every text."""
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[_name_hash(document.name) < HELD_OUT_SHARE].append(document)
    if sides[0] and sides[1]:
        return sides
    cuts = [round(len(document.text) * (1 - HELD_OUT_SHARE)) for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [Document(d.name, d.text[:cut]) for d, cut in pairs], [Document(d.name, d.text[cut:]) for d, cut in pairs]


def token_blocks(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int,
    seed: int,
    piece: int = PIECE,
) -> Tensor:
    """(n, length) int64 token ids, 1 <= n <= limit: pieces of the texts in seeded order, an end token after each text.

    Only as much is tokenized as the limit asks for, so that a short run over a large corpus starts at once; and in
    pieces (of ``piece`` characters), so that it still sees a bit of many texts instead of the whole of a few.
    Raises LosiaError where the text is shorter than one block.
    """
    pieces = [(document.text, start) for document in documents for start in range(0, len(document.text), piece)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pieces), generator=generator, device="cpu").tolist()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    while order and len(tokens) < limit * length:
        some = [pieces[index] for index in order[:PIECES_AT_ONCE]]
        del order[:PIECES_AT_ONCE]
        # verbose=False: the warning about texts longer than the model's context means nothing, they are cut below
        encoded = tokenizer([t[at : at + piece] for t, at in some], add_special_tokens=False, verbose=False)
        for (text, start), ids in zip(some, encoded["input_ids"], strict=True):
            tokens += ids + (end if start + piece >= len(text) else [])
    count = min(limit, len(tokens) // length)
    if count == 0:
        where = documents[0].name if documents else "no documents"
        raise LosiaError(f"{where}: {len(tokens)} tokens of text are less than one block of {length}")
    return torch.tensor(tokens[: count * length], device="cpu").view(count, length)


def held_out_blocks(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, *, limit: int
) -> Tensor:
    """At most ``limit`` blocks, spread evenly over the text; no seed, so that every run is judged by the same ones."""
    blocks = token_blocks(documents, tokenizer, length, limit=16 * limit, seed=0)
    return blocks[torch.linspace(0, len(blocks) - 1, min(limit, len(blocks)), device=blocks.device).long()]


def batches(blocks: Tensor, size: int, *, seed: int) -> Iterator[Tensor]:
    """Endless batches (size, length) of the blocks, in a new seeded order on each pass over them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        while len(order) < size:
            order = torch.cat((order, torch.randperm(len(blocks), generator=generator, device="cpu")))
        yield blocks[order[:size]]
        order = order[size:]


def _documents_of(path: Path) -> Iterator[Document]:
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path)
            if not any(part.startswith(".") for part in name.parts) and not _is_binary(file):
                yield from _documents_of_file(file, name.as_posix())
    elif path.is_file():
        yield from _documents_of_file(path, path.name)
    else:
        raise LosiaError(f"{path}: no such file or folder")


def _documents_of_file(path: Path, name: str) -> Iterator[Document]:
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LosiaError(f"{path}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None
    except (OSError, EOFError) as error:
        raise LosiaError(f"{path}: cannot be read: {error}") from None
    if ".jsonl" not in path.suffixes[-2:]:
        yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Document(f"{name}#{number}", _text_field(line, f"{path}: line {number}"))


def _text_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise LosiaError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise LosiaError(f'{where}: expected an object with a string field "text"')
    return str(record["text"])


def _read_bytes(path: Path, size: int = -1) -> bytes:
    if path.suffix != ".gz":
        with path.open("rb") as file:
            return file.read(size)
    with gzip.open(path, "rb") as file:
        return bytes(file.read(size))


def _is_binary(path: Path) -> bool:
    try:
        return b"\0" in _read_bytes(path, 4096)
    except (OSError, EOFError) as error:
        raise LosiaError(f"{path}: cannot be read: {error}") from None


def _name_hash(name: str) -> float:
    """Uniform in [0, 1), the same on every machine (hash() of a string is not)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
