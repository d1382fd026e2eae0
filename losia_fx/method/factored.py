"""A second moment of the gradient that outlives a re-selection: by rows and by columns of W, not by elements of S.

Of every row and column of W it keeps the running mean of S.grad^2 over the visits that training has paid it, so what is
known of a row serves wherever the subnet goes next. Factored as in Adafactor (Shazeer and Stern, 2018, arXiv
1804.04235); differs in that an index decays and is corrected by its own visits, as subnets see only some of them.
Tensors in, tensors out; the host never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losia_fx._compat import foreach


class Means(NamedTuple):
    """What is kept of one weight: of (out, in) vectors (out,) and (in,), of E experts (E, out) and (E, in).

    All of one floating dtype. The means are corrected for their start at zero; an index without a visit has mean 0.
    """

    rows: Tensor
    cols: Tensor
    row_visits: Tensor
    col_visits: Tensor
    """How often an index was in the subnet when a gradient came."""

    @staticmethod
    def of(shape: Sequence[int], like: Tensor) -> Means:
        """For a weight of ``shape`` that nobody has visited; dtype and device of ``like``."""
        *experts, out_features, in_features = shape
        sizes = ((*experts, out_features), (*experts, in_features))
        return Means(*(torch.zeros(size, dtype=like.dtype, device=like.device) for size in (*sizes, *sizes)))


class Place(NamedTuple):
    """Of a subnet: rows (r,) and cols (c,), or (E, r) and (E, c); int64."""

    rows: Tensor
    cols: Tensor


class Seen(NamedTuple):
    """The mean of S.grad^2 over the subnet's columns, (r,) or (E, r), and over its rows, (c,) or (E, c)."""

    rows: Tensor
    cols: Tensor


def seen_in(grads: Sequence[Tensor]) -> list[Seen]:
    """Of each S.grad, (r, c) or (E, r, c)."""
    return [Seen(square.mean(-1), square.mean(-2)) for square in foreach.foreach_mul(list(grads), list(grads))]


def take_in(kept: Sequence[Means], places: Sequence[Place], found: Sequence[Seen], beta2: float) -> None:
    """Takes what a visit has seen of each subnet into its means, in place; beta2 in [0, 1).

    After n visits a mean is the sum of (1 - beta2) beta2^(n - k) g_k over 1 - beta2^n, where g_k is what the k-th visit
    saw.
    """
    seen = [each.rows for each in found] + [each.cols for each in found]
    means = [each.rows for each in kept] + [each.cols for each in kept]
    visits = [each.row_visits for each in kept] + [each.col_visits for each in kept]
    indices = [place.rows for place in places] + [place.cols for place in places]
    counts = [count.gather(-1, index) for count, index in zip(visits, indices, strict=True)]
    foreach.foreach_add_(counts, 1)
    present = [mean.gather(-1, index) for mean, index in zip(means, indices, strict=True)]
    # The corrected mean itself, from one visit to the next: (1 - beta2) / (1 - beta2^n) of it is the newest.
    weights = foreach.foreach_mul(counts, math.log(beta2) if beta2 else -math.inf)
    foreach.foreach_expm1_(weights)
    foreach.foreach_reciprocal_(weights)
    foreach.foreach_mul_(weights, beta2 - 1)
    foreach.foreach_lerp_(present, seen, weights)
    for full, index, values in zip((*means, *visits), (*indices, *indices), (*present, *counts), strict=True):
        full.scatter_(-1, index, values)


def filled(kept: Means) -> Means:
    """The same with an index that has no visit as the mean of those that have one (of each expert by itself)."""
    rows, cols = _filled(kept.rows, kept.row_visits), _filled(kept.cols, kept.col_visits)
    return Means(rows, cols, kept.row_visits, kept.col_visits)


def _filled(means: Tensor, visits: Tensor) -> Tensor:
    seen = visits > 0
    mean = means.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)  # of one without a visit it is 0
    return torch.where(seen, means, mean)


ALL = slice(None)


def factors(kept: Means, place: Place, part: slice = ALL) -> tuple[Tensor, Tensor]:
    """a (r,) and b (c,), or (E, r) and (E, c), with v_ij = a_i b_j = r_i c_j / sqrt(mean r mean c).

    The means are those over the subnet's present rows and columns (of each expert by itself). part: what S[part] needs
    of them.
    """
    rows, cols = _share(kept.rows.gather(-1, place.rows)), _share(kept.cols.gather(-1, place.cols))
    return rows[part], cols if cols.dim() == 1 else cols[part]


def _share(means: Tensor) -> Tensor:
    """Means over the root of their own mean, which the tiniest number stands for where all of them are zero."""
    return means / means.mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(means.dtype).tiny)


def second_moment(kept: Means, place: Place, part: slice = ALL) -> Tensor:
    """v of every element of S, (r, c) or (E, r, c): what an Adam-like optimizer calls exp_avg_sq, bias-corrected.

    part: of S[part] alone, along its first dimension.
    """
    rows, cols = factors(kept, place, part)
    return rows.unsqueeze(-1) * cols.unsqueeze(-2)


def root(kept: Means, place: Place, part: slice = ALL) -> Tensor:
    """The root of ``second_moment``, made without rooting as many elements as S has; a tensor of its own."""
    rows, cols = factors(kept, place, part)
    return rows.sqrt().unsqueeze(-1) * cols.sqrt().unsqueeze(-2)
