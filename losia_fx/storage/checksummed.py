"""A safetensors file with a checksum of itself: written whole or not at all, and every bit of it is known to be right.

safetensors checks its header and no value. Here the metadata holds ``sha256``, that of the whole file with 64 zeros in
the place of the sum itself, beside a text of the writer's. Nothing in such a file can run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from losia_fx.errors import LosiaError

from .atomic import write_file

_ZEROS = b"0" * 64
_CHECKSUM = b'"sha256":"'  # quotes inside the text are escaped, so this is the entry itself
_LONGEST_HEADER = 100_000_000  # that of safetensors itself


@dataclass(frozen=True)
class ChecksummedFormat:
    """One kind of such files.

    kind: what a reader calls it ("delta", "state file"). entry: name of the text in the metadata. error: what a file
    that is none, or a damaged one, raises; its text names the file.
    """

    kind: str
    entry: str
    error: type[LosiaError]

    def write(self, path: Path, tensors: Mapping[str, Tensor], text: str) -> None:
        """Writes tensors (contiguous, on the CPU) and ``text`` to ``path``, atomically. Raises OSError."""

        def fill(draft: Path) -> None:
            try:
                save_file(dict(tensors), draft, metadata={self.entry: text, "sha256": _ZEROS.decode()})
            except SafetensorError as error:  # a full disk and the like
                raise OSError(f"{path}: cannot be written: {error}") from error
            found, at = self.checksum(draft)
            with draft.open("r+b") as file:
                file.seek(at)
                file.write(found.encode())

        write_file(path, fill)

    def check(self, path: Path) -> None:
        """Raises ``error`` unless every bit of the file is as it was written; OSError where it cannot be read."""
        found, at = self.checksum(path)
        with path.open("rb") as file:
            file.seek(at)
            if file.read(len(found)) != found.encode():
                raise self.error(f"{path}: is damaged (its checksum does not fit): copy or make it again")

    def checksum(self, path: Path) -> tuple[str, int]:
        """sha256 of the file with zeros in the place of the sum, and that place; ``error`` where there is none."""
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            head = file.read(8 + self._header_length(path))
            at = head.find(_CHECKSUM) + len(_CHECKSUM)
            if head.count(_CHECKSUM) != 1 or len(head) < at + len(_ZEROS):
                raise self.error(f"{path}: is a safetensors file, but no {self.kind} of losia_fx (it has no checksum)")
            hashed.update(head[:at] + _ZEROS + head[at + len(_ZEROS) :])
            while chunk := file.read(1 << 20):
                hashed.update(chunk)
        return hashed.hexdigest(), at

    def _header_length(self, path: Path) -> int:
        with path.open("rb") as file:
            start = file.read(8)
        size = path.stat().st_size
        length = int.from_bytes(start, "little") if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            if start[:1] == b"\x80" or start[:2] == b"PK":
                raise self.error(f"{path}: is a pickle or an archive, not a {self.kind}; it was not opened")
            raise self.error(f"{path}: is no safetensors file, or cut short ({size} bytes)")
        return length
