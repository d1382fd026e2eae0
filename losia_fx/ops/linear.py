"""``losia::subnet_linear``, the product of a rewritten graph, and ``losia::subnet_weight``, any other use of a weight.

Forward and dL/dx are the dense ones; the gradient of the weight is that of its subnet alone. The products of expert
weights are in experts.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losia_fx._compat import no_view
from losia_fx.method.subnet import gather

from .first_order import first_order
from .library import define

PROFILED = "Tensor? ticket=None, Tensor? handle=None, int call=0"
"""The last arguments of a product: tap's ticket, the handle that names the subnet, and a number that tells two uses of
one weight in a graph apart."""


def autocasted(x: Tensor) -> Tensor:
    """x as autocast hands it to a product: float64 it leaves as it is, and some devices have no autocast."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index], a copy. x (..., n), index (k,) int64.

    A gather along the last dimension, which on a CPU takes a third of what index_select takes there.
    """
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


class _SubnetLinear(torch.autograd.Function):
    """The dense forward, and the backward of LoSiA-Pro: dL/dS = g_y[..., rows]^T x[..., cols], nothing of W's size."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, values, rows, cols, bias, ticket, handle, call = inputs
        ctx.x_dtype = x.dtype
        x = autocasted(x)
        # The head needs every column (cols is None); everything else keeps its share of x and lets x go.
        kept = x if cols is None else pick(x, cols)
        ctx.save_for_backward(kept, weight, rows, ticket, handle)
        ctx.call, ctx.values_dtype = call, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return no_view(F.linear(x, weight, bias))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        kept, weight, rows, ticket, handle = ctx.saved_tensors
        grad_values = grad_bias = None
        # A tap has grad_y in memory: dS comes first, while it is in the cache. Without one dL/dx does, as its product
        # wants that too: Inductor would make what dS takes of grad_y a second time, from what grad_y is made of.
        grad_x = None if ticket is not None else _input_gradient(ctx, grad_y, weight)
        if ctx.needs_input_grad[2]:
            grad_values = subnet_gradient(ctx, grad_y, kept, rows, ticket, handle)
        if ticket is not None:
            grad_x = _input_gradient(ctx, grad_y, weight)
        if ctx.needs_input_grad[5]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_values, None, None, grad_bias, None, None, None


def _input_gradient(ctx: Any, grad_y: Tensor, weight: Tensor) -> Tensor | None:
    return (grad_y @ weight.to(grad_y.dtype)).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None


def subnet_gradient(
    ctx: Any, grad_y: Tensor, kept: Tensor, rows: Tensor, ticket: Tensor | None, handle: Tensor | None
) -> Tensor:
    """dL/dS = g_y[..., rows]^T x[..., cols] of the x[..., cols] that was kept."""
    picked = pick(grad_y, rows)
    grad_values = picked.reshape(-1, rows.numel()).t() @ kept.reshape(-1, kept.shape[-1])
    return as_gradient(grad_values, ctx, grad_y, ticket, handle)


def as_gradient(grad_values: Tensor, ctx: Any, grad_y: Tensor, ticket: Tensor | None, handle: Tensor | None) -> Tensor:
    """``grad_values`` in S's dtype, plus localize's zero, which is what keeps it and its tap in the graph.

    Added after the cast: next to the product the compilers would make an addmm of it, which costs more.
    """
    grad_values = grad_values.to(ctx.values_dtype)
    if ticket is None:
        return grad_values
    return grad_values.add_(torch.ops.losia.localize(grad_y, ticket, handle, ctx.call))


def _subnet_linear(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    rows: Tensor,
    cols: Tensor | None,
    bias: Tensor | None = None,
    ticket: Tensor | None = None,
    handle: Tensor | None = None,
    call: int = 0,
) -> Tensor:
    y: Tensor = _SubnetLinear.apply(x, weight, values, rows, cols, bias, ticket, handle, call)  # type: ignore[no-untyped-call]
    return y


subnet_linear = define(
    "subnet_linear",
    f"Tensor x, Tensor weight, Tensor values, Tensor rows, Tensor? cols, Tensor? bias=None, {PROFILED}",
    _subnet_linear,
)
"""F.linear(x, weight, bias) whose gradient goes to ``values`` instead of ``weight``.

x (..., in), weight (out, in), values (r, c), rows (r,) and cols (c,) sorted int64, or cols None for every column;
bias (out,) or None. ticket is tap's, handle names the subnet, call tells two uses of a weight in one graph apart.
Returns y (..., out). Gradients: x, values (in values' own dtype), bias. Under autocast as F.linear.
Source: LoSiA-Pro, arXiv 2507.04487, section 3.4.
"""


class _SubnetWeight(torch.autograd.Function):
    """W itself; of what comes back for all of it, the subnet's part goes on to S."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        weight, values, rows, cols, handle, call = inputs
        ctx.save_for_backward(rows, cols, handle)
        ctx.call, ctx.values_dtype = call, values.dtype
        return weight.view_as(weight)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, cols, handle = ctx.saved_tensors
        grad_values = gather(grad, rows, cols)
        if handle is not None:
            grad_values = grad_values + torch.ops.losia.localize_whole(grad.detach(), handle, ctx.call)
        return None, grad_values.to(ctx.values_dtype), None, None, None, None


def _subnet_weight(
    weight: Tensor,
    values: Tensor,
    rows: Tensor,
    cols: Tensor | None,
    handle: Tensor | None = None,
    call: int = 0,
) -> Tensor:
    whole: Tensor = _SubnetWeight.apply(weight, values, rows, cols, handle, call)  # type: ignore[no-untyped-call]
    return whole


subnet_weight = define(
    "subnet_weight",
    "Tensor weight, Tensor values, Tensor rows, Tensor? cols, Tensor? handle=None, int call=0",
    _subnet_weight,
)
"""The weight itself, for any use: its full gradient is made, and the block of the subnet goes to ``values``.

Exact whatever is done with the weight, second derivatives included; costs what a dense gradient costs, for the time of
its backward.
"""
