"""The state file: tensors and plain values in one checksummed file; what checkpoints of training are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from losia_fx.errors import StateError

from .checksummed import ChecksummedFormat

STATE_FILE = ChecksummedFormat("state file", "losia_fx", StateError)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Writes tensors and plain (JSON) values to ``path``, atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    STATE_FILE.write(path, on_cpu, json.dumps(plain))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What write_tensors wrote: tensors on the CPU, and the plain values.

    Raises StateError, naming the file, for anything that is not such a file to the last bit; OSError where it cannot
    be read at all.
    """
    STATE_FILE.check(path)
    try:
        with safe_open(path, framework="pt") as opened:
            plain = json.loads((opened.metadata() or {})[STATE_FILE.entry])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise StateError(f"{path}: is no state file of losia_fx: {error}") from None
    if not isinstance(plain, dict):
        raise StateError(f"{path}: is no state file of losia_fx: no object of plain values in its header")
    return tensors, plain
