"""One file -> its rows, by its name: plain text, JSON, JSON lines, csv, parquet, each also compressed."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from losia_fx.errors import LosiaError

BINARY = 4096  # bytes, among which a binary file has a zero
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # how Windows tools begin the text that they save as "Unicode"
PLAIN, JSON, LINES, CSV, PARQUET = "plain text", "JSON", "JSON lines", "csv", "parquet"
KINDS = {".jsonl": LINES, ".ndjson": LINES, ".json": JSON, ".csv": CSV, ".tsv": CSV, ".parquet": PARQUET}
_TABLE = "a table of a kind that is not read: save it as .csv or .parquet"
_PAGES = "pages, which are no plain text: convert them to .txt"
NO_TEXT = {
    **dict.fromkeys(".tab .xls .xlsx .ods .arrow .feather .orc .avro".split(), _TABLE),
    **dict.fromkeys(".pdf .doc .docx .odt .rtf .epub".split(), _PAGES),
}
"""What files of such names hold, and what to do."""


def _open_zst(path: Path, mode: str) -> BinaryIO:
    try:
        from compression import zstd  # Python 3.14
    except ModuleNotFoundError:
        try:
            import zstandard as zstd
        except ModuleNotFoundError:
            raise LosiaError(f"{path}: needs zstandard: pip install zstandard, or decompress the file") from None
    opened: BinaryIO = zstd.open(path, mode)
    return opened


OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


@dataclass(frozen=True)
class Row:
    """One example as it stands in a file, and where: "notes.jsonl: line 3"."""

    where: str
    value: Any


def kind_of(path: Path) -> str:
    """Raises LosiaError for a kind of file that holds no text."""
    suffix = Path(path.stem if path.suffix.lower() in OPENERS else path.name).suffix.lower()
    if suffix in NO_TEXT:
        raise LosiaError(f"{path}: {NO_TEXT[suffix]}")
    return KINDS.get(suffix, PLAIN)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file: objects of a table, or the one text of a plain file.

    Raises LosiaError naming the file, the line where there is one, and what to do.
    """
    kind = kind_of(path)
    data = _read(path)
    if kind == PARQUET:
        return list(_parquet(data, path))
    text = _decode(data, path)
    if kind == LINES:
        return list(_lines(text, path))
    if kind == JSON:
        return list(_json(text, path))
    if kind == CSV:
        return list(_csv(text, path))
    if _is_json(text):
        raise LosiaError(f"{path}: holds JSON, which is no prose: call it .json or .jsonl, and its columns are read")
    return [Row(str(path), {"text": text})] if text.strip() else []


def _read(path: Path) -> bytes:
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            return bytes(file.read())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise LosiaError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # zstandard has an error of its own
        if type(error).__name__ != "ZstdError":
            raise
        raise LosiaError(f"{path}: cannot be read: {error}") from None


def _decode(data: bytes, path: Path) -> str:
    encoding = "utf-16" if data.startswith(UTF_16) else "utf-8-sig"
    if encoding != "utf-16" and b"\0" in data[:BINARY]:
        raise LosiaError(f"{path}: a binary file: convert it to text or leave it out")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise LosiaError(f"{path}: not UTF-16 text, as its first bytes say; convert it or leave it out") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise LosiaError(
            f"{path}: line {line}: not UTF-8 text (byte {error.start}); convert it or leave it out"
        ) from None


def _lines(text: str, path: Path) -> Iterator[Row]:
    if re.match(r"\s*(\[\s*{|{\s*\n)", text) and _parses(text):
        raise LosiaError(f"{path}: one JSON value, not a line an example: call it .json")
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split at U+2028 too
        if line.strip():
            where = f"{path}: line {number}"
            try:
                yield Row(where, json.loads(line))
            except (ValueError, RecursionError) as error:
                raise LosiaError(f"{where}: not JSON: {error}") from None


def _json(text: str, path: Path) -> Iterator[Row]:
    """An array of objects or of texts, an object, or lines under the name of an array, as many have them."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.strip() or _is_json(text):
            yield from _lines(text, path)
            return
        raise LosiaError(f"{path}: not JSON: {error}") from None
    for number, entry in enumerate(found if isinstance(found, list) else [found], 1):
        yield Row(f"{path}: entry {number}", {"text": entry} if isinstance(entry, str) else entry)


def _csv(text: str, path: Path) -> Iterator[Row]:
    tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes)
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    names = _header(reader, path)
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise LosiaError(f"{path}: line {max(start, 2)}: not csv: {error}") from None
        where = f"{path}: line {max(start, 2)}"
        if None in row or None in row.values():
            raise LosiaError(f"{where}: has not the {len(names)} columns of the header: quote what holds a separator")
        yield Row(where, dict(row))


def _header(reader: csv.DictReader[str], path: Path) -> list[str]:
    try:
        names = list(reader.fieldnames or ())
    except csv.Error as error:
        raise LosiaError(f"{path}: line 1: not csv: {error}") from None
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise LosiaError(f"{path}: line 1: two columns are called {twice[0]!r}: rename one of them")
    return names


def _parquet(data: bytes, path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise LosiaError(f"{path}: cannot be read as parquet: {error}") from None
    for number, row in enumerate(rows, 1):
        yield Row(f"{path}: row {number}", {name: bare(value) for name, value in row.items()})


def bare(value: Any) -> Any:
    """A value of a column without the keys that hold nothing: a table gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: bare(entry) for key, entry in value.items() if entry is not None}
    return [bare(entry) for entry in value] if isinstance(value, list) else value


def _is_json(text: str) -> bool:
    """Whether the whole of it is an array or an object, or every line is one."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    return _parses(text) or all(_parses(line) for line in text.split("\n") if line.strip())


def _parses(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (list, dict))
    except (ValueError, RecursionError):
        return False
