"""What runs over whole weights around an optimizer step, in one pass over memory: plain, and compiled where it pays.

The plain forms are the definition; Inductor compiles the very same functions. Which form runs follows from the sizes
alone, so that a run and its resumption take the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .localize import importance_of, smooth
from .subnet import scatter

WORTH_COMPILING = 2**20
"""Elements of W from which a pass is compiled: below, that takes longer than it saves in hundreds of steps."""

CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Elements that the plain form takes at a time, by device: on a CPU what fits a cache, elsewhere what memory allows."""


def update_importance(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    factor: float,
    limit: float | None,
    kind: str,
    betas: tuple[float, float],
    compiled: bool,
) -> None:
    """One step's part in I and U, in place, of the gradient clamp(factor * G, -limit, limit).

    importance and uncertainty (float32, contiguous), weight and grad: all of W's shape. kind, betas: of LosiaConfig.
    Source: LoSiA section 3.1; losia.md, "Localization".
    """
    i, u, w, g = importance.view(-1), uncertainty.view(-1), weight.detach().reshape(-1), grad.reshape(-1)
    # As tensors: the compilers would make a new graph for every number. On the CPU: they go along with the launch.
    numbers = (factor, torch.inf if limit is None else limit)
    scale, bound = (torch.tensor(number, dtype=torch.float32, device="cpu") for number in numbers)
    if compiled and weight.numel() >= WORTH_COMPILING:
        _compiled(_update, True)(i, u, w, g, scale, bound, kind, *betas)
        return
    chunk = CHUNK.get(weight.device.type, CHUNK["cuda"])
    for first in range(0, weight.numel(), chunk):
        part = slice(first, first + chunk)
        _update(i[part], u[part], w[part], g[part], scale, bound, kind, *betas)


def _update(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    grad: Tensor,
    factor: Tensor,
    limit: Tensor,
    kind: str,
    beta1: float,
    beta2: float,
) -> None:
    seen = torch.minimum(torch.maximum(grad.float() * factor, -limit), limit)
    new = importance_of(kind, weight, seen)
    smooth(importance, new, beta1)
    smooth(uncertainty, (new - importance).abs(), beta2)


def write_back(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    values: Sequence[Tensor],
    compiled: bool,
) -> None:
    """W[rows, cols] = S for a block's weights, each in W's dtype; shapes as in subnet.scatter."""
    worth = sum(weight.numel() for weight in weights) >= WORTH_COMPILING
    write = _compiled(_write_back, False) if compiled and worth else _write_back
    write([weight.detach() for weight in weights], list(rows), list(cols), [value.detach() for value in values])


def _write_back(weights: list[Tensor], rows: list[Tensor], cols: list[Tensor | None], values: list[Tensor]) -> None:
    for weight, row, col, value in zip(weights, rows, cols, values, strict=True):
        scatter(weight, row, col, value.to(weight.dtype))


@functools.cache
def _compiled(function: Callable[..., None], dynamic: bool) -> Callable[..., Any]:
    """dynamic: one graph for all sizes; else one for each set of them (a block's weights)."""
    return torch.compile(function, dynamic=dynamic, fullgraph=True)
