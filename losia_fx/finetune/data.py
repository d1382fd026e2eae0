"""Examples -> what is trained on and what is judged by, as datasets that SFTTrainer takes."""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from trl import SFTConfig

from losia_fx.errors import LosiaError

from .reading import CHATS, TEXT, Examples, Say, counted, read_examples
from .record import Names
from .settings import LEFT_OUT_OF_STDLIB, FinetuneSettings

MOST_HELD_OUT = 512  # examples: a share of a large set would take longer to judge by than to train on
JUDGED_BY = 128  # examples or blocks of them: enough that before and after differ by far more than the sample does
CHARACTERS = 8  # that no token is longer than, on the average


@dataclass(frozen=True)
class RunData:
    """To train on, to judge by (new None: by nothing), and text of the old domain; and what to call their sources.

    judged_whole: whether the user chose what to judge by, so that all of it counts.
    """

    train: Examples
    new: Examples | None
    old: Examples | None
    names: Names
    judged_whole: bool


def load_data(settings: FinetuneSettings, say: Say) -> RunData:
    """Reads all that the settings name; says what each path of the user's is read as."""
    column = settings.training.get("dataset_text_field")
    found = read_examples(settings.data, column, say) if settings.data else standard_library()
    new: Examples | None = None
    if settings.eval_data:
        new = read_examples(settings.eval_data, column, say)
        if new.shape != found.shape:
            raise LosiaError(f"--eval-data holds {new.shape}, and --data {found.shape}: both have to be of one shape")
    elif settings.held_out and settings.judges:
        found, new = split(found, settings.held_out)
    quiet = settings.model is None and not settings.old_data
    old = None
    if settings.old_texts:
        old = read_examples(settings.old_texts, None, (lambda line: None) if quiet else say)
        if old.shape != TEXT:
            raise LosiaError(f"--old-data holds {old.shape}: give plain text, or a column text")
    return RunData(found, new, old, names_of(settings), bool(settings.eval_data))


def standard_library() -> Examples:
    """The sources of the interpreter's standard library, a text a module."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    kept = [name for name in names if LEFT_OUT_OF_STDLIB.isdisjoint(name.parts)]
    # A few files keep old encodings on purpose; what matters here is text, so they are replaced, not refused.
    texts = [(root / name).read_text("utf-8", errors="replace") for name in kept]
    if not texts:
        raise LosiaError(f"{root}: this interpreter has no standard library sources; name your own text with --data")
    return Examples(TEXT, [{"text": text} for text in texts if text.strip()])


def split(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """(train, held out): by the hash of each example, or, of few texts, by position in every one.

    No seed: two runs over the same data hold out the same, so their figures can be compared.
    Raises LosiaError where there is too little to hold anything out.
    """
    rows = len(examples.rows)
    count = min(round(rows * share), MOST_HELD_OUT)
    if 0 < count < rows:
        order = sorted(range(rows), key=lambda index: _hash(examples.rows[index]))
        held_out = set(order[:count])
        return examples.take(i for i in range(rows) if i not in held_out), examples.take(sorted(held_out))
    cuts = [(row["text"], round(len(row["text"]) * (1 - share))) for row in examples.rows if examples.shape == TEXT]
    sides = [[text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]]
    train, new = (Examples(TEXT, [{"text": text} for text in side if text.strip()]) for side in sides)
    if not train.rows or not new.rows:
        raise LosiaError(
            f"{counted(rows, 'example')}: too few to hold out a share of {share} and to train on the others: name some "
            "with --eval-data, or give another --held-out (0: none)"
        )
    return train, new


def as_dataset(examples: Examples, tokens: int | None = None, seed: int = 0) -> datasets.Dataset:
    """The examples as a dataset; of texts no more, in seeded order, than a run over ``tokens`` tokens can use up."""
    rows: Sequence[dict[str, Any]] = examples.rows
    if tokens is not None and examples.shape == TEXT:
        rows, found = random.Random(seed).sample(rows, len(rows)), 0
        for index, row in enumerate(rows):
            found += len(row["text"])
            if found > CHARACTERS * tokens:
                rows = rows[: index + 1]
                break
    return datasets.Dataset.from_list(list(rows), _features(examples))


def _features(examples: Examples) -> datasets.Features:
    """Messages and tools are kept as they are: as structures each would get the keys of all others, with null."""
    messages = datasets.List(datasets.Json()) if examples.chats else datasets.Value("large_string")
    names = {TEXT: ("text",), CHATS: ("messages",)}.get(examples.shape, ("prompt", "completion"))
    tools = {"tools": datasets.Json()} if any("tools" in row for row in examples.rows) else {}
    return datasets.Features({**dict.fromkeys(names, messages), **tools})


def whole_blocks(prepared: datasets.Dataset, args: SFTConfig, old: bool = False) -> datasets.Dataset:
    """Of packed text the blocks that are full, where there are any: those at the end of a thousand texts are not.

    old: text of the old domain, which is packed in any case; so every run judges by the same blocks of it.
    """
    if not old and (not args.packing or args.packing_strategy != "wrapped"):
        return prepared
    full = [number for number, length in enumerate(lengths(prepared)) if length == args.max_length]
    return prepared.select(full) if full else prepared


def spread(prepared: datasets.Dataset, most: int = JUDGED_BY) -> datasets.Dataset:
    """At most ``most`` of the examples, spread evenly."""
    count = min(most, len(prepared))
    return prepared.select(torch.linspace(0, len(prepared) - 1, count, device="cpu").long().tolist())


def lengths(prepared: datasets.Dataset) -> list[int]:
    """Tokens of each example."""
    return [length for column in _columns(prepared, "input_ids") for length in column.value_lengths().to_pylist()]


def fingerprint(prepared: datasets.Dataset) -> str:
    """sha256 of the tokens and labels, in their order."""
    hashed = hashlib.sha256()
    for name in ("input_ids", "labels"):
        for column in _columns(prepared, name):
            for part in (column.value_lengths(), column.flatten()):
                hashed.update(part.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return hashed.hexdigest()


def _columns(prepared: datasets.Dataset, name: str) -> Iterator[Any]:
    """A column of lists as Arrow arrays, a thousand examples each."""
    for table in prepared.select_columns([name]).with_format("arrow").iter(1000):
        yield table[name].combine_chunks()


def _hash(row: dict[str, Any]) -> bytes:
    """The same on every machine (hash() of a string is not)."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()


def names_of(settings: FinetuneSettings) -> Names:
    new = _listed(settings.data) if settings.data else "Python standard library"
    embedded = settings.model is None and not settings.old_data
    return Names(new, "Perl manual" if embedded else _listed(settings.old_data) if settings.old_data else None)


def _listed(paths: Sequence[str]) -> str:
    return Path(paths[0]).name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
