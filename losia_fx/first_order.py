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

from .errors import GradientError

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
    nodes = {result.grad_fn for result in results if isinstance(result, Tensor)}
    for node in nodes:
        if node is not None:
            node.register_prehook(refuse_second)


def refuse_second(*grads: Any) -> None:
    """Raises GradientError in a backward that is to be differentiated: there alone gradients are on."""
    if torch.is_grad_enabled():
        raise GradientError(
            "create_graph=True (a gradient penalty, a Hessian) asks for second derivatives through weights that have a "
            "subnet, and losia_fx computes first ones alone. Use a loss that needs none, or losia_fx.restore(model) "
            "and train the plain model with it"
        )
