"""Data on disk -> examples of one shape -> what is trained on and judged by."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from losia_fx.errors import LosiaError
from losia_fx.finetune.data import as_dataset, split, standard_library
from losia_fx.finetune.reading import CHAT_COMPLETIONS, CHATS, COMPLETIONS, TEXT, Examples, read_examples
from tests.cli.tiny import chats, completions

ROWS = {TEXT: [{"text": f"text {n}"} for n in range(3)], COMPLETIONS: completions(3), CHATS: chats(3)}


def quiet(line: str) -> None:
    pass


def read(*sources: Path | str, column: str | None = None, say: Callable[[str], object] = quiet) -> Examples:
    return read_examples([str(source) for source in sources], column, say)


def lines_of(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("compressed", list(COMPRESSED))
@pytest.mark.parametrize("shape", list(ROWS))
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", lines_of), ("a.json", lambda rows: json.dumps(rows).encode()), ("a.parquet", parquet_of)],
)
def test_every_shape_in_every_file(
    name: str, content: Callable[[Any], bytes], shape: str, compressed: str, tmp_path: Path
) -> None:
    path = tmp_path / (name + compressed)
    path.write_bytes(COMPRESSED[compressed](content([{**row, "id": 7} for row in ROWS[shape]])))
    assert read(path) == read(tmp_path) == read(tmp_path / "*") == Examples(shape, ROWS[shape])


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines_of(ROWS[TEXT])))
    assert read(tmp_path / "a.jsonl.zst").rows == ROWS[TEXT]
    (tmp_path / "a.jsonl.zst").write_bytes(b"nothing of the kind")
    with pytest.raises(LosiaError, match=r"a\.jsonl\.zst: cannot be read"):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_tables_of_text(name: str, sign: str, tmp_path: Path) -> None:
    raw = f'id{sign}text\n1{sign}one\n2{sign}"two\nlines"\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read(tmp_path / name).rows == [{"text": "one"}, {"text": "two\nlines"}]
    (tmp_path / "b.csv").write_bytes(b"prompt,completion\na,b\n")
    assert read(tmp_path / "b.csv") == Examples(COMPLETIONS, [{"prompt": "a", "completion": "b"}])


def test_a_column_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"body,text\none,two\n")
    assert read(tmp_path / "a.csv", column="body").rows == [{"text": "one"}]
    with pytest.raises(LosiaError, match=r"a\.csv: line 2: no column 'title': it has body, text"):
        read(tmp_path / "a.csv", column="title")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.json", '["one", "two"]', ["one", "two"]),
        ("a.json", '{"text": "one"}', ["one"]),
        ("a.json", '[{"text": "\\ud83d\\ude00"}]', ["\U0001f600"]),  # two halves are a character
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.ndjson", '{"text": "one"}\n', ["one"]),
        (
            "a.jsonl",
            '{"text": "one\\nline"}\n\n{"text": "two\u2028halves"}\n{"text": ""}',
            ["one\nline", "two\u2028halves"],
        ),
        ("a.txt", "a,b\n1,2\n", ["a,b\n1,2\n"]),  # whether that is a table nobody can know
        ("a.txt", '{"a": 1}\nand so on\n', ['{"a": 1}\nand so on\n']),
        ("a.md", "[1] a note\n[2] another\n", ["[1] a note\n[2] another\n"]),
        ("a.jsonl.txt", "how to write .jsonl", ["how to write .jsonl"]),
        ("LICENSE", "no suffix", ["no suffix"]),
        ("deep.txt", "[" * 100_000, ["[" * 100_000]),
    ],
)
def test_forms_of_text(name: str, content: str, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [row["text"] for row in read(tmp_path / name).rows] == texts


def test_prompts_may_be_messages(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_bytes(lines_of([row]))
    found = read(tmp_path / "a.jsonl")
    assert found == Examples(CHAT_COMPLETIONS, [row])
    assert found.chats


def test_datasets_that_were_saved_or_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_list(ROWS[CHATS]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == Examples(CHATS, ROWS[CHATS])

    cache, lines = tmp_path / "cache", tmp_path / "chats.jsonl"
    lines.write_bytes(lines_of(ROWS[CHATS]))
    datasets.load_dataset("json", data_files=str(lines), cache_dir=str(cache))
    made = next(path.parent for path in cache.rglob("dataset_info.json"))
    place = cache / "me___chats" / "small" / "0.0.0" / "0123"  # as one that came from a hub lies there
    place.parent.mkdir(parents=True)
    made.rename(place)
    next(place.glob("*.arrow")).rename(place / "chats-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
    info |= {"builder_name": "parquet", "dataset_name": "chats", "config_name": "small"}
    (place / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("me/chats", "me/chats:small"):
        assert read(name) == Examples(CHATS, ROWS[CHATS])


def test_what_each_path_is_read_as_is_said(tmp_path: Path) -> None:
    """Nothing of a folder is left out unsaid, hidden files aside."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name, content in {
        "a.txt": "a",
        "b.py": "b",
        "c.jsonl": '{"text": "c"}\n{"text": "d"}',
        "deep/e.csv": "e,f\n1,2\n",
        "package.json": '{"name": "x"}',
        "data.txt": "[1, 2]",
        ".hidden": "no",
    }.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "image.bin").write_bytes(b"\x00\x01")
    said: list[str] = []
    found = read(folder, folder / "c.jsonl", folder / "a.txt", say=said.append)
    assert [row["text"] for row in found.rows] == ["a", "b", "c", "d", "c", "d", "a"]
    assert said[0].startswith(
        f"{folder}: 2 files read as plain text; 1 file read as JSON lines, column text: 2 examples; "
        "passed over: data.txt: "
    )
    for part in (
        "deep/e.csv: line 2: no column to train on: it has e, f",
        "image.bin: a binary file",
        "package.json: ",
    ):
        assert part in said[0]
    assert said[1:] == [
        f"{folder / 'c.jsonl'}: read as JSON lines, column text: 2 examples",
        f"{folder / 'a.txt'}: read as plain text",
    ]


