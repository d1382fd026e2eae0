"""What refuses second derivatives: a product keeps x[..., cols] and no way back to x, so they would lack a part unsaid.

Refused is the first backward already, where it is to be differentiated (create_graph=True). Raising only in the second
would not do: torch.autograd.grad leaves out what no path leads to its inputs from, and calls it zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from losia_fx import registry
from losia_fx._compat import current_node
from losia_fx.errors import GradientError

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """``backward`` of an autograd.Function, which raises GradientError where a second derivative is to follow."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second()
        return backward(ctx, *grads)

    return once


def only_once(results: Iterable[Any]) -> None:
    """The same for all that a graph of the compilers' has computed: what is in there torch sees as one backward.

    torch's own error comes in the second backward, and not always.
    """
    for node in _nodes(results):
        node.register_prehook(refuse_second)


def _nodes(values: Iterable[Any]) -> set[Node]:
    return {value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn is not None}


def watch_functions(results: Iterable[Any], given: Iterable[Any]) -> None:
    """The same for all that a model has computed, where something that no graph of ours covers has saved a weight.

    That weight no longer asks for a gradient when a first backward takes it out again, so that the second would lack a
    part unsaid. A torch.autograd.Function is what may do so.
    given: what has gone in; an output that is one of these is somebody else's.
    """
    for node in _nodes(results) - _nodes(given):
        node.register_prehook(_refuse_functions)


def _refuse_functions(*grads: Any) -> None:
    if not torch.is_grad_enabled():
        return
    front = [current_node()]
    seen = set(front)
    while front:
        node = front.pop()
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                front.append(child)
            weight = getattr(child, "variable", None)
            if weight is not None and registry.find(weight) is not None and not _sees_to_itself(node):
                _refuse_saved(node, weight)


def _refuse_saved(node: Any, weight: Tensor) -> None:
    kept = [*getattr(node, "saved_tensors", ())]
    kept += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    if any(value is weight for value in kept):
        refuse_second()


def _sees_to_itself(node: Node) -> bool:
    """Whether the backward of ``node`` is one of ours, or of a compiled graph, which is refused where it runs."""
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] in ("losia_fx", "torch")


def refuse_second(*grads: Any) -> None:
    """Raises GradientError in a backward that is to be differentiated: there alone gradients are on."""
    if torch.is_grad_enabled():
        raise GradientError(
            "create_graph=True (a gradient penalty, a Hessian) asks for second derivatives through weights that have a "
            "subnet, and losia_fx computes first ones alone. Use a loss that needs none, or losia_fx.restore(model) "
            "and train the plain model with it"
        )
