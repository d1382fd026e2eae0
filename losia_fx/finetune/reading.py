"""What --data names -> examples of one shape: texts, prompts with completions, or chats. What was read is said."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losia_fx.errors import LosiaError, listed

from .files import PLAIN, Row, kind_of, read_rows

TEXT, COMPLETIONS, CHATS = "text", "prompt/completion", "messages"
Say = Callable[[str], object]


@dataclass(frozen=True)
class Examples:
    """Rows of one shape. TEXT: {"text"}; COMPLETIONS: {"prompt", "completion"}, both texts or both lists of messages;
    CHATS: {"messages"}, and "tools" where there are any."""

    shape: str
    rows: list[dict[str, Any]]

    @property
    def chats(self) -> bool:
        """Whether a chat template has to make text of them."""
        return self.shape == CHATS or (self.shape == COMPLETIONS and not isinstance(self.rows[0]["prompt"], str))


@dataclass(frozen=True)
class _Read:
    """What one file or dataset came to: examples, how many rows were empty, and what kind of file it is."""

    path: str
    kind: str
    examples: Examples
    empty: int


def read_examples(sources: Sequence[str], text_column: str | None, say: Say) -> Examples:
    """All of what the sources name. Raises LosiaError naming file, line or column, and what to do."""
    found = [part for source in sources for part in _read_source(source, text_column, say)]
    shapes = {part.examples.shape: part.path for part in found if part.examples.rows}
    if not shapes:
        raise LosiaError(f"no text in {listed(list(sources))}: name files that hold some")
    if len(shapes) > 1:
        named = ", ".join(f"{path} holds {shape}" for shape, path in shapes.items())
        raise LosiaError(f"{named}: train on one shape at a time, or turn one into the other")
    return Examples(next(iter(shapes)), [row for part in found for row in part.examples.rows])


def _read_source(source: str, text_column: str | None, say: Say) -> list[_Read]:
    path = Path(source)
    if path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        return _read_many(source, files, text_column, say)
    if path.is_file():
        found = _read_file(path, text_column)
    elif any(sign in source for sign in "*?["):
        files = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        if not files:
            raise LosiaError(f"{source}: matches no file")
        return _read_many(source, files, text_column, say)
    else:
        found = _read_dataset(source, text_column)
    say(f"{source}: read as {_described(found.kind, [found])}")
    return [found]


def _read_many(source: str, files: Sequence[Path], text_column: str | None, say: Say) -> list[_Read]:
    """Of several files one that cannot be read is passed over and named; so is prose beside tables of another shape."""
    found, passed = [], []
    root = Path(source)
    for file in files:
        try:
            found.append(_read_file(file, text_column))
        except LosiaError as error:
            passed.append(str(error).replace(f"{root}/", "", 1))
    tables = {part.examples.shape for part in found if part.kind != PLAIN and part.examples.rows}
    if tables and TEXT not in tables:
        passed += [f"{Path(part.path).name}: prose beside {', '.join(tables)}" for part in found if part.kind == PLAIN]
        found = [part for part in found if part.kind != PLAIN]
    read = []
    for kind, count in Counter(part.kind for part in found).items():
        described = _described(kind, [part for part in found if part.kind == kind])
        read.append(f"{count:,} {'file' if count == 1 else 'files'} read as {described}")
    say(f"{source}: {'; '.join(read) or 'no file read'}" + (f"; passed over: {'; '.join(passed)}" if passed else ""))
    return found


def _described(kind: str, parts: Sequence[_Read]) -> str:
    count, empty = sum(len(part.examples.rows) for part in parts), sum(part.empty for part in parts)
    if kind == PLAIN:
        return PLAIN
    shape = "column text" if parts[0].examples.shape == TEXT else parts[0].examples.shape
    return f"{kind}, {shape}: {count:,} examples" + (f" ({empty:,} empty ones passed over)" if empty else "")


def _read_file(path: Path, text_column: str | None) -> _Read:
    kind = kind_of(path)
    return _shaped(str(path), kind, read_rows(path), None if kind == PLAIN else text_column)


def _read_dataset(name: str, text_column: str | None) -> _Read:
    """A dataset that was saved to this folder, or is in the local cache under this name (NAME, or NAME:CONFIG)."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
            data = found if isinstance(found, datasets.Dataset) else found["train"]
        else:
            dataset, _, config = name.partition(":")
            data = datasets.load_dataset(dataset, config or None, split="train")
    except Exception as error:  # whatever datasets finds wrong: there is no common base
        if Path(name).is_dir():
            raise LosiaError(f"{name}: cannot be read as a saved dataset: {error}") from None
        raise LosiaError(
            f"{name}: no such file or folder, and no dataset of that name in the local cache "
            f"({datasets.config.HF_DATASETS_CACHE})"
        ) from None
    rows = [Row(f"{name}: row {number}", row) for number, row in enumerate(data, 1)]
    return _shaped(name, "a dataset", rows, text_column)


def _shaped(path: str, kind: str, rows: Iterable[Row], text_column: str | None) -> _Read:
    shape, made, empty = "", list[dict[str, Any]](), 0
    for row in rows:
        this, value = _example(row, text_column)
        if shape not in ("", this):
            raise LosiaError(f"{row.where}: holds {this}, and the rows before it {shape}: give each a file of its own")
        shape = this
        if _is_empty(value):
            empty += 1
        else:
            made.append(value)
    return _Read(path, kind, Examples(shape or TEXT, made), empty)


def _example(row: Row, text_column: str | None) -> tuple[str, dict[str, Any]]:
    """The shape of a row, and the columns of it that count."""
    value = row.value
    if not isinstance(value, dict):
        raise LosiaError(f"{row.where}: expected an object with named columns, found {_called(value)}")
    if text_column is not None:
        if text_column not in value:
            raise LosiaError(f"{row.where}: no column {text_column!r}: it has {listed(list(map(str, value)), 8)}")
        return TEXT, {"text": _text(row, text_column)}
    if "messages" in value:
        tools = {"tools": value["tools"]} if value.get("tools") else {}
        return CHATS, {"messages": _messages(row, "messages"), **tools}
    if "prompt" in value and "completion" in value:
        read = _messages if isinstance(value["prompt"], list) else _text
        return COMPLETIONS, {name: read(row, name) for name in ("prompt", "completion")}
    if "text" in value:
        return TEXT, {"text": _text(row, "text")}
    raise LosiaError(
        f"{row.where}: no column to train on: it has {listed(list(map(str, value)), 8) or 'none'}. Expected text, "
        "prompt and completion, or messages; or name the column of the text with --text-column"
    )


def _text(row: Row, column: str) -> str:
    value = row.value[column]
    if not isinstance(value, str):
        raise LosiaError(f"{row.where}: column {column!r}: expected a text, found {_called(value)}")
    return value


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    value = row.value[column]
    where = f"{row.where}: column {column!r}"
    if not isinstance(value, list):
        raise LosiaError(f"{where}: expected a list of messages, found {_called(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LosiaError(
                f'{where}: message {number}: expected {{"role": ..., "content": ...}}, found {_called(message)}'
            )
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise LosiaError(f"{where}: message {number}: has no content")
    return value


def _is_empty(example: dict[str, Any]) -> bool:
    value = example.get("messages", example.get("completion", example.get("text")))
    return not (value.strip() if isinstance(value, str) else value)


def _called(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing (null)"}
    return names.get(type(value), f"the number {value}" if isinstance(value, (int, float)) else type(value).__name__)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
