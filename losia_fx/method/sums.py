"""Importance by rows and columns: running means of the sums of G^2, out + in numbers of a weight instead of two an
element. Tensors in, tensors out; the host never waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels import CHUNK
from .selection import Selection, top


def sums_shapes(weight: Tensor) -> tuple[torch.Size, torch.Size]:
    """Of a number for each row and for each column: (out,) and (in,), or (E, out) and (E, in)."""
    return weight.shape[:-1], torch.Size((*weight.shape[:-2], weight.shape[-1]))


def add_sums(row_sums: Tensor, col_sums: Tensor, grad: Tensor, factor: float, limit: float | None, beta: float) -> None:
    """One step's part in the running means, in place, of the gradient clamp(factor * G, -limit, limit).

    grad: G (out, in), or (E, out, in) of experts; row_sums (out,) or (E, out) and col_sums (in,) or (E, in), float32:
    sum = beta * sum + (1 - beta) * the sum of the squares. A few rows at a time: nothing of G's size is made.
    """
    row_sums.mul_(beta)
    col_sums.mul_(beta)
    bound = math.inf if limit is None else limit
    lines = max(1, CHUNK.get(grad.device.type, CHUNK["cuda"]) // max(1, grad.numel() // grad.shape[-2]))
    for first in range(0, grad.shape[-2], lines):
        part = slice(first, first + lines)
        squares = (grad[..., part, :].float() * factor).clamp(-bound, bound).square()
        row_sums[..., part].add_(squares.sum(-1), alpha=1 - beta)
        col_sums.add_(squares.sum(-2), alpha=1 - beta)


def per_visit(sums: Tensor, before: Tensor | None, present: Tensor) -> Tensor:
    """sums (..., n) over 1 + the subnets that an index was in: those ``before`` (int64, None for none), and the one of
    the ``present`` indices (..., k)."""
    visits = torch.zeros_like(sums, dtype=torch.int64) if before is None else before
    return sums / (1 + visit(visits, present))


def visit(visits: Tensor, present: Tensor) -> Tensor:
    """One more of each of the ``present`` indices, a new tensor."""
    return visits.scatter_add(-1, present, torch.ones_like(present))


def in_proportion(sums: Tensor, generator: torch.Generator) -> Tensor:
    """Keys whose largest k are a draw of k indices in proportion to ``sums``, without replacement; of ``sums``' shape.

    Source: Efraimidis and Spirakis, 2006: log(u) / sum, with u uniform in (0, 1). An index with a sum of zero is taken
    only where there are no others left.
    """
    drawn = torch.rand(sums.shape, generator=generator, dtype=torch.float64, device="cpu")
    keys = drawn.clamp_min(torch.finfo(torch.float64).tiny).log()
    return keys.to(sums.device, non_blocking=True) / sums.double()


def select_by_sums(
    scores: tuple[Tensor, Tensor], sums: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], whole_cols: bool
) -> tuple[Selection, Tensor]:
    """The rows and the columns with the largest ``scores`` (of equals the lowest index), as many as ``old`` has; and
    the sum of all rows' ``sums``, 0-dim.

    whole_cols: every column learns, as in the head. An expert whose sums are zero saw no token, and keeps its subnet.
    captured: what these rows and columns hold if an element's share is the product of its row's and its column's.
    """
    rows = top(scores[0], old[0].shape[-1])
    cols = old[1] if whole_cols else top(scores[1], old[1].shape[-1])
    total = sums[0].sum(-1)
    if rows.dim() == 2:
        saw = (total > 0).unsqueeze(-1)
        rows, cols = torch.where(saw, rows, old[0]), torch.where(saw, cols, old[1])
    inside = sums[0].gather(-1, rows).sum(-1) * sums[1].gather(-1, cols).sum(-1) / sums[1].sum(-1)
    return Selection(rows, cols, inside.nan_to_num(0.0).sum()), total.sum()
