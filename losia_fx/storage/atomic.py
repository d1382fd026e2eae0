"""Files that are whole or as they were: written under another name, flushed to the disk, renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, write: Callable[[Path], None]) -> None:
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


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
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


def write_files(folder: Path, write: Callable[[Path], None], name: str = "files") -> None:
    """Has ``write`` fill a new folder, flushes every file in it and moves them into ``folder``: each is whole.

    name: of the new folder, where others may be writing to ``folder`` too.
    """
    draft = folder / f".{name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write(draft)
        for file in sorted(draft.iterdir(), key=lambda file: -file.stat().st_size):  # an index is less than its shards
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
