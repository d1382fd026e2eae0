"""What of a weight a node holds: views and casts, one after the other, from the weight's placeholder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .nodes import dims_of, use_of

Permutation = tuple[int, ...]

_CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"})
_REORDERS = frozenset(
    "t T mT H mH numpy_T matrix_H adjoint transpose permute movedim moveaxis swapaxes swapdims".split()
)
"""Views that put dimensions in another order. Since torch 2.14 T is written as aten.numpy_T (H is aten.matrix_H)."""


@dataclass(frozen=True)
class View:
    """What a node holds of a weight: all of it or, of an expert weight (E, ., .), one expert or a list of experts."""

    node: fx.Node
    dims: int
    transposed: bool = False
    """The last two dimensions are swapped against what the module stores."""
    expert: int | fx.Node | None = None
    gathered: bool = False
    """``expert`` is a list of them, int64 (n,), and the view (n, ., .)."""
    unbound: bool = False
    """A tuple of experts, as torch.unbind gives it."""
    path: tuple[fx.Node, ...] = ()
    """The nodes from the weight's placeholder (left out) to ``node``."""


def swapped(dims: int) -> Permutation:
    """The order of ``dims`` dimensions in which the last two have changed places."""
    return (*range(dims - 2), dims - 1, dims - 2)


def next_view(view: View, user: fx.Node) -> View | None:
    """What ``user`` holds of the weight, if it is a view or a cast of ``view``."""
    name = use_of(user)
    if name in _REORDERS:
        return _reordered(view, user)
    if not user.args or user.args[0] is not view.node or view.node in user.args[1:]:
        return None
    if view.unbound:
        index = user.args[1] if name == "getitem" else None
        return _step(view, user, dims=2, expert=index, unbound=False) if isinstance(index, int) else None
    if name in _CASTS:
        return _step(view, user)
    return _expert(view, name, user) if view.dims == 3 and view.expert is None else None


def _step(view: View, user: fx.Node, **changes: Any) -> View:
    return replace(view, node=user, path=(*view.path, user), **changes)


def _reordered(view: View, user: fx.Node) -> View | None:
    """The view in another order of its dimensions, if none but the last two have changed places.

    torch itself says what the order is, of a tensor in which each dimension is as long as its number.
    """
    if user.all_input_nodes != [view.node]:
        return None
    numbered = torch.empty(tuple(range(view.dims)), device="meta")
    args, kwargs = fx.node.map_arg((user.args, user.kwargs), lambda _: numbered)
    turn: Any = getattr(torch.Tensor, str(user.target)) if user.op == "call_method" else user.target
    order = tuple(turn(*args, **kwargs).shape)
    if order == tuple(range(view.dims)):
        return _step(view, user)
    return _step(view, user, transposed=not view.transposed) if order == swapped(view.dims) else None


def _expert(view: View, name: str, user: fx.Node) -> View | None:
    """One expert, or several, taken out of (E, ., .)."""
    given = user.args[1:]
    if name == "unbind" and given in ((), (0,)) and not user.kwargs:
        return _step(view, user, unbound=True)
    index = given[0] if name == "getitem" else given[1] if name == "select" and len(given) > 1 else None
    if name == "select" and given[0] != 0:
        return None
    if isinstance(index, int) and not isinstance(index, bool):
        return _step(view, user, dims=2, expert=index)
    if isinstance(index, fx.Node) and name == "getitem":
        value = index.meta.get("example_value")
        whole = isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)
        if whole and dims_of(index) == 0:
            return _step(view, user, dims=2, expert=index)
        if whole and dims_of(index) == 1:
            return _step(view, user, expert=index, gathered=True)
    return None
