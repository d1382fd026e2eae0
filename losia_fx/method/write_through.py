"""What 8-bit numbers hold of values that go on being written to them: W in 8 bits instead of as it is.

A row's scale stays as long as its values fit, so that what a write leaves alone stays to the bit; a row that outgrows
its scale is packed anew, with room to spare. Scales never shrink: a row that is packed again and again from what its
own numbers say would creep away from what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import CHUNK, DTYPES, LARGEST, LEAST

HEADROOM = 1.125
"""By how much a scale that has become too small is made larger than need be: what grows is packed anew once in a while,
not with every step."""
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
SIGNIFICAND = {"int8": None, "float8": 3}
"""Bits behind the leading one; None where numbers lie at one distance everywhere."""
LEAST_EXPONENT = -6
"""Of e4m3: below 2^-6 its numbers lie as far apart as above it."""


def dequantise(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """numbers * scales in float32, then in ``dtype``, a part at a time. numbers (out, in), scales (out, 1)."""
    height = max(1, CHUNK // max(1, numbers.shape[1]))
    if numbers.shape[0] <= height:
        return (numbers.float() * scales).to(dtype)
    whole = numbers.new_empty(numbers.shape, dtype=dtype)
    for first in range(0, numbers.shape[0], height):
        part = slice(first, first + height)
        whole[part] = numbers[part].float() * scales[part]
    return whole


def nearest(x: Tensor, kind: str) -> Tensor:
    """Of DTYPES[kind], the number nearest to each of x (float32); what is beyond the largest becomes that.

    What is no number becomes 0 in int8: its row's scale is none either.
    """
    x = x.clamp(-LARGEST[kind], LARGEST[kind])
    return (x.round().nan_to_num(0.0) if kind == "int8" else x).to(DTYPES[kind])


def drawn(x: Tensor, noise: Tensor, kind: str) -> Tensor:
    """Of DTYPES[kind], one of the two numbers around each of x (float32), so that their mean is x.

    noise: uniform in [0, 1), of x's shape. The upper one comes as often as x lies towards it, so a number stays itself.
    """
    x = x.clamp(-LARGEST[kind], LARGEST[kind])
    step = _distance(x, kind)
    steps = x / step  # by powers of two: exact
    below = steps.floor()
    found = (below + (noise < steps - below)) * step
    return nearest(found, kind)


def _distance(x: Tensor, kind: str) -> Tensor:
    """Between the two numbers around each of x."""
    bits = SIGNIFICAND[kind]
    if bits is None:
        return torch.ones_like(x)
    exponent = (torch.frexp(x).exponent - 1).clamp_min(LEAST_EXPONENT)
    return torch.ldexp(torch.ones_like(x), exponent - bits)


def held(values: Tensor, scales: Tensor, kind: str) -> Tensor:
    """``values`` as numbers of these scales hold them, float32. scales: float32, of a shape that goes with values'."""
    return nearest(values.float() / scales, kind).float() * scales


def grown(values: Tensor, scales: Tensor, kind: str) -> Tensor:
    """The scales (r, 1) that rows with ``values`` (r, c) in them have from now on.

    As they were where the values fit; else HEADROOM times what they need. Of a row that holds what is not finite, inf:
    nothing of it is a number then (0 times inf), whatever is written to it later.
    """
    largest = values.float().abs().amax(1, keepdim=True)
    needed = (largest.clamp_min(LEAST) * (HEADROOM / LARGEST[kind])).masked_fill(~largest.isfinite(), torch.inf)
    return torch.where(largest <= LARGEST[kind] * scales, scales, needed)


def write(numbers: Tensor, scales: Tensor, rows: Tensor, cols: Tensor, values: Tensor, noise: Tensor | None) -> None:
    """(numbers * scales)[rows][:, cols] = values, in place, nearest; drawn, with ``noise`` (of values' shape).

    numbers (out, in), scales (out, 1); rows (r,) and cols (c,) sorted int64, values (r, c). Nothing waits for a device.
    """
    kind, values = KINDS[numbers.dtype], values.float()
    before = scales.index_select(0, rows)
    after = grown(values, before, kind)
    whole = nearest(take(numbers, 0, rows).float() * (before / after), kind)  # as they are where the scale is
    found = values / after
    block = nearest(found, kind) if noise is None else drawn(found, noise, kind)
    as_bytes(whole).index_copy_(1, cols, as_bytes(block))
    as_bytes(numbers).index_copy_(0, rows, as_bytes(whole))
    scales.index_copy_(0, rows, after)


def take(numbers: Tensor, dim: int, index: Tensor) -> Tensor:
    """numbers.index_select(dim, index), of float8 too."""
    return as_bytes(numbers).index_select(dim, index).view(numbers.dtype)


def as_bytes(numbers: Tensor) -> Tensor:
    """float8 has next to no operation that only moves it: the same memory as bytes."""
    return numbers if numbers.dtype == torch.int8 else numbers.view(torch.uint8)
