"""A safetensors file with a checksum of itself: written whole or not at all, and every bit of it is known to be right.

safetensors checks its header and no value. Here the metadata holds ``sha256``, that of the whole file with 64 zeros in
the place of the sum itself.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import DeltaError

_ZEROS = b"0" * 64
_CHECKSUM = b'"sha256":"'
_LONGEST_HEADER = 100_000_000  # that of safetensors itself


def write_sealed(path: Path, tensors: Mapping[str, Tensor], text: str) -> None:
    """Writes tensors and ``text`` (metadata "delta") beside ``path`` and renames: ``path`` is whole or as it was.

    Raises OSError where that fails.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        try:
            save_file(dict(tensors), draft, metadata={"delta": text, "sha256": _ZEROS.decode()})
        except SafetensorError as error:  # a full disk and the like
            raise OSError(f"{path}: cannot be written: {error}") from error
        _seal(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_seal(path: Path) -> None:
    """Raises DeltaError unless every bit of the file is as it was written."""
    if not path.is_file():
        raise DeltaError(f"{path}: there is no such file")
    found, at = _checksum(path)
    with path.open("rb") as file:
        file.seek(at)
        if file.read(64) != found.encode():
            raise DeltaError(f"{path}: is damaged (its checksum does not fit): copy or make it again")


def _seal(draft: Path) -> None:
    """Puts the checksum into its place and the file onto the disk."""
    found, at = _checksum(draft)
    with draft.open("r+b") as file:
        file.seek(at)
        file.write(found.encode())
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> tuple[str, int]:
    """sha256 of the file with zeros in the checksum's place, and that place. Raises DeltaError where there is none."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(8 + _header_length(path))
        at = head.find(_CHECKSUM) + len(_CHECKSUM)
        if head.count(_CHECKSUM) != 1 or len(head) < at + 64:
            raise DeltaError(f"{path}: is a safetensors file, but no delta of losia_fx (it has no checksum)")
        hashed.update(head[:at] + _ZEROS + head[at + 64 :])
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest(), at


def _header_length(path: Path) -> int:
    """Raises DeltaError for a file that cannot be a safetensors file."""
    with path.open("rb") as file:
        start = file.read(8)
    size = path.stat().st_size
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        if start[:1] == b"\x80" or start[:2] == b"PK":
            raise DeltaError(f"{path}: is a pickle or an archive, not a delta; it was not opened")
        raise DeltaError(f"{path}: is no safetensors file, or cut short ({size} bytes)")
    return int(length)
