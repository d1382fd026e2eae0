"""Damaged, truncated and hostile state files: each refused by name, the model untouched."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx import StateError
from losia_fx.checkpoint.state import load_state, save_state
from losia_fx.storage.tensors import STATE_FILE, read_tensors, write_tensors
from tests.support.toy_runs import PERIOD, adamw, batches, learning, same, toy, train


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, nn.Module]:
    """A good file of a run under way, and the model that it is not to change (it would fit)."""
    model = toy()
    train(model, adamw(learning(model)), batches(PERIOD + 2))
    path = tmp_path_factory.mktemp("good") / "state"
    save_state(model, path)
    target = toy()
    load_state(target, path)
    return path.read_bytes(), toy()


def refused(contents: bytes, model: nn.Module, path: Path) -> str:
    """What is said of a file with these contents; fails unless it is refused and everything is as it was."""
    before, weights = losia_fx.state_dict(model), [p.clone() for p in model.parameters()]
    path.write_bytes(contents)
    with pytest.raises(StateError) as caught:
        load_state(model, path)
    assert str(path) in str(caught.value)
    assert same(before, losia_fx.state_dict(model))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    return str(caught.value)


def damage(contents: bytes, chance: random.Random) -> bytes:
    """One of the ways in which files go bad."""
    at, length = chance.randrange(len(contents)), chance.randrange(1, 64)
    kind = chance.choice(["bit", "byte", "cut", "zeros", "more", "gap", "twice", "header"])
    if kind == "bit":
        return contents[:at] + bytes([contents[at] ^ 1 << chance.randrange(8)]) + contents[at + 1 :]
    if kind == "byte":
        return contents[:at] + bytes([contents[at] ^ chance.randrange(1, 256)]) + contents[at + 1 :]
    if kind == "cut":
        return contents[:at]
    if kind == "zeros":
        zeroed = contents[:at] + b"\xff\0"[chance.randrange(2) :][:1] * length + contents[at + length :]
        return zeroed if zeroed != contents else contents[:at]
    if kind == "more":
        return contents + chance.randbytes(length)
    if kind == "gap":
        return contents[:at] + contents[at + length :]
    if kind == "twice":
        return contents[:at] + contents[at : at + length] + contents[at:]
    at = chance.randrange(min(len(contents), 2000))  # the header is where it hurts
    return contents[:at] + bytes([contents[at] ^ chance.randrange(1, 256)]) + contents[at + 1 :]


def test_two_hundred_damaged_files(good: tuple[bytes, nn.Module], tmp_path: Path) -> None:
    contents, model = good
    chance, seen = random.Random(0), set()
    while len(seen) < 200:
        bad = damage(contents, chance)
        if bad != contents and bad not in seen:
            seen.add(bad)
            refused(bad, model, tmp_path / "state")
    path = tmp_path / "state"
    path.write_bytes(contents)
    load_state(toy(), path)  # and the good one still loads


def test_every_byte_counts(good: tuple[bytes, nn.Module], tmp_path: Path) -> None:
    """No byte of the file can change unnoticed (every 37th is tried, to be short)."""
    contents, _ = good
    path = tmp_path / "state"
    for at in range(0, len(contents), 37):
        path.write_bytes(contents[:at] + bytes([contents[at] ^ 0x20]) + contents[at + 1 :])
        with pytest.raises(StateError):
            read_tensors(path)


# -- files with a right checksum, made to harm ------------------------------------------------------------------------

Entries = tuple[dict[str, Tensor], dict[str, Any]]
HOSTILE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "index out of range": (lambda t, p: t.update({"head.weight:rows": t["head.weight:rows"] + 10**6}), "outside of 0"),
    "negative index": (lambda t, p: t.update({"head.weight:rows": -t["head.weight:rows"].flip(0) - 1}), "outside of 0"),
    "double index": (lambda t, p: t["head.weight:cols"].zero_(), "not sorted, or names an index twice"),
    "wrong dtype": (lambda t, p: t.update({"head.weight:values": t["head.weight:values"].half()}), "torch.float16"),
    "wrong shape": (lambda t, p: t.update({"head.weight:values": t["head.weight:values"].T.contiguous()}), "(16, 10)"),
    "huge": (lambda t, p: t.update({"head.weight:rows": torch.arange(1 << 20)}), "(1048576,)"),
    "missing": (lambda t, p: t.pop("head.weight:rows"), "head.weight:rows is missing"),
    "unknown": (lambda t, p: t.update({"__class__:values": torch.zeros(1)}), "__class__:values is unknown"),
    "both kinds": (lambda t, p: p.update({"head.weight:rows": []}), "names an entry twice"),
    "step": (lambda t, p: p.update(step=-3), "step is -3"),
    "step no number": (lambda t, p: p.update(step={"a": []}), "step is {'a': []}"),
    "history of objects": (lambda t, p: p.update(history=[[{"a": 1}, 0, 0, 0]]), "history"),
    "config of another method": (lambda t, p: p["config"].update(importance="first"), "importance was 'first'"),
    "generator": (lambda t, p: t.update(generator=torch.zeros(16, dtype=torch.uint8)), "generator is no state"),
    "other format": (lambda t, p: p.update(format=99), "format is 99"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_entries(name: str, good: tuple[bytes, nn.Module], tmp_path: Path) -> None:
    contents, model = good
    (tmp_path / "good").write_bytes(contents)
    tensors, plain = read_tensors(tmp_path / "good")
    edit, said = HOSTILE[name]
    edit(tensors, plain)
    write_tensors(tmp_path / "bad", tensors, plain)
    assert said in refused((tmp_path / "bad").read_bytes(), model, tmp_path / "state")


def sealed(header: dict[str, Any] | bytes, body: bytes, path: Path) -> bytes:
    """A file with this header, its checksum set right."""
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    try:
        digest, place = STATE_FILE.checksum(path)
    except StateError:
        return path.read_bytes()
    contents = path.read_bytes()
    return contents[:place] + digest.encode() + contents[place + len(digest) :]


def _header(contents: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", contents[:8])[0]
    return json.loads(contents[8 : 8 + size]), contents[8 + size :]


OFFSETS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "past the end": lambda h: h["head.weight:rows"].update(data_offsets=[0, 10**9]),
    "backwards": lambda h: h["head.weight:rows"].update(data_offsets=h["head.weight:rows"]["data_offsets"][::-1]),
    "negative": lambda h: h["head.weight:rows"].update(data_offsets=[-8, 8]),
    "overlapping": lambda h: h["head.weight:rows"].update(data_offsets=h["head.weight:cols"]["data_offsets"]),
    "another shape": lambda h: h["head.weight:rows"].update(shape=[1, 2, 3]),
    "overflowing shape": lambda h: h["head.weight:rows"].update(shape=[2**62, 2**62]),
    "another dtype": lambda h: h["head.weight:rows"].update(dtype="F16"),
    "no such dtype": lambda h: h["head.weight:rows"].update(dtype="PICKLE"),
    "a tensor left out": lambda h: h.pop("head.weight:rows"),
    "plain values that are no JSON": lambda h: h["__metadata__"].update(losia_fx="{'step': 1}"),
    "plain values that are a list": lambda h: h["__metadata__"].update(losia_fx="[]"),
    "plain values without end": lambda h: h["__metadata__"].update(losia_fx="[" * 100_000),
    "no plain values": lambda h: h["__metadata__"].pop("losia_fx"),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_headers_that_lie(name: str, good: tuple[bytes, nn.Module], tmp_path: Path) -> None:
    contents, model = good
    header, body = _header(contents)
    assert sealed(header, body, tmp_path / "same")
    OFFSETS[name](header)
    refused(sealed(header, body, tmp_path / "bad"), model, tmp_path / "state")


class Evil:
    """Runs when unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Evil, "ran", True))


def test_other_files(good: tuple[bytes, nn.Module], tmp_path: Path) -> None:
    """A pickle in disguise is not run; neither nothing, nor noise, nor a checkpoint of torch is taken for a state."""
    _, model = good
    zipped = io.BytesIO()
    torch.save({"x": torch.ones(3)}, zipped)
    pickled = pickle.dumps(Evil())
    metadata = {"__metadata__": {"losia_fx": "{}", "sha256": "0" * 64}}
    for contents in (
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        pickled,
        struct.pack("<Q", 2**63) + pickled,
        struct.pack("<Q", 99_999_999) + pickled,
        struct.pack("<Q", len(pickled)) + pickled,
        zipped.getvalue(),
        sealed(b"{}", b"", tmp_path / "empty"),
        sealed(metadata, b"", tmp_path / "nothing inside"),
        sealed(metadata, pickled, tmp_path / "pickle inside"),
        b'{"format": 1}',
    ):
        refused(contents, model, tmp_path / "state")
    assert not Evil.ran
    with pytest.raises(OSError, match="nowhere"):
        load_state(model, tmp_path / "nowhere")
