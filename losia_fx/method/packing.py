"""Tensors in 8 bits an element: a row is its 8-bit numbers times one scale of the row's own."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
"""What LosiaConfig.frozen_products names, and how its numbers are kept."""
LARGEST = {"int8": 127.0, "float8": 448.0}
"""The number that stands for the greatest magnitude of a row: int8's -128 is left out, so that a row and its negative
have the same numbers but for the sign."""
MULTIPLES = {"int8": 8, "float8": 16}
"""A GPU's products of these take sizes of such multiples; a CPU's are held to the same, so that both pack alike."""
LEAST = 1e-30
"""Of a row's greatest magnitude, so that a row of zeros has a scale."""
CHUNK = 2**22
"""Elements of a weight that are packed at a time: in between they take four bytes each, several times over."""


def quantise(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(numbers of DTYPES[kind], scales float32) with x ~ numbers * scales, nearest. x (..., n), scales (..., 1).

    A scale is the row's greatest magnitude over LARGEST[kind], so nothing is clipped. What is not finite makes the
    scale of its row so, and with it all that comes of the row.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    numbers = x * (LARGEST[kind] / largest)
    numbers = numbers.round() if kind == "int8" else numbers
    # Inductor may take the greatest magnitude of an x that it has not rounded to x's dtype, and the numbers of one that
    # it has, or the other way round: what goes beyond would wrap around to the other sign, or be no number.
    return numbers.clamp(-LARGEST[kind], LARGEST[kind]).to(DTYPES[kind]), largest / LARGEST[kind]


def pack(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``quantise`` of the rows of a weight (out, in), a part at a time."""
    numbers = torch.empty(weight.shape, dtype=DTYPES[kind], device=weight.device)
    scales = torch.empty(weight.shape[0], 1, device=weight.device)
    height = max(1, CHUNK // weight.shape[1])
    for first in range(0, weight.shape[0], height):
        part = slice(first, first + height)
        numbers[part], scales[part] = quantise(weight[part], kind)
    return numbers, scales


def pack_rows(weight: Tensor, rows: Tensor, kind: str, numbers: Tensor, scales: Tensor) -> None:
    """Makes those rows of what ``pack`` gave anew, in place. rows (r,) int64."""
    fresh, fresh_scales = quantise(weight.index_select(0, rows), kind)
    # As bytes: float8 has no index_copy_.
    numbers.view(torch.uint8).index_copy_(0, rows, fresh.view(torch.uint8))
    scales.index_copy_(0, rows, fresh_scales)
