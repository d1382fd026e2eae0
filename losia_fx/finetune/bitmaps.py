"""Rows and columns of a subnet as text, for JSON: a bit an index, in base64.

An eighth of the indices as numbers takes four times as much, and a browser reads bits with atob().
"""

from __future__ import annotations

import base64
import binascii

import numpy as np
import torch
from torch import Tensor


def encode(indices: Tensor, size: int) -> str:
    """The bitmap of ``indices`` below ``size``: (n,), or (E, n) of E experts, whose bitmaps follow each other.

    Bit i is bit 7 - i % 8 of byte i // 8; E experts take E * size bits, without a gap.
    """
    table = indices.reshape(-1, indices.shape[-1])
    bits = table.new_zeros(table.shape[0], size, dtype=torch.uint8).scatter_(1, table, 1)
    return base64.b64encode(np.packbits(bits.flatten().numpy()).tobytes()).decode("ascii")


def decode(text: str, size: int, experts: int | None = None) -> Tensor:
    """The sorted int64 indices, (n,), or (E, n) of ``experts``. Raises ValueError where the text is no such bitmap."""
    count = experts or 1
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from None
    if packed.size != -(-count * size // 8):
        raise ValueError(f"{packed.size} bytes, and {count} x {size} bits are expected")
    bits = torch.from_numpy(np.unpackbits(packed, count=count * size)).reshape(count, size)
    lengths = bits.sum(1, dtype=torch.int64)
    if not bool((lengths == lengths[0]).all()):
        raise ValueError("the experts have subnets of different sizes")
    indices = bits.nonzero()[:, 1].reshape(count, -1)
    return indices[0] if experts is None else indices