def test_prose_beside_chats_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about these chats", encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(lines_of(ROWS[CHATS]))
    said: list[str] = []
    assert read(tmp_path, say=said.append) == Examples(CHATS, ROWS[CHATS])
    assert "passed over: README.md: prose beside messages" in said[0]


BAD: list[tuple[str, bytes, str]] = [
    ("bad.jsonl", b'{"text": "fine"}\nnot json\n', "bad.jsonl: line 2: not JSON"),
    ("bad.jsonl", b'{"body": "x"}\n', "bad.jsonl: line 1: no column to train on: it has body. Expected text"),
    ("bad.jsonl", b"[1]\n", "bad.jsonl: line 1: expected an object with named columns, found a list"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: column 'text': expected a text, found the number 3"),
    ("bad.jsonl", b'{"text": null}\n', "line 1: column 'text': expected a text, found nothing (null)"),
    ("bad.jsonl", b'{"messages": "hello"}\n', "line 1: column 'messages': expected a list of messages"),
    ("bad.jsonl", b'{"messages": [{"from": "me"}]}\n', "line 1: column 'messages': message 1: expected {\"role\""),
    ("bad.jsonl", b'{"messages": [{"role": "user"}]}\n', "message 1: has no content"),
    ("bad.jsonl", b'{"prompt": "a", "completion": 1}\n', "line 1: column 'completion': expected a text"),
    ("bad.jsonl", b'{"text": "a"}\n{"messages": []}\n', "line 2: holds messages, and the rows before it text"),
    ("latin.txt", b"a\ncaf\xe9", "latin.txt: line 2: not UTF-8 text (byte 5)"),
    ("odd.txt", b"\xff\xfea\x00b", "odd.txt: not UTF-16 text"),
    (
        "array.jsonl",
        b'[{"text": "a"}, {"text": "b"}]',
        "array.jsonl: one JSON value, not a line an example",
    ),
    ("pretty.jsonl", b'{\n "text": "a"\n}\n', "pretty.jsonl: one JSON value, not a line an example: call it .json"),
    (
        "half.jsonl",
        b'{"text": "a"}\n{"text": "b\\ud800"}\n',
        "line 2: column 'text': holds '\\ud800', half",
    ),
    ("bad.jsonl", b'{"messages": [{"role": "user", "content": 5}]}\n', "message 1: content is the number 5"),
    (
        "bad.jsonl",
        b'{"messages": [{"role": "user", "content": ["a"]}]}\n',
        "message 1: content holds a text: expected {",
    ),
    (
        "bad.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
        "message 1: content holds a part of type 'image': expected {",
    ),
    ("bad.jsonl", b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n', "column 'messages': holds '\\udc00'"),
    (
        "bad.jsonl",
        b'{"prompt": "a", "completion": "b"}\n{"prompt": [{"role": "user", "content": "a"}], "completion": []}\n',
        "line 2: holds prompt/completion of messages, and the rows before it prompt/completion:",
    ),
    (
        "tools.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}], "tools": "a, b"}\n',
        "line 1: column 'tools': not JSON",
    ),
    (
        "tools.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}], "tools": ["a"]}\n',
        "line 1: column 'tools': expected a list of tools, each a JSON schema",
    ),
    ("twice.csv", b"text,id,text\na,1,b\n", "twice.csv: line 1: two columns are called 'text'"),
    ("header.csv", b'text,"b\na', "header.csv: line 1: not csv"),
    ("cut.txt.gz", gzip.compress(b"some text", mtime=0)[:-4], "cut.txt.gz: cannot be read"),
    ("plain.txt.xz", b"not compressed", "plain.txt.xz: cannot be read"),
    ("empty.txt", b" \n", "no text in"),
    ("rows.csv", b"id,name\n1,hello\n", "rows.csv: line 2: no column to train on: it has id, name"),
    ("rows.csv", b"id,text\n1,a,b\n", "rows.csv: line 2: has not the 2 columns of the header"),
    ("rows.csv", b'id,text\n1,"a\n', "rows.csv: line 2: not csv"),
    ("rows.parquet", b"PAR1", "rows.parquet: cannot be read as parquet"),
    ("rows.xlsx", b"PK", "rows.xlsx: a table of a kind that is not read: save it as .csv or .parquet"),
    ("paper.pdf", b"%PDF-1.7", "paper.pdf: pages, which are no plain text"),
    ("image.png", b"\x89PNG\x00", "image.png: a binary file"),
    ("object.json", b'{"name": "x"}', "object.json: entry 1: no column to train on: it has name"),
    ("mixed.json", b'[{"text": "x"}, {"body": "y"}]', "mixed.json: entry 2: no column to train on"),
    ("numbers.json", b"[1, 2]", "numbers.json: entry 1: expected an object with named columns, found the number 1"),
    ("broken.json", b'[{"text": "x"},', "broken.json: not JSON"),
    ("config.txt", b' {"a": 1,\n "b": 2}\n', "config.txt: holds JSON, which is no prose"),
    ("lines.txt", b'{"text": "x"}\n\n{"text": "y"}\n', "lines.txt: holds JSON"),
    ("book.ipynb", b'{"cells": []}', "book.ipynb: holds JSON"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """By itself a file is an error; in a folder it is passed over with the same words."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LosiaError, match=re.escape(said)):
        read(tmp_path / name)
    if name != "empty.txt":
        (tmp_path / "good.txt").write_text("fine", encoding="utf-8")
        lines: list[str] = []
        assert read(tmp_path, say=lines.append).rows == [{"text": "fine"}]
        assert said in lines[0]


def test_text_as_windows_tools_save_it(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", "caf\u00e9"),
        ("b.jsonl", '{"text": "caf\u00e9"}\n'),
        ("c.csv", "text\ncaf\u00e9\n"),
    ):
        for encoding in ("utf-16", "utf-8-sig"):
            (tmp_path / name).write_text(content, encoding=encoding)
            assert read(tmp_path / name).rows == [{"text": "caf\u00e9"}]


def test_empty_files_and_rows_hold_nothing(tmp_path: Path) -> None:
    empty = [{"messages": [{"role": role, "content": " "} for role in ("user", "assistant")]}, {"messages": []}]
    (tmp_path / "a.jsonl").write_bytes(lines_of([*ROWS[CHATS], *empty]))
    said: list[str] = []
    assert read(tmp_path / "a.jsonl", say=said.append) == Examples(CHATS, ROWS[CHATS])
    assert said == [f"{tmp_path / 'a.jsonl'}: read as JSON lines, messages: 3 examples (2 empty ones passed over)"]
    for name in ("a.txt", "a.json", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(LosiaError, match=f"no text in .*{re.escape(name)}"):
            read(tmp_path / name)
    with pytest.raises(LosiaError, match="data '': names nothing"):
        read("")


def test_contents_in_parts_are_texts(tmp_path: Path) -> None:
    """A template for texts would write a list with its brackets, and None for what is not there."""
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": [{"role": "user", "content": parts}, call], "tools": json.dumps(tools)}
    (tmp_path / "a.jsonl").write_bytes(lines_of([row]))
    assert read(tmp_path / "a.jsonl").rows == [
        {"messages": [{"role": "user", "content": "one two"}, {**call, "content": ""}], "tools": tools}
    ]


@pytest.mark.parametrize("saved", ["a.parquet", "saved"])
def test_no_row_has_the_keys_of_another(saved: str, tmp_path: Path) -> None:
    """Arrow makes every object of a column alike, and what the others have is null: that would be trained on."""
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": "x"})]
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    assert as_dataset(Examples(CHATS, rows))[:]["messages"] == [row["messages"] for row in rows]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / saved) if saved.endswith("parquet") else table.save_to_disk(tmp_path / saved)
    assert read(tmp_path / saved).rows == rows


def test_links_are_followed_or_named(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for made in (folder, other):
        made.mkdir()
        (made / "a.txt").write_text(made.name, encoding="utf-8")
    (folder / "b.txt").symlink_to(other / "a.txt")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "more").symlink_to(other)
    said: list[str] = []
    assert [row["text"] for row in read(folder, say=said.append).rows] == ["folder", "other"]
    assert "gone.txt: cannot be read" in said[0]
    assert "more: a link to a folder: name that folder too" in said[0]


def test_of_many_files_that_are_passed_over_some_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine", encoding="utf-8")
    for number in range(30):
        (tmp_path / f"{number:02}.bin").write_bytes(b"\0")
    said: list[str] = []
    read(tmp_path, say=said.append)
    assert said[0].count("a binary file") == 20
    assert said[0].endswith("; and 10 more")


def test_missing_and_mixed_paths_are_named(tmp_path: Path) -> None:
    for source, said in (
        (tmp_path / "nowhere.txt", r"nowhere\.txt: no such file or folder, and no dataset of that name"),
        (tmp_path / "*.no", r"\*\.no: matches no file"),
        (tmp_path, r"no text in .*" + re.escape(tmp_path.name)),
    ):
        with pytest.raises(LosiaError, match=said):
            read(source)
    (tmp_path / "a.txt").write_text("prose", encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(lines_of(ROWS[CHATS]))
    with pytest.raises(LosiaError, match=r"a\.txt holds text, .*b\.jsonl holds messages: train on one shape"):
        read(tmp_path / "a.txt", tmp_path / "b.jsonl")


def test_the_split_depends_on_the_examples_alone() -> None:
    rows = [{"text": f"text {number}"} for number in range(500)]
    train, held_out = split(Examples(TEXT, rows), 0.08)
    assert sorted(row["text"] for row in train.rows + held_out.rows) == sorted(row["text"] for row in rows)
    assert len(held_out.rows) == 40
    again = split(Examples(TEXT, rows[::-1]), 0.08)[1]
    assert sorted(row["text"] for row in again.rows) == sorted(row["text"] for row in held_out.rows)


def test_few_texts_are_split_by_position() -> None:
    train, held_out = split(Examples(TEXT, [{"text": "abcdefghij" * 10}]), 0.08)
    assert (train.rows[0]["text"], held_out.rows[0]["text"]) == (("abcdefghij" * 10)[:92], "cdefghij")
    for examples, share in (
        (Examples(CHATS, ROWS[CHATS]), 0.08),
        (Examples(CHATS, ROWS[CHATS]), 0.99),
        (Examples(TEXT, [{"text": "hi"}]), 0.08),
    ):
        with pytest.raises(LosiaError, match=r"\d examples?: too few to hold out .* --eval-data"):
            split(examples, share)
    train, held_out = split(Examples(TEXT, [{"text": "abcdefghij" * 10}]), 0.99)
    assert (train.rows[0]["text"], len(held_out.rows[0]["text"])) == ("a", 99)


def test_a_short_run_reads_only_what_it_can_use() -> None:
    examples = Examples(TEXT, [{"text": f"{n:03d} " * 25} for n in range(100)])
    one, again, other = (as_dataset(examples, 50, seed)["text"][:] for seed in (1, 1, 2))
    assert len(one) == 5
    assert one == again != other
    assert as_dataset(examples)["text"][:] == [row["text"] for row in examples.rows]


def test_the_standard_library_is_there_without_its_tests() -> None:
    texts = [row["text"] for row in standard_library().rows]
    assert len(texts) > 200
    assert any(text.startswith("# Author: Steven J. Bethard") for text in texts)  # argparse.py
    assert all(text.strip() for text in texts)
