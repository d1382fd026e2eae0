"""What runs over whole weights around an optimizer step, in one pass over memory: plain, and compiled where it pays.

The plain forms are the definition; Inductor compiles the very same functions. Which form runs follows from the sizes
alone, so that a run and its resumption take the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from losia_fx._compat import of_any_length, own_code

from . import packing
from .importance import importance_of, smooth
from .subnet import scatter

log = logging.getLogger("losia_fx")

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
        updated = _compiled_form(_update, (kind, betas, w.dtype, g.dtype, w.device), dynamic=None)
        for tensor in (i, u, w, g):  # nothing else is to vary: betas are the graph's own
            of_any_length(tensor)
        if updated is not None and _runs(updated, (i, u, w, g, scale, bound, kind, *betas)):
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


def worth_compiling(weights: Sequence[Tensor]) -> bool:
    """Whether a block's weights are, for a pass over what is to be written to them."""
    return sum(weight.numel() for weight in weights) >= WORTH_COMPILING


def write_back(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    cols: Sequence[Tensor | None],
    values: Sequence[Tensor],
) -> None:
    """W[rows, cols] = S for a block's weights, each in W's dtype, compiled where it pays; shapes of subnet.scatter."""
    if worth_compiling(weights):
        block = tuple((weight.shape, weight.dtype, weight.device) for weight in weights)
        written = _compiled_form(_write_back, block, dynamic=False)
        arguments = ([w.detach() for w in weights], list(rows), list(cols), [v.detach() for v in values])
        if written is not None and _runs(written, arguments):
            return
    _write_back(weights, rows, cols, values)


def _write_back(
    weights: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor | None], values: Sequence[Tensor]
) -> None:
    with torch.no_grad():  # as a decorator it would be its code that own_code copies
        for weight, row, col, value in zip(weights, rows, cols, values, strict=True):
            scatter(weight, row, col, value.to(weight.dtype))


def pack_rows(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    numbers: Sequence[Tensor],
    scales: Sequence[Tensor],
    kind: str,
    compiled: bool,
) -> None:
    """Makes those rows of packed weights anew (packing.pack_rows), compiled where it pays."""
    if compiled and worth_compiling(weights):
        block = (kind, *((weight.shape, weight.dtype, weight.device) for weight in weights))
        packs = _compiled_form(_pack_rows, block, dynamic=False)
        arguments = ([w.detach() for w in weights], list(rows), list(numbers), list(scales), kind)
        if packs is not None and _runs(packs, arguments):
            return
    _pack_rows(weights, rows, numbers, scales, kind)


def _pack_rows(
    weights: Sequence[Tensor], rows: Sequence[Tensor], numbers: Sequence[Tensor], scales: Sequence[Tensor], kind: str
) -> None:
    with torch.no_grad():  # see _write_back
        for weight, row, number, scale in zip(weights, rows, numbers, scales, strict=True):
            packing.pack_rows(weight, row, kind, number, scale)


KINDS = 16
"""How many kinds of arguments each function here is compiled for: it takes some seconds each time."""

_forms: dict[Callable[..., None], dict[Any, Callable[..., Any]]] = {}
_broken: set[Callable[..., Any]] = set()


def _compiled_form(function: Callable[..., None], kind: Any, dynamic: bool | None) -> Callable[..., Any] | None:
    """``function``, compiled for arguments of one kind; None where the process has met too many kinds already.

    A code object of its own for each: Dynamo counts graphs by it, and gives up at the ninth.
    dynamic: as torch.compile's. Not True for what takes floats: two that are equal when a graph is made are one in
    Inductor's cache, and another graph, of two that differ, is served with it (torch 2.13).
    """
    forms = _forms.setdefault(function, {})
    if kind not in forms and len(forms) < KINDS:
        forms[kind] = torch.compile(own_code(function), dynamic=dynamic, fullgraph=True)
    found = forms.get(kind)
    return None if found in _broken else found


def _runs(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    """Whether the compiled form has run. S has moved already, so W must follow whatever becomes of the compiler."""
    try:
        compiled(*arguments)
    except Exception as error:  # the compilers raise all kinds; the plain form does the same work
        _broken.add(compiled)
        log.warning("losia_fx: a part of the step runs uncompiled: %s", str(error).partition("\n")[0])
        return False
    return True
