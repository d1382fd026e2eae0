"""Text on disk -> documents -> split -> blocks."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from losia_fx.errors import LosiaError
from losia_fx.finetune.settings import EMBEDDED_MODEL
from losia_fx.finetune.text import (
    PIECE,
    Document,
    batches,
    held_out_blocks,
    read_documents,
    split,
    standard_library,
    token_blocks,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL, local_files_only=True)


def test_a_folder_gives_its_text_files_by_relative_name(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("bee", encoding="utf-8")
    (tmp_path / "a.md").write_text("ä", encoding="utf-8")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"sea", mtime=0))
    (tmp_path / "image.bin").write_bytes(b"\x00\x01\x02")
    (tmp_path / ".hidden").write_text("no", encoding="utf-8")
    found = read_documents([tmp_path])
    assert found == [Document("a.md", "ä"), Document("c.txt.gz", "sea"), Document("deep/b.txt", "bee")]


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.gz"])
def test_jsonl_is_a_document_a_line(tmp_path: Path, name: str) -> None:
    # U+2028 ends a line for str.splitlines, not for jsonl
    texts = ["one\nline", "two\u2028halves"]
    raw = ("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read_documents([tmp_path / name]) == [
        Document(f"{name}#{number}", text) for number, text in enumerate(texts, 1)
    ]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.json", '[{"text": "one", "id": 1}, {"text": "two"}]', ["one", "two"]),
        ("a.json", '["one", "two"]', ["one", "two"]),
        ("a.json", '{"text": "one"}', ["one"]),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.json.gz", '["one"]', ["one"]),
        ("a.ndjson", '{"text": "one"}\n', ["one"]),
    ],
)
def test_json_is_read_by_its_texts(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = [Document(f"{name}#{number}", text) for number, text in enumerate(texts, 1)]
    assert read_documents([tmp_path / name]) == read_documents([tmp_path]) == found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a,b\n1,2\n"),  # whether that is a table nobody can know
        ("a.txt", '{"a": 1}\nand so on\n'),
        ("a.md", "[1] a note\n[2] another\n"),
        ("a.py", "{}\nprint('{}')\n"),
        ("a.jsonl.txt", "how to write .jsonl"),
        ("LICENSE", "no suffix"),
        ("a.xml", "<a>text</a>"),
        ("deep.txt", "[" * 100_000),
    ],
)
def test_everything_else_is_plain_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_documents([tmp_path / name]) == [Document(name, content)]


def test_what_each_path_is_read_as_is_said(tmp_path: Path) -> None:
    """Nothing of a folder is left out unsaid, hidden files aside."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name, content in {
        "a.txt": "a",
        "b.py": "b",
        "c.jsonl": '{"text": "c"}\n{"text": "d"}',
        "deep/e.csv": "e,f",
        "package.json": '{"name": "x"}',
        "data.txt": "[1, 2]",
        ".hidden": "no",
    }.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "image.bin").write_bytes(b"\x00\x01")
    said: list[str] = []
    found = read_documents([folder, folder / "c.jsonl", folder / "a.txt"], said.append)
    assert [document.text for document in found] == ["a", "b", "c", "d", "c", "d", "a"]
    assert said == [
        f'{folder}: 2 files read as plain text; 1 files read as JSON lines, field "text"; '
        "passed over, as no text: data.txt, deep/e.csv, image.bin, package.json",
        f'{folder / "c.jsonl"}: read as JSON lines, field "text", 2 documents',
        f"{folder / 'a.txt'}: read as plain text",
    ]
    said.clear()
    with pytest.raises(LosiaError, match=r"no text in .*deep"):
        read_documents([folder / "deep"], said.append)
    assert said == [f"{folder / 'deep'}: no file read; passed over, as no text: e.csv"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bad.jsonl", b'{"text": "fine"}\nnot json\n', "bad.jsonl: line 2: not JSON"),
        ("bad.jsonl", b'{"body": "x"}\n', 'bad.jsonl: line 1: expected an object with a string field "text"'),
        ("bad.jsonl", b"[1]\n", 'bad.jsonl: line 1: expected an object with a string field "text"'),
        ("latin.txt", b"caf\xe9", "latin.txt: not UTF-8 text (byte 3)"),
        ("cut.txt.gz", gzip.compress(b"some text", mtime=0)[:-4], "cut.txt.gz: cannot be read"),
        ("plain.txt.gz", b"not gzipped", "plain.txt.gz: cannot be read"),
        ("empty.txt", b" \n", "no text in"),
        ("rows.csv", b"id,text\n1,hello\n", "rows.csv: a table, which is no text: write its column of texts as .jsonl"),
        ("ROWS.TSV", b"id\ttext\n1\thello\n", "ROWS.TSV: a table"),
        ("rows.csv.gz", gzip.compress(b"id,text\n", mtime=0), "rows.csv.gz: a table"),
        ("rows.parquet", b"PAR1", "rows.parquet: a table"),
        ("paper.pdf", b"%PDF-1.7", "paper.pdf: pages, which are no plain text"),
        ("note.rtf", rb"{\rtf1 hello}", "note.rtf: pages, which are no plain text"),
        ("image.png", b"\x89PNG\x00", "image.png: a binary file"),
        ("zeros.txt", b"a\x00b", "zeros.txt: a binary file"),
        ("object.json", b'{"name": "x"}', "object.json: no text to train on: expected an array of objects"),
        ("mixed.json", b'[{"text": "x"}, {"body": "y"}]', "mixed.json: no text to train on"),
        ("numbers.json", b"[1, 2]", "numbers.json: no text to train on"),
        ("broken.json", b'[{"text": "x"},', "broken.json: no text to train on"),
        ("config.txt", b' {"a": 1,\n "b": 2}\n', "config.txt: holds JSON, which is no prose"),
        ("array.md", b'[{"text": "x"}]', "array.md: holds JSON"),
        ("lines.txt", b'{"text": "x"}\n\n{"text": "y"}\n', "lines.txt: holds JSON"),
        ("book.ipynb", b'{"cells": []}', "book.ipynb: holds JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LosiaError, match=re.escape(said)):
        read_documents([tmp_path / name])


def test_missing_and_empty_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(LosiaError, match=r"nowhere: no such file or folder"):
        read_documents([tmp_path / "nowhere"])
    with pytest.raises(LosiaError, match=r"no text in .*" + re.escape(tmp_path.name)):
        read_documents([tmp_path])


def test_the_split_depends_on_the_names_alone() -> None:
    documents = [Document(f"file{number}.txt", "text") for number in range(500)]
    train, held_out = split(documents)
    assert sorted(d.name for d in train + held_out) == sorted(d.name for d in documents)
    assert 20 <= len(held_out) <= 60
    fewer = documents[::2]
    assert split(fewer)[1] == [document for document in fewer if document in held_out]
    assert held_out[0].name == "file2.txt"  # the same on every machine and in every process


def test_one_file_is_split_by_position() -> None:
    train, held_out = split([Document("one.txt", "abcdefghij" * 10)])
    assert (train[0].text, held_out[0].text) == (("abcdefghij" * 10)[:92], "cdefghij")


def test_the_standard_library_is_there_without_its_tests() -> None:
    names = {document.name for document in standard_library()}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(re.search(r"(^|/)(test|tests|idlelib|encodings|pydoc_data|site-packages)/", name) for name in names)


def test_blocks_hold_every_token_once(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [("perl " * 10), ("x = 1\n" * PIECE)]
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    blocks = token_blocks(documents, tokenizer, 4, limit=10**6, seed=0)
    decoded = tokenizer.decode(blocks.flatten())
    assert blocks.shape[1] == 4
    assert decoded.count(str(tokenizer.eos_token)) == 2
    assert sum(map(len, texts)) - len(decoded.replace(str(tokenizer.eos_token), "")) < 4 * 8  # less than a block is cut


def test_blocks_are_limited_and_seeded(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [Document(str(number), f"text number {number} " * 50) for number in range(40)]
    one, again, other = (token_blocks(documents, tokenizer, 16, limit=20, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (20, 16)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert held_out_blocks(documents, tokenizer, 16, limit=5).shape == (5, 16)


def test_too_little_text_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(LosiaError, match=r"tiny\.txt: \d+ tokens of text are less than one block of 128"):
        token_blocks([Document("tiny.txt", "hello")], tokenizer, 128, limit=1, seed=0)


def test_batches_pass_over_all_blocks_before_any_comes_again() -> None:
    blocks = torch.arange(6).view(6, 1)
    stream = batches(blocks, 4, seed=0)
    three = torch.cat([next(stream) for _ in range(3)]).flatten().tolist()
    assert sorted(three[:6]) == sorted(three[6:]) == list(range(6))
    assert next(batches(blocks, 20, seed=0)).shape == (20, 1)  # more than there is: it wraps around
