"""What --data names -> examples of one shape: texts, prompts with completions, or chats. What was read is said."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losia_fx.errors import LosiaError, listed

from .files import PLAIN, Row, bare, kind_of, read_rows

TEXT, COMPLETIONS, CHATS = "text", "prompt/completion", "messages"
CHAT_COMPLETIONS = "prompt/completion of messages"
NAMED = 20  # files of a folder that are passed over: of more there is the number
Say = Callable[[str], object]


@dataclass(frozen=True)
class Examples:
    """Rows of one shape. TEXT: {"text"}; COMPLETIONS: {"prompt", "completion"}, both texts; CHAT_COMPLETIONS: the same,
    both lists of messages; CHATS: {"messages"}; of the last two "tools" as well, where there are any.

    places: where each row came from, for messages.
    """

    shape: str
    rows: list[dict[str, Any]]
    places: list[str] = field(default_factory=list, compare=False)

    @property
    def chats(self) -> bool:
        """Whether a chat template has to make text of them."""
        return self.shape in (CHATS, CHAT_COMPLETIONS)

    def take(self, indices: Iterable[int]) -> Examples:
        chosen = list(indices)
        places = [self.places[i] for i in chosen] if self.places else []
        return Examples(self.shape, [self.rows[i] for i in chosen], places)


def counted(count: int, noun: str) -> str:
    """ "1 example", "2 examples"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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
    return Examples(
        next(iter(shapes)),
        [row for part in found for row in part.examples.rows],
        [place for part in found for place in part.examples.places],
    )


def _read_source(source: str, text_column: str | None, say: Say) -> list[_Read]:
    if not source.strip():
        raise LosiaError(f"data {source!r}: names nothing (the current folder is .)")
    path = Path(source)
    if path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
        files = sorted(p for p in path.rglob("*") if _counts(p) and not _hidden(p.relative_to(path)))
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
            if file.is_dir():
                raise LosiaError(f"{file}: a link to a folder: name that folder too")
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
        read.append(f"{counted(count, 'file')} read as {described}")
    say(f"{source}: {'; '.join(read) or 'no file read'}" + (f"; passed over: {_all_of(passed)}" if passed else ""))
    return found


def _all_of(passed: Sequence[str]) -> str:
    more = [f"and {len(passed) - NAMED:,} more"] if len(passed) > NAMED else []
    return "; ".join([*passed[:NAMED], *more])


def _described(kind: str, parts: Sequence[_Read]) -> str:
    count, empty = sum(len(part.examples.rows) for part in parts), sum(part.empty for part in parts)
    if kind == PLAIN:
        return PLAIN
    shape = "column text" if parts[0].examples.shape == TEXT else parts[0].examples.shape
    return f"{kind}, {shape}: {counted(count, 'example')}" + (
        f" ({counted(empty, 'empty one')} passed over)" if empty else ""
    )


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
    rows = [Row(f"{name}: row {n}", {key: bare(value) for key, value in row.items()}) for n, row in enumerate(data, 1)]
    return _shaped(name, "a dataset", rows, text_column)


def _shaped(path: str, kind: str, rows: Iterable[Row], text_column: str | None) -> _Read:
    shape, made, places, empty = "", list[dict[str, Any]](), list[str](), 0
    for row in rows:
        this, value = _example(row, text_column)
        if shape not in ("", this):
            raise LosiaError(f"{row.where}: holds {this}, and the rows before it {shape}: give each a file of its own")
        shape = this
        if _is_empty(value):
            empty += 1
        else:
            made.append(value)
            places.append(row.where)
    return _Read(path, kind, Examples(shape or TEXT, made, places), empty)


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
        return CHATS, {"messages": _messages(row, "messages"), **_tools(row)}
    if "prompt" in value and "completion" in value:
        names = ("prompt", "completion")
        if isinstance(value["prompt"], list):
            return CHAT_COMPLETIONS, {**{name: _messages(row, name) for name in names}, **_tools(row)}
        return COMPLETIONS, {name: _text(row, name) for name in names}
    if "text" in value:
        return TEXT, {"text": _text(row, "text")}
    raise LosiaError(
        f"{row.where}: no column to train on: it has {listed(list(map(str, value)), 8) or 'none'}. Expected text, "
        "prompt and completion, or messages; or name the column of the text with --text-column"
    )


def _text(row: Row, column: str) -> str:
    value = row.value[column]
    where = f"{row.where}: column {column!r}"
    if not isinstance(value, str):
        raise LosiaError(f"{where}: expected a text, found {_called(value)}")
    _check_characters(where, value)
    return value


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages of a column, the content of each one text where it has any."""
    value = row.value[column]
    where = f"{row.where}: column {column!r}"
    if not isinstance(value, list):
        raise LosiaError(f"{where}: expected a list of messages, found {_called(value)}")
    _check_characters(where, value)
    return [_message(f"{where}: message {number}", message) for number, message in enumerate(value, 1)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LosiaError(f'{where}: expected {{"role": ..., "content": ...}}, found {_called(message)}')
    content = message.get("content")
    if isinstance(content, list):  # a template for texts would write the list itself, with its brackets
        content = "".join(_part(where, part) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""  # many templates would write None
    if not isinstance(content, str):
        raise LosiaError(f"{where}: {'has no content' if content is None else f'content is {_called(content)}'}")
    return {**message, "content": content}


def _part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else _called(part)
    raise LosiaError(f'{where}: content holds {kind}: expected {{"type": "text", "text": ...}} alone')


def _tools(row: Row) -> dict[str, Any]:
    """The column of tools, a list or the JSON of one, where it holds any."""
    value, where = row.value.get("tools"), f"{row.where}: column 'tools'"
    if not value:
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise LosiaError(f"{where}: not JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise LosiaError(f"{where}: expected a list of tools, each a JSON schema, found {_called(found)}")
    _check_characters(where, found)
    return {"tools": found} if found else {}


def _check_characters(where: str, value: Any) -> None:
    """JSON lets an escape stand for half of a character, of which nobody can make UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise LosiaError(f"{where}: holds {half!r}, half of a character: mend the text or leave it out") from None


def _is_empty(example: dict[str, Any]) -> bool:
    """Whether there is nothing to learn from: no text, no completion, no message that says something."""
    value = example.get("messages", example.get("completion", example.get("text")))
    if isinstance(value, str):
        return not value.strip()
    return not any((message.get("content") or "").strip() or message.get("tool_calls") for message in value or ())


def _called(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing (null)"}
    return names.get(type(value), f"the number {value}" if isinstance(value, (int, float)) else type(value).__name__)


def _counts(path: Path) -> bool:
    """A file, or a link that a walk over the folder does not follow: to a folder, or to nothing."""
    return path.is_file() or path.is_symlink()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
