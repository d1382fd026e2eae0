"""How much two selections of one weight have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from losia_fx.finetune.record import SelectionRecord


def jaccard(first: SelectionRecord, second: SelectionRecord) -> float:
    """Elements in both subnets over elements in either, 0 to 1; of an expert weight over all experts together."""
    shared = _common(first.rows, second.rows) * _common(first.cols, second.cols)
    sizes = [_experts(s.rows).shape[0] * s.rows.shape[-1] * s.cols.shape[-1] for s in (first, second)]
    both = int(shared.sum())
    return both / max(1, sum(sizes) - both)


def _common(first: Tensor, second: Tensor) -> Tensor:
    """(E,), or (1,): how many indices are in both."""
    pairs = zip(_experts(first), _experts(second), strict=True)
    return torch.stack([torch.isin(a, b).sum() for a, b in pairs])


def _experts(indices: Tensor) -> Tensor:
    return indices.reshape(-1, indices.shape[-1])
