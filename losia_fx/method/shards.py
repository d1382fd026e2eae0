"""Tensors that are cut over processes along their first dimension, as FSDP2 cuts them: joined, indexed, chosen from.

Every rank has a ``Portion`` of them: rows of a matrix (out, in), or experts of a stack (E, out, in). What a rank
decides by comes from collectives that give each the same bits, so that all decide alike. Sums that a selection goes by
are taken in float64: however many ranks there are, they come to the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from losia_fx._compat import all_gather

from .selection import Selection, select_experts, top
from .subnet import gather, scatter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch


@dataclass(frozen=True)
class Portion:
    """The indices of dimension 0 that a rank has: ``count`` from ``first`` on, of ``length``; and the ranks that have
    the others. Each but the last ones has ``each``, as torch.chunk cuts."""

    length: int
    first: int
    count: int
    each: int
    group: ProcessGroup

    @staticmethod
    def of(length: int, group: ProcessGroup) -> Portion:
        """This rank's."""
        each = -(-length // dist.get_world_size(group))
        first = min(length, each * dist.get_rank(group))
        return Portion(length, first, min(each, length - first), each, group)

    @property
    def inside(self) -> slice:
        return slice(self.first, self.first + self.count)

    def own(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in ``indices`` (n,) of those in this portion, and what they are within it. The host waits."""
        at = ((indices >= self.first) & (indices < self.first + self.count)).nonzero().view(-1)
        return at, indices[at] - self.first


def summed(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """The sum of each over the ranks; one all-reduce for all of them, which are of one dtype and device."""
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def joined(parts: Sequence[Tensor], portions: Sequence[Portion]) -> list[Tensor]:
    """The whole tensors, of which this rank has ``parts``; one all-gather for all of them, which are of one dtype,
    device and group."""
    if not parts:
        return []
    sizes = [portion.each * part.shape[1:].numel() for part, portion in zip(parts, portions, strict=True)]
    flat = parts[0].new_zeros(sum(sizes))  # ranks with less than their share send zeros for the rest
    for place, part in zip(flat.split(sizes), parts, strict=True):
        place[: part.numel()].copy_(part.reshape(-1))
    ranks = dist.get_world_size(portions[0].group)
    gathered = flat.new_empty(ranks * flat.numel())
    all_gather(gathered, flat, portions[0].group)
    pieces = gathered.view(ranks, -1).split(sizes, dim=1)
    return [
        piece.reshape(-1, *part.shape[1:])[: portion.length]
        for piece, part, portion in zip(pieces, parts, portions, strict=True)
    ]


def own_block(local: Tensor, portion: Portion, own: tuple[Tensor, Tensor], rows: Tensor, cols: Tensor | None) -> Tensor:
    """full[rows][:, cols] with zeros for what others have: the sum over the ranks is the block, to the bit.

    local: this rank's portion of ``full``; own: ``portion.own(rows)``, of a matrix; cols: None for every column.
    """
    width = local.shape[-1] if cols is None else cols.shape[-1]
    block = local.new_zeros(*rows.shape, width)
    if local.dim() == 3:
        mine = portion.inside
        block[mine] = gather(local, rows[mine], None if cols is None else cols[mine])
    else:
        at, inside = own
        block[at] = gather(local, inside, cols)
    return block


def write_block(
    local: Tensor, portion: Portion, own: tuple[Tensor, Tensor], rows: Tensor, cols: Tensor | None, values: Tensor
) -> None:
    """full[rows][:, cols] = values as far as it is in this rank's portion, ``local``; in place, in its dtype.

    values: the whole block of a matrix, (r, c); of experts (n, r, c), that of the portion. A rank of which nothing is
    written counts a version all the same: what is decided by versions is decided alike.
    """
    if local.dim() == 3:
        mine = portion.inside
        scatter(local, rows[mine], None if cols is None else cols[mine], values.to(local.dtype))
        return
    at, inside = own
    scatter(local, inside, cols, values[at].to(local.dtype))


def select_portion(score: Tensor, portion: Portion, size: tuple[int, int], whole_cols: bool) -> Selection:
    """``select_subnet`` of a matrix, or ``select_rows`` where every column learns, of which this rank has ``score``.

    Sends 2 * out + 2 * in + 3 sums a matrix.
    """

    def by_row(part: Tensor) -> Tensor:
        return joined([part.sum(1, dtype=torch.float64)], [portion])[0]

    def by_col(part: Tensor) -> Tensor:
        return summed([part.sum(0, dtype=torch.float64)], portion.group)[0]

    every_row = by_row(score)
    best_rows = top(every_row, size[0])
    if whole_cols:
        cols = torch.arange(score.shape[1], device=score.device)
        return Selection(best_rows, cols, every_row[best_rows].sum().float())
    best_cols = top(by_col(score), size[1])
    candidates = [
        (best_rows, best_cols),
        (best_rows, top(by_col(score.index_select(0, portion.own(best_rows)[1])), size[1])),
        (top(by_row(score.index_select(1, best_cols)), size[0]), best_cols),
    ]
    held = [gather(score, portion.own(rows)[1], cols).sum(dtype=torch.float64) for rows, cols in candidates]
    (sums,) = summed([torch.stack(held)], portion.group)
    winner = int(sums.argmax())
    return Selection(*candidates[winner], sums[winner].float())


def select_own_experts(score: Tensor, portion: Portion, old: tuple[Tensor, Tensor]) -> Selection:
    """``select_experts``, each expert by the rank that has it: ``score`` is of this one's. rows (E, r), cols (E, c)."""
    mine = portion.inside
    found = select_experts(score, (old[0][mine], old[1][mine]))
    rows, cols = joined([found.rows, found.cols], [portion, portion])
    (captured,) = summed([found.captured], portion.group)
    return Selection(rows, cols, captured)
