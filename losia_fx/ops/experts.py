"""The products of expert weights: ``losia::subnet_grouped`` and ``losia::subnet_batched``.

As in ops.py: forward and dL/dx are the dense ones, the gradient of the weight is that of its subnet alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .first_order import first_order
from .grouped import ends_for, grouped_outer, grouped_product
from .library import define
from .linear import PROFILED, as_gradient, autocasted


class _SubnetGrouped(torch.autograd.Function):
    """y_e = x_e w_e for rows of x sorted by expert; dL/dS_e = x_e[:, rows_e]^T g_e[:, cols_e]."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, values, rows, cols, offsets, ticket, handle, call = inputs
        # The expert of each token; rows past the last expert's end belong to none, and come out of no sum.
        tokens = torch.arange(x.shape[0], device=x.device)
        experts = torch.bucketize(tokens, offsets.long(), right=True).clamp_max(offsets.shape[0] - 1)
        ends = ends_for(offsets, x.dtype, *weight.shape[1:])
        ctx.save_for_backward(x.gather(1, rows[experts]), weight, cols, experts, ends, ticket, handle)
        ctx.call, ctx.values_dtype = call, values.dtype
        return grouped_product(x, weight, ends)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        kept, weight, cols, experts, ends, ticket, handle = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_product(grad_y, weight.mT, ends)
        if ctx.needs_input_grad[2]:
            grad_values = grouped_outer(kept, grad_y.gather(1, cols[experts]), ends)
            grad_values = as_gradient(grad_values, ctx, grad_y, ticket, handle)
        return grad_x, None, grad_values, None, None, None, None, None, None


def _subnet_grouped(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    rows: Tensor,
    cols: Tensor,
    offsets: Tensor,
    ticket: Tensor | None = None,
    handle: Tensor | None = None,
    call: int = 0,
) -> Tensor:
    y: Tensor = _SubnetGrouped.apply(x, weight, values, rows, cols, offsets, ticket, handle, call)  # type: ignore[no-untyped-call]
    return y


subnet_grouped = define(
    "subnet_grouped",
    f"Tensor x, Tensor weight, Tensor values, Tensor rows, Tensor cols, Tensor offsets, {PROFILED}",
    _subnet_grouped,
)
"""F.grouped_mm(x, weight, offs=offsets) whose gradient goes to ``values``.

x (tokens, in) with its rows sorted by expert, weight (E, in, out), values (E, r, c), rows (E, r) of in and cols (E, c)
of out, offsets (E,) where each expert's rows of x end. Returns y (tokens, out).
"""


class _SubnetBatched(torch.autograd.Function):
    """y_i = x_i w_i; dL/dS_i = x_i[:, rows_i]^T g_i[:, cols_i]."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, values, rows, cols, ticket, handle, call = inputs
        ctx.x_dtype = x.dtype
        x = autocasted(x)
        kept = x.gather(2, rows.unsqueeze(1).expand(-1, x.shape[1], -1))
        ctx.save_for_backward(kept, weight, cols, ticket, handle)
        ctx.call, ctx.values_dtype = call, values.dtype
        return torch.bmm(x, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        kept, weight, cols, ticket, handle = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(grad_y, weight.mT.to(grad_y.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            picked = grad_y.gather(2, cols.unsqueeze(1).expand(-1, grad_y.shape[1], -1))
            grad_values = torch.bmm(kept.mT, picked)
            grad_values = as_gradient(grad_values, ctx, grad_y, ticket, handle)
        return grad_x, None, grad_values, None, None, None, None, None


def _subnet_batched(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    rows: Tensor,
    cols: Tensor,
    ticket: Tensor | None = None,
    handle: Tensor | None = None,
    call: int = 0,
) -> Tensor:
    y: Tensor = _SubnetBatched.apply(x, weight, values, rows, cols, ticket, handle, call)  # type: ignore[no-untyped-call]
    return y


subnet_batched = define(
    "subnet_batched",
    f"Tensor x, Tensor weight, Tensor values, Tensor rows, Tensor cols, {PROFILED}",
    _subnet_batched,
)
"""torch.bmm(x, weight) whose gradient goes to ``values``.

x (n, tokens, in), weight (n, in, out), values (n, r, c), rows (n, r) of in and cols (n, c) of out. Returns y (n,
tokens, out).
"""
