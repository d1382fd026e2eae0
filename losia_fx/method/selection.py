"""Which subnet scores most: the greedy selections, of a matrix, of a head and of experts. Tensors in, tensors out.

Source: LoSiA, arXiv 2507.04487, section 3.2; the exact form is that of losia.md, "Localization".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .subnet import among, gather


class Selection(NamedTuple):
    """Sorted int64 rows (r,) and cols (c,), and the sum of the score inside them, a 0-dim float32.

    Of experts, rows (E, r) and cols (E, c), and the sum of each (E,), or of all.
    """

    rows: Tensor
    cols: Tensor
    captured: Tensor


def top(sums: Tensor, count: int) -> Tensor:
    """The indices (..., count) of the largest sums (..., n), sorted, int64; among equals the lowest index wins.

    A stable sort, not topk, which promises nothing about equals.
    """
    order = torch.sort(sums, descending=True, stable=True).indices
    return order[..., :count].sort().values


def select_subnet(score: Tensor, rows: int, cols: int) -> Selection:
    """The best of three greedy candidates: pure, row-to-column, column-to-row; the first of equals.

    score: (out_features, in_features), or (E, out_features, in_features) of experts, each chosen for by itself.
    Finding the best subnet exactly is NP-hard (LoSiA section 3.2). The host does not wait for the device.
    """
    best_rows, best_cols = top(score.sum(-1), rows), top(score.sum(-2), cols)
    candidates = [
        (best_rows, best_cols),
        (best_rows, top(gather(score, best_rows, None).sum(-2), cols)),
        (top(gather(score, None, best_cols).sum(-1), rows), best_cols),
    ]
    sums = torch.stack([gather(score, *candidate).sum((-2, -1)) for candidate in candidates])
    winner = sums.argmax(0, keepdim=True)  # argmax takes the first of equals on every device that we know
    chosen_rows, chosen_cols = (_of_winner(torch.stack(each), winner) for each in zip(*candidates, strict=True))
    return Selection(chosen_rows, chosen_cols, sums.gather(0, winner).squeeze(0))


def _of_winner(candidates: Tensor, winner: Tensor) -> Tensor:
    """candidates (3, ..., n) and winner (1, ...), a number of one -> (..., n)."""
    picked = winner.unsqueeze(-1).expand(1, *candidates.shape[1:])
    return candidates.gather(0, picked).squeeze(0)


def select_rows(score: Tensor, rows: int) -> Selection:
    """The head's selection: rows by their sums, every column."""
    chosen = top(score.sum(1), rows)
    cols = torch.arange(score.shape[1], device=score.device)
    return Selection(chosen, cols, score.index_select(0, chosen).sum())


def select_experts(score: Tensor, old: tuple[Tensor, Tensor]) -> Selection:
    """``select_subnet`` for each expert by itself; one whose score is zero saw no token, and keeps its subnet.

    score (E, out_features, in_features); old and returned: rows (E, r) and cols (E, c).
    """
    rows, cols, captured = select_subnet(score, old[0].shape[1], old[1].shape[1])
    saw = score.flatten(1).any(1)
    rows, cols = (torch.where(saw.unsqueeze(-1), *pair) for pair in ((rows, old[0]), (cols, old[1])))
    return Selection(rows, cols, captured.where(saw, 0.0).sum())


def share_moved(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """The share, 0 to 1, of the elements of the subnet (rows, cols) ``new`` that were not in ``old``; 0-dim float32.

    Of experts, rows (E, r) and cols (E, c), the mean.
    """
    rows, cols = (among(*pair).float().mean(-1) for pair in zip(new, old, strict=True))
    return 1.0 - (rows * cols).mean()
