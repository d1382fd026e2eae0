"""Products of rows that are sorted by expert: by torch's kernel where it has one, else expert by expert.

The kernel reads on the device where an expert's rows end; a loop needs it on the host, which waits for the device to
say so. ``ends`` is either, as ``ends_for`` makes it: (E,), int32 on the device for the kernel, int64 on the CPU for the
loop. Rows past the last expert's end belong to none, and come out of no sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_DTYPE = torch.bfloat16
"""The one for which torch has a kernel that its compilers take."""
ALIGNED = 8
"""The kernel's rows start at multiples of so many elements (16 bytes)."""


def ends_for(offsets: Tensor, dtype: torch.dtype, *widths: int) -> Tensor:
    """``offsets``, (E,) where each expert's rows end, for products of that dtype whose matrices are ``widths`` wide."""
    if dtype == KERNEL_DTYPE and all(width % ALIGNED == 0 for width in widths):
        return offsets.to(torch.int32)
    ends: Tensor = torch.ops.losia.ends_on_host(offsets)
    return ends


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x_e w_e of every expert, (tokens, out). x (tokens, in), weight (E, in, out)."""
    if ends.dtype == torch.int32:
        return F.grouped_mm(x.contiguous(), weight, offs=ends)
    y: Tensor = torch.ops.losia.grouped_mm(x, weight, ends)
    return y


def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """x_e^T y_e of every expert, (E, m, n). x (tokens, m), y (tokens, n); zero for an expert without rows."""
    if ends.dtype != torch.int32:
        result: Tensor = torch.ops.losia.grouped_outer(x, y, ends)
        return result
    product = F.grouped_mm(_aligned(x).t(), _aligned(y), offs=ends)[:, : x.shape[1], : y.shape[1]]
    # Blackwell's kernel writes something else than zeros for an expert without rows (pytorch issue 172439).
    idle = ends == F.pad(ends[:-1], (1, 0))
    return product.masked_fill(idle[:, None, None], 0.0)


def _aligned(x: Tensor) -> Tensor:
    """x with zeros up to the width that the kernel takes."""
    missing = -x.shape[1] % ALIGNED
    return F.pad(x, (0, missing)) if missing else x.contiguous()


@torch.library.custom_op("losia::ends_on_host", mutates_args=())
def _ends_on_host(offsets: Tensor) -> Tensor:
    return offsets.to("cpu", torch.int64, copy=True)


@_ends_on_host.register_fake
def _(offsets: Tensor) -> Tensor:
    return torch.empty(offsets.shape, dtype=torch.int64, device="cpu")


@torch.library.custom_op("losia::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[2])
    for expert, rows in _segments(ends):
        torch.mm(x[rows], weight[expert], out=y[rows])
    return y


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("losia::grouped_outer", mutates_args=())
def _grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    result = x.new_zeros(ends.shape[0], x.shape[1], y.shape[1])
    for expert, rows in _segments(ends):
        torch.mm(x[rows].t(), y[rows], out=result[expert])
    return result


@_grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _segments(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for each expert that has any."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
            start = end
