"""Files that are not what save_delta wrote: each is refused by name, and the model is as it was."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import losia_fx
from losia_fx import DeltaError
from losia_fx.delta.format import DELTA_FILE, write_delta
from tests.delta.made import Made, make, same, weights

WEIGHT = "layers.0.mix.weight"
DAMAGES = 240


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"), steps=8, rank_factor=0.25, trainable=("norm",))


def refused(made: Made, file: Path) -> str:
    """The error with which the file is refused; nothing else is raised, and nothing changes."""
    before = weights(made.base)
    with pytest.raises(DeltaError) as caught:
        losia_fx.load_delta(made.base, file)
    assert same(made.base, before)
    assert file.name in str(caught.value)
    return str(caught.value)


def damage(data: bytes, random_: random.Random) -> bytes:
    """One of the things that disks, networks and hands do to a file."""
    kind = random_.choice(["cut", "flip", "byte", "header", "zero", "drop", "insert", "append", "swap"])
    at, size = random_.randrange(len(data)), random_.randrange(1, 200)
    if kind == "header":
        at, kind = random_.randrange(8 + int.from_bytes(data[:8], "little")), "byte"
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << random_.randrange(8))]) + data[at + 1 :]
    if kind == "byte":
        return data[:at] + bytes([(data[at] + random_.randrange(1, 256)) % 256]) + data[at + 1 :]
    if kind == "zero":
        return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
    if kind == "drop":
        return data[:at] + data[at + size :]
    if kind == "insert":
        return data[:at] + random_.randbytes(size) + data[at:]
    if kind == "append":
        return data + random_.randbytes(size)
    return data[:at] + data[at + size : at + 2 * size] + data[at : at + size] + data[at + 2 * size :]


def test_damaged_files(made: Made, tmp_path: Path) -> None:
    good, random_, tried = made.file.read_bytes(), random.Random(0), 0
    file = tmp_path / "damaged.safetensors"
    while tried < DAMAGES:
        bad = damage(good, random_)
        if bad == good:
            continue
        file.write_bytes(bad)
        refused(made, file)
        tried += 1
    file.write_bytes(good)
    losia_fx.load_delta(made.base, file)
    losia_fx.load_delta(made.base, file, undo=True)


@pytest.mark.parametrize(("good", "bad"), [(b"Toy", b"Tox"), (b"float32", b"float64")])
def test_not_one_byte_of_the_header_may_differ(made: Made, tmp_path: Path, good: bytes, bad: bytes) -> None:
    """Not even one that changes no meaning, as the name of the class."""
    data, file = made.file.read_bytes(), tmp_path / "damaged.safetensors"
    assert good in data
    file.write_bytes(data.replace(good, bad, 1))
    assert "its checksum does not fit" in refused(made, file)


def test_every_length_it_is_cut_to_in_the_header(made: Made, tmp_path: Path) -> None:
    good, file = made.file.read_bytes(), tmp_path / "cut.safetensors"
    for length in (*range(20), *range(20, len(good), 997)):
        file.write_bytes(good[:length])
        refused(made, file)


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("kind", ["pickle", "archive", "text", "foreign", "folder", "nowhere"])
def test_what_is_no_delta_at_all(made: Made, tmp_path: Path, kind: str) -> None:
    file, said = tmp_path / "d.safetensors", "no safetensors file"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({WEIGHT: Bomb()}))
        said = "a pickle or an archive"
    elif kind == "archive":
        torch.save({WEIGHT: Bomb()}, file)
        said = "a pickle or an archive"
    elif kind == "text":
        file.write_text("version https://example.com/pointer\n", encoding="utf-8")
    elif kind == "foreign":
        save_file(dict(made.base.named_parameters()), file)
        said = "no delta of losia_fx"
    elif kind == "folder":
        file.mkdir()
        said = "no such file"
    else:
        said = "no such file"
    assert said in refused(made, file)


# -- files with a good checksum and bad contents: what somebody might write on purpose ------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def forged(made: Made, file: Path, change: Change) -> Path:
    """The good file with ``change`` made to its tensors and header, under a checksum that fits."""
    with safe_open(made.file, framework="pt") as good:
        tensors = {key: good.get_tensor(key) for key in good.keys()}
        header = json.loads(good.metadata()["delta"])
    change(tensors, header)
    DELTA_FILE.write(file, tensors, header if isinstance(header, str) else json.dumps(header))
    return file


def tensor(part: str, change: Callable[[Tensor], Tensor], visit: int = 0) -> Change:
    def edit(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        key = f"{WEIGHT}/{visit}.{part}"
        tensors[key] = change(tensors[key])

    return edit


def record(**fields: Any) -> Change:
    return lambda tensors, header: header["weights"][WEIGHT].update(fields)


def header_field(key: str, value: Any) -> Change:
    return lambda tensors, header: header.update({key: value})


def renamed(name: str) -> Change:
    """Another name for the weight throughout."""

    def edit(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        header["weights"][name] = header["weights"].pop(WEIGHT)
        for key in [key for key in tensors if key.startswith(WEIGHT + "/")]:
            tensors[name + key.removeprefix(WEIGHT)] = tensors.pop(key)

    return edit


def visit_twice(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    for part in ("rows", "cols", "bits"):
        tensors[f"{WEIGHT}/1.{part}"] = tensors[f"{WEIGHT}/0.{part}"].clone()


def first(index: int) -> Callable[[Tensor], Tensor]:
    return lambda indices: torch.cat([torch.tensor([index], dtype=indices.dtype), indices[1:]])


FORGERIES: list[tuple[str, Change, str]] = [
    ("nothing", lambda tensors, header: None, ""),
    ("row beyond the last", tensor("rows", lambda t: torch.cat([t[:-1], t.new_tensor([16])])), "outside of 0 to 15"),
    ("row below zero", tensor("rows", first(-1)), "outside of 0 to 15"),
    ("column far away", tensor("cols", lambda t: torch.cat([t[:-1], t.new_tensor([2**31 - 1])])), "outside of"),
    ("rows unsorted", tensor("rows", lambda t: t.flip(0)), "not sorted and distinct"),
    ("row twice", tensor("rows", lambda t: t[[0, 0, 2, 3]]), "not sorted and distinct"),
    ("rows of another dtype", tensor("rows", lambda t: t.long()), "rows are int64"),
    ("rows as floats", tensor("rows", lambda t: t.float()), "rows are float32"),
    ("rows in two dimensions", tensor("rows", lambda t: t[None]), "does not fit"),
    ("no rows", tensor("rows", lambda t: t[:0]), "does not fit"),
    ("bits as floats", tensor("bits", lambda t: t.view(torch.float32)), "bits are float32"),
    ("bits of another width", tensor("bits", lambda t: t.view(torch.int16)), "bits are int16"),
    ("too few bits", tensor("bits", lambda t: t[:-1]), "too few"),
    ("too many bits", tensor("bits", lambda t: torch.cat([t, t])), "values for 16 new elements"),
    ("elements that had their turn", visit_twice, "16 values for 0 new elements"),
    ("one bit other", tensor("bits", lambda t: t ^ 1), "do not lead to the weight"),
    ("a tensor more", lambda tensors, header: tensors.update(more=torch.zeros(1)), "not those that its header names"),
    ("a tensor less", lambda tensors, header: tensors.pop(f"{WEIGHT}/0.cols"), "not those that its header"),
    ("a tensor renamed", lambda t, h: t.update({"x": t.pop(f"{WEIGHT}/0.cols")}), "not those that its header names"),
    ("visits beyond reason", record(visits=10**15), "not those that its header names"),
    ("visits below zero", record(visits=-1), "visits"),
    ("visits of a fraction", record(visits=1.5), "'visits' is 1.5"),
    ("visits true", record(visits=True), "'visits' is True"),
    ("whole that is not", record(visits=0), "not those that its header names"),
    ("a shape beyond reason", record(shape=[2**40, 2**40]), "shape"),
    ("another shape", record(shape=[17, 16]), "shape"),
    ("a flat shape", record(shape=[256]), "visits of a weight of shape"),
    ("a shape below zero", record(shape=[-16, -16]), "shape"),
    ("a shape of words", record(shape="16"), "'shape' is '16'"),
    ("an unknown dtype", record(dtype="int64"), "dtype 'int64'"),
    ("another dtype", record(dtype="bfloat16"), "dtype"),
    ("a false base", record(base="0" * 64), "not that of the base model"),
    ("a false outcome", record(tuned="0" * 64), "do not lead to the weight"),
    ("a base that is a number", record(base=7), "'base' is 7"),
    ("a weight that is not there", renamed("layers.9.mix.weight"), "layers.9.mix.weight: the model has no such weight"),
    ("a weight that is a list", lambda tensors, header: header["weights"].update({WEIGHT: []}), "no delta's"),
    ("weights in a list", header_field("weights", []), "'weights' is []"),
    ("no weights", lambda tensors, header: header.pop("weights"), "'weights' is None"),
    ("a later format", header_field("format", 2), "is of format 2"),
    ("a format of words", header_field("format", "1"), "'format' is '1'"),
    ("a name that a terminal obeys", renamed("\x1b[2Jlayers"), "name '\\x1b[2Jlayers'"),
    ("a model that a terminal obeys", header_field("model", "Toy\x1b[2J"), "name 'Toy\\x1b[2J'"),
    ("a model that is a number", header_field("model", 1), "'model' is 1"),
]


@pytest.mark.parametrize(("change", "said"), [pytest.param(c, said, id=name) for name, c, said in FORGERIES])
def test_a_forged_file(made: Made, tmp_path: Path, change: Change, said: str) -> None:
    file = forged(made, tmp_path / "forged.safetensors", change)
    if not said:  # the forger's own hand is steady
        losia_fx.load_delta(made.base, file)
        losia_fx.load_delta(made.base, file, undo=True)
        return
    assert said in refused(made, file)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, '{"format": NaN}', "9" * 5000])
def test_a_forged_header(made: Made, tmp_path: Path, text: str) -> None:
    DELTA_FILE.write(tmp_path / "forged.safetensors", {"x": torch.zeros(1)}, text)
    assert "its header is no delta's" in refused(made, tmp_path / "forged.safetensors")


def test_one_weight_under_two_names(tmp_path: Path) -> None:
    """XOR twice is nothing: a tied weight may be in the file once."""
    made = make(tmp_path, steps=4, trainable=("norm",))
    made.base.layers[1].mix.weight = made.base.layers[0].mix.weight  # type: ignore[union-attr]

    def edit(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        kept = {WEIGHT: header["weights"][WEIGHT]}
        other = WEIGHT.replace("0", "1", 1)
        header["weights"] = {**kept, other: kept[WEIGHT]}
        for key in list(tensors):
            if key.startswith(WEIGHT + "/"):
                tensors[other + key.removeprefix(WEIGHT)] = tensors[key].clone()
            elif key.rpartition("/")[0] != WEIGHT and not key.startswith(other + "/"):
                del tensors[key]
        for key in [key for key in tensors if key.startswith(other) and key.replace(other, WEIGHT) not in tensors]:
            del tensors[key]

    file = forged(made, tmp_path / "forged.safetensors", edit)
    assert "shares its memory" in refused(made, file)


def test_a_subnet_is_no_weight(made: Made, tmp_path: Path) -> None:
    file = forged(made, tmp_path / "forged.safetensors", renamed(f"{WEIGHT}_subnet"))
    with pytest.raises(DeltaError, match="has no such weight"):
        losia_fx.load_delta(made.model, file, undo=True)


def test_a_header_whose_length_starts_like_a_pickle(made: Made, tmp_path: Path) -> None:
    """The first byte of a safetensors file is the low byte of its header's length, and 0x80 is one like any other."""
    for length in range(0, 256, 8):
        file = tmp_path / "empty.safetensors"
        write_delta(file, "m" * length, [], {})
        if file.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no such length")
    losia_fx.load_delta(made.base, file)
