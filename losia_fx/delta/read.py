"""Reading a delta file, with distrust: whatever ``write_delta`` would not have written is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from losia_fx.errors import DeltaError
from losia_fx.method.visits import INTEGERS, Piece, place_after

from .format import DELTA_FILE, DTYPES, FORMAT, WeightRecord


class DeltaFile:
    """An open delta file: its records, and the pieces of a weight on demand; a context manager.

    Raises DeltaError, naming the file and the weight, for anything that ``write_delta`` would not have written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DeltaError(f"{self.path}: there is no such file")
        DELTA_FILE.check(self.path)
        try:
            self._file: Any = _open(self.path)
        except (SafetensorError, ValueError) as error:
            raise DeltaError(f"{self.path}: is no sound safetensors file: {error}") from None
        metadata: dict[str, str] = self._file.metadata() or {}
        self.model, self.records = self._header(metadata.get(DELTA_FILE.entry))
        self._check_keys()

    def __enter__(self) -> DeltaFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.__exit__(kind, error, at)

    def pieces(self, record: WeightRecord) -> list[Piece]:
        """The changed bits of a weight, as integers of its width; rows and cols as int64."""
        if not record.visits:
            bits = self._bits(record, 0)
            if bits.numel() != record.size:
                raise self._fault(record, f"{bits.numel()} elements for a weight of {record.size}")
            return [Piece(bits)]
        pieces: list[Piece] = []
        for number in range(record.visits):
            bits = self._bits(record, number)
            rows = self._indices(record, number, "rows", record.shape[-2])
            cols = self._indices(record, number, "cols", record.shape[-1])
            self._check_block(record, number, pieces, Piece(bits, rows, cols))
            pieces.append(Piece(bits, rows, cols))
        return pieces

    def nbytes(self, record: WeightRecord) -> int:
        return sum(self._tensor(record, key).nbytes for key in record.keys)

    def _check_block(self, record: WeightRecord, number: int, earlier: list[Piece], piece: Piece) -> None:
        assert piece.rows is not None
        assert piece.cols is not None
        block = piece.rows.numel() * piece.cols.shape[-1]
        known = piece.values.numel() + sum(other.values.numel() for other in earlier)
        if block > known:  # also keeps a hostile file from asking for a mask larger than itself
            raise self._fault(record, f"visit {number}: {piece.values.numel()} values are too few for {block} elements")
        new = place_after(earlier, piece.rows, piece.cols).new
        expected = block if new is None else int(new.sum())
        if piece.values.numel() != expected:
            raise self._fault(record, f"visit {number}: {piece.values.numel()} values for {expected} new elements")

    def _bits(self, record: WeightRecord, number: int) -> Tensor:
        bits = self._tensor(record, f"{record.name}/{number}.bits")
        wanted = INTEGERS[record.dtype.itemsize]
        if bits.dtype != wanted or bits.dim() != 1 or not bits.numel():
            raise self._fault(record, f"visit {number}: bits are {_kind(bits)}, not {wanted} in one dimension")
        return bits

    def _indices(self, record: WeightRecord, number: int, part: str, size: int) -> Tensor:
        indices = self._tensor(record, f"{record.name}/{number}.{part}")
        where = f"visit {number}: {part}"
        if indices.dtype != torch.int32 or indices.shape[:-1] != record.shape[:-2] or not indices.numel():
            raise self._fault(record, f"{where} are {_kind(indices)}, which does not fit a weight of {record.shape}")
        if int(indices.min()) < 0 or int(indices.max()) >= size:
            raise self._fault(record, f"{where} reach outside of 0 to {size - 1}")
        if not bool((indices[..., 1:] > indices[..., :-1]).all()):
            raise self._fault(record, f"{where} are not sorted and distinct")
        return indices.long()

    def _tensor(self, record: WeightRecord, key: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (SafetensorError, KeyError, TypeError) as error:  # a dtype that torch lacks, too
            raise self._fault(record, f"{key} cannot be read: {error}") from None
        return tensor

    def _check_keys(self) -> None:
        """Exactly the tensors that the records speak of: counted first, a hostile count would name billions."""
        keys = set(self._file.keys())
        if sum(max(1, 3 * record.visits) for record in self.records) == len(keys):
            if {key for record in self.records for key in record.keys} == keys:
                return
        raise DeltaError(f"{self.path}: its tensors are not those that its header names: it is no sound delta")

    def _header(self, text: str | None) -> tuple[str, tuple[WeightRecord, ...]]:
        try:
            header = json.loads(text or "")
            if _of(header, "format", int) != FORMAT:
                raise DeltaError(
                    f"{self.path}: is of format {header['format']}; this losia_fx reads {FORMAT}: update it"
                )
            weights = _of(header, "weights", dict)
            if not (model := _of(header, "model", str)).isprintable():
                raise ValueError(f"the model's name {model!r}")
            return model, tuple(_record(name, found) for name, found in weights.items())
        except (ValueError, RecursionError) as error:
            raise DeltaError(f"{self.path}: its header is no delta's: {error}") from None

    def _fault(self, record: WeightRecord, what: str) -> DeltaError:
        return DeltaError(f"{self.path}: {record.name}: {what}: it is no sound delta; nothing was changed")


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt", device="cpu")


def _record(name: str, found: Any) -> WeightRecord:
    """Raises ValueError for anything but a record."""
    shape, visits, dtype = _of(found, "shape", list), _of(found, "visits", int), _of(found, "dtype", str)
    if not name.isprintable():  # it will be: on terminals, where control characters are commands
        raise ValueError(f"the weight's name {name!r}")
    if not all(type(length) is int and length > 0 for length in shape):
        raise ValueError(f"{name}: shape {shape}")
    if visits < 0 or (visits and len(shape) not in (2, 3)):
        raise ValueError(f"{name}: {visits} visits of a weight of shape {shape}")
    if dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r}; there are {', '.join(DTYPES)}")
    return WeightRecord(name, tuple(shape), DTYPES[dtype], visits, _of(found, "base", str), _of(found, "tuned", str))


def _of(found: Any, key: str, kind: type[Any]) -> Any:
    value = found.get(key) if isinstance(found, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{key!r} is {value!r}, not {kind.__name__}")
    return value


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
