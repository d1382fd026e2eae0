"""Files that are whole or not there: atomic writes, and tensors with plain values in a file that proves itself.

The format is safetensors (a length, a JSON header, raw bytes: nothing in it can run) with two entries of metadata: the
plain values as JSON, and the SHA-256 of the file with that digest's own place filled with zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import StateError

PLAIN, DIGEST = "losia_fx", "sha256"
NO_DIGEST = "0" * 64
LONGEST_HEADER = 100_000_000  # what safetensors itself allows
CHUNK = 1 << 20


def write_safely(path: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a neighbour of ``path``, flushes it to the disk and renames it.

    The file is whole or as it was, never half: not after a crash, not on a full disk.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        write(draft)
        flush(draft)
        draft.replace(path)
        flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_folder_safely(path: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a new folder, flushes every file in it and renames it to ``path``, which must not exist."""
    draft = path.with_name(f".{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir(parents=True)
    try:
        write(draft)
        for file in draft.iterdir():
            flush(file)
        flush(draft)
        draft.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_files_safely(folder: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a new folder, flushes every file in it and moves them into ``folder``: each is whole."""
    draft = folder / ".files.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write(draft)
        for file in sorted(draft.iterdir()):
            flush(file)
            file.replace(folder / file.name)
        flush(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder, if it is there, under another name: half of it is never taken for the whole."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        path.rename(gone)
        shutil.rmtree(gone)


def flush(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and its renames need no help
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Writes tensors and plain (JSON) values to ``path``, atomically."""

    def write(draft: Path) -> None:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, draft, metadata={PLAIN: json.dumps(plain), DIGEST: NO_DIGEST})
        place, digest = _digest(draft)
        with draft.open("r+b") as file:
            file.seek(place)
            file.write(digest.encode())

    write_safely(path, write)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What write_tensors wrote: tensors on the CPU, and the plain values.

    Raises StateError, naming the file, for anything that is not such a file to the last bit; OSError where it cannot
    be read at all.
    """
    place, digest = _digest(path)
    with path.open("rb") as file:
        file.seek(place)
        if file.read(len(digest)) != digest.encode():
            raise StateError(f"{path}: damaged: its contents do not match its checksum")
    try:
        with safe_open(path, framework="pt") as opened:
            plain = json.loads((opened.metadata() or {})[PLAIN])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise StateError(f"{path}: not a state file of losia_fx: {error}") from None
    if not isinstance(plain, dict):
        raise StateError(f"{path}: not a state file of losia_fx: no object of plain values in its header")
    return tensors, plain


def _digest(path: Path) -> tuple[int, str]:
    """Where in the file its digest stands, and what it should be."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(LONGEST_HEADER, path.stat().st_size - 8):
            raise StateError(f"{path}: not a state file of losia_fx, or cut short (it is no safetensors file)")
        header = file.read(size)
        # Quotes inside the plain values are escaped, so this is the entry itself.
        key = f'"{DIGEST}":"'.encode()
        place = header.find(key) + len(key)
        if place < len(key) or header.find(key, place) >= 0 or len(header) < place + len(NO_DIGEST):
            raise StateError(f"{path}: not a state file of losia_fx: its header has no checksum")
        blank = header[:place] + NO_DIGEST.encode() + header[place + len(NO_DIGEST) :]
        summed = hashlib.sha256(size.to_bytes(8, "little") + blank)
        while chunk := file.read(CHUNK):
            summed.update(chunk)
    return 8 + place, summed.hexdigest()
