"""The delta file: one safetensors file of what training changed. Written here, read in read.py.

For every weight and visit ``<weight>/<visit>.rows`` and ``.cols`` (int32, sorted) and ``.bits``: base XOR tuned, the
bits of the elements of the block that are in no earlier block of the weight, as integers of the weight's width. XOR is
its own inverse, so the one number an element serves to apply and to undo, both exact. A weight kept whole has
``<weight>/0.bits`` alone. The metadata holds ``delta``, a JSON text with names, shapes, dtypes and fingerprints, and
the checksum of losia_fx.storage.checksummed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from losia_fx.errors import DeltaError
from losia_fx.method.visits import Piece, is_plain
from losia_fx.runtime.quantised_weight import QuantisedWeight
from losia_fx.runtime.shards import is_cut_by_rows
from losia_fx.storage.checksummed import ChecksummedFormat

FORMAT = 1
DELTA_FILE = ChecksummedFormat("delta", "delta", DeltaError)
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
}


@dataclass(frozen=True)
class WeightRecord:
    """What the file says of a weight."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    visits: int
    """How many blocks there are; 0 where the weight is kept whole."""
    base: str
    """sha256 of the weight's bytes before training, hex."""
    tuned: str
    """The same after it."""

    @property
    def keys(self) -> list[str]:
        """The names of its tensors in the file."""
        blocks = [f"{self.name}/{n}.{part}" for n in range(self.visits) for part in ("rows", "cols", "bits")]
        return blocks or [f"{self.name}/0.bits"]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def digest(tensor: Tensor) -> str:
    """sha256 of the values' bytes, hex."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def fingerprint(records: Sequence[WeightRecord], which: str) -> str:
    """One sha256 over the names, shapes, dtypes and bytes of all weights; ``which``: "base" or "tuned"."""
    rows = sorted((r.name, list(r.shape), str(r.dtype), getattr(r, which)) for r in records)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def check_plain(path: Path, name: str, weight: Tensor) -> None:
    """Raises DeltaError for a weight whose values are not all here, nor on the ranks of FSDP2, or are rounded ones."""
    if isinstance(weight, QuantisedWeight):
        raise DeltaError(
            f"{path}: {name}: is kept in 8 bits (keep_dense=False), rounded, and a delta is of the bits of weights "
            "before and after training: save the whole model, or transform with keep_dense=True"
        )
    if not (is_plain(weight) or is_cut_by_rows(weight)):
        kind = "on the meta device" if weight.is_meta else f"a {type(weight.data).__name__}, sharded"
        raise DeltaError(f"{path}: {name}: is {kind}: a delta needs the whole weight")


def write_delta(path: Path, model: str, records: Sequence[WeightRecord], pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Writes the file; ``path`` is whole or as it was. Raises OSError where that fails."""
    tensors: dict[str, Tensor] = {}
    for record in records:
        for number, piece in enumerate(pieces[record.name]):
            tensors[f"{record.name}/{number}.bits"] = piece.values.contiguous()
            if piece.rows is not None and piece.cols is not None:
                tensors[f"{record.name}/{number}.rows"] = piece.rows.int()
                tensors[f"{record.name}/{number}.cols"] = piece.cols.int()
    DELTA_FILE.write(path, tensors, _header_text(model, records))


def _header_text(model: str, records: Sequence[WeightRecord]) -> str:
    weights = {
        record.name: {
            "shape": list(record.shape),
            "dtype": str(record.dtype).removeprefix("torch."),
            "visits": record.visits,
            "base": record.base,
            "tuned": record.tuned,
        }
        for record in records
    }
    return json.dumps({"format": FORMAT, "model": model, "weights": weights})
