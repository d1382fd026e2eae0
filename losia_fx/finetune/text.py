"""Text on disk -> documents -> a train and a held-out part -> blocks of tokens of one length.

The split is a fact of the files' names, not of a seed: two runs over the same files hold out the same text, so
their figures can be compared, and text held out by one run is never trained on by the next.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losia_fx.errors import LosiaError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.08
PIECE = 4096  # characters: some 1000 tokens, long against a block
PIECES_AT_ONCE = 64  # tokenizers work on them in parallel
BINARY = 4096  # bytes, among which a binary file has a zero
# Tests are no prose of the library, and the others are mostly tables: they would be the easiest part to predict.
LEFT_OUT_OF_STDLIB = frozenset(
    {"test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)

LINES = (".jsonl", ".ndjson")
_TABLE = 'a table, which is no text: write its column of texts as .jsonl, a line {"text": ...} each'
_PAGES = "pages, which are no plain text: convert them to .txt"
NO_TEXT = {
    **dict.fromkeys(".csv .tsv .tab .xls .xlsx .ods .parquet .arrow .feather .orc .avro".split(), _TABLE),
    **dict.fromkeys(".pdf .doc .docx .odt .rtf .epub".split(), _PAGES),
}
"""What files of such names hold, and what to do."""
PLAIN, JSON, JSON_LINES = "plain text", 'JSON, field "text"', 'JSON lines, field "text"'


class _NotTextError(LosiaError):
    """A file that holds no text to train on: an error where it is named by itself, passed over in a folder."""


@dataclass(frozen=True)
class Document:
    """One text and the name that decides on which side of the split it falls."""

    name: str
    text: str


Say = Callable[[str], object]


def ignore(line: str) -> None:
    """For what nobody needs to be told."""


def read_documents(paths: Sequence[Path], say: Say = ignore) -> list[Document]:
    """Every document of the given files and folders, in order of name within each path.

    By a file's name: .jsonl and .ndjson hold one object a line, whose field "text" is a document; .json an array of
    such objects or of strings (or one, or lines of them); any other file is one document of plain text. All may be
    gzipped (.gz). What holds no text (tables, PDF and the like, other JSON, binary files) is an error where it is named
    by itself and passed over in a folder, as hidden files are. say: is told of each path what it is read as, in a line.

    Raises LosiaError naming the path (and line) for anything missing, unreadable or without text.
    """
    documents = [document for path in paths for document in _documents_of(path, say)]
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


def _documents_of(path: Path, say: Say) -> list[Document]:
    if path.is_dir():
        return _documents_of_folder(path, say)
    if not path.is_file():
        raise LosiaError(f"{path}: no such file or folder")
    kind, documents = _documents_of_file(path, path.name)
    say(f"{path}: read as {kind}" + ("" if kind == PLAIN else f", {len(documents):,} documents"))
    return documents


def _documents_of_folder(folder: Path, say: Say) -> list[Document]:
    documents: list[Document] = []
    kinds: Counter[str] = Counter()
    passed: list[str] = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        try:
            kind, found = _documents_of_file(file, name.as_posix())
        except _NotTextError:
            passed.append(name.as_posix())
            continue
        kinds[kind] += 1
        documents += found
    read = "; ".join(f"{count:,} files read as {kind}" for kind, count in kinds.items()) or "no file read"
    say(f"{folder}: {read}" + (f"; passed over, as no text: {listed(passed)}" if passed else ""))
    return documents


def _documents_of_file(path: Path, name: str) -> tuple[str, list[Document]]:
    """What the file is read as, and its documents."""
    suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
    if suffix in NO_TEXT:
        raise _NotTextError(f"{path}: {NO_TEXT[suffix]}")
    text = _read_text(path)
    if suffix in LINES:
        return JSON_LINES, _documents_of_lines(text, path, name)
    if suffix == ".json":
        return _documents_of_json(text, path, name)
    if _is_json(text):
        raise _NotTextError(
            f'{path}: holds JSON, which is no prose: call it .json or .jsonl, and its field "text" is read'
        )
    return PLAIN, [Document(name, text)]


def _documents_of_lines(text: str, path: Path, name: str) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise LosiaError(f"{where}: not JSON: {error}") from None
            documents.append(Document(f"{name}#{number}", _text_field(record, where)))
    return documents


def _documents_of_json(text: str, path: Path, name: str) -> tuple[str, list[Document]]:
    kind, found = JSON, _parsed(text)
    if found is None:  # lines under the name of an array, as many have them
        kind, found = JSON_LINES, [_parsed(line) for line in text.split("\n") if line.strip()]
    entries = found if isinstance(found, list) else [found]
    if not all(isinstance(entry, str) or _has_text(entry) for entry in entries):
        raise _NotTextError(
            f'{path}: no text to train on: expected an array of objects with a string field "text", or of strings'
        )
    texts = (entry if isinstance(entry, str) else entry["text"] for entry in entries)
    return kind, [Document(f"{name}#{number}", text) for number, text in enumerate(texts, 1)]


def _is_json(text: str) -> bool:
    """Whether the whole of it is an array or an object, or every line is one."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    return _parsed(text) is not None or all(_parsed(line) is not None for line in text.split("\n") if line.strip())


def _parsed(text: str) -> list[Any] | dict[str, Any] | None:
    """The array or object that the text is; None of any other."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, (list, dict)) else None


def _has_text(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("text"), str)


def _text_field(record: Any, where: str) -> str:
    if not _has_text(record):
        raise LosiaError(f'{where}: expected an object with a string field "text"')
    return str(record["text"])


def _read_text(path: Path) -> str:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            data = bytes(file.read(BINARY))
            if b"\0" in data:
                raise _NotTextError(f"{path}: a binary file: convert it to text or leave it out")
            data += file.read()
    except (OSError, EOFError) as error:
        raise LosiaError(f"{path}: cannot be read: {error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LosiaError(f"{path}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None


def _name_hash(name: str) -> float:
    """Uniform in [0, 1), the same on every machine (hash() of a string is not)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
