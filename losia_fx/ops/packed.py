"""``losia::packed_linear``, the product of a frozen weight in 8 bits, and ``losia::quantised``, which makes its input.

Forward and dL/dx are products of 8-bit numbers, of one packed copy of W (losia_fx.method.packing): a scale of a row of
W is in the forward's result a factor of a column, and goes into grad_y before that is quantised. The gradient of the
subnet is that of ``losia::subnet_linear``, of x and grad_y as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losia_fx._compat import int8_product, no_view
from losia_fx.method.packing import quantise

from .first_order import first_order
from .library import define
from .linear import PROFILED, autocasted, pick, subnet_gradient


def _quantised(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return quantise(x.detach(), kind)


quantised = define("quantised", "Tensor x, str kind", _quantised, returns="(Tensor, Tensor)")
"""x (..., in) in 8 bits and the scale of each token, (..., 1) float32; no gradient goes through it."""


def product(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x * x_scales) @ (weight * weight_scales) of 8-bit numbers, in ``dtype`` or a wider one.

    x (tokens, n), weight (n, m), x_scales (tokens, 1), weight_scales (1, m), or None for ones.
    """
    if x.dtype == torch.int8:
        y = int8_product(x, weight).float() * x_scales
        return y if weight_scales is None else y * weight_scales
    ones = x_scales.new_ones(1, weight.shape[1]) if weight_scales is None else weight_scales
    # A GPU's product with a scale a row gives bfloat16 and nothing else.
    summed, by_row = torch.bfloat16 if x.is_cuda else dtype, F.ScalingType.RowWise
    return F.scaled_mm(x, weight, x_scales, by_row, ones, by_row, output_dtype=summed)


class _PackedLinear(torch.autograd.Function):
    """y = (q s) (Q t)^T of x ~ q s and W ~ Q t; dL/dx = (g t quantised) Q."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, numbers, token_scales, packed, scales, values, rows, cols, bias, ticket, handle, call = inputs
        ctx.x_dtype = x.dtype
        x = autocasted(x)
        ctx.save_for_backward(pick(x, cols), packed, scales, rows, ticket, handle)
        ctx.call, ctx.values_dtype = call, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        tokens, token_scales = numbers.reshape(-1, numbers.shape[-1]), token_scales.reshape(-1, 1)
        y = product(tokens, packed.t(), token_scales, scales.t(), x.dtype)
        y = y if bias is None else y + bias
        return no_view(y.to(x.dtype).view(*x.shape[:-1], packed.shape[0]))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        kept, packed, scales, rows, ticket, handle = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[5]:  # before dL/dx, while grad_y is still in the cache
            grad_values = subnet_gradient(ctx, grad_y, kept, rows, ticket, handle)
        if ctx.needs_input_grad[0]:
            numbers, token_scales = quantise(grad_y.float() * scales.t(), _kind_of(packed))
            tokens, token_scales = numbers.reshape(-1, numbers.shape[-1]), token_scales.reshape(-1, 1)
            # The products of a GPU want the dimension that is summed over side by side in memory, in both factors.
            weight = packed.t().contiguous().t() if packed.is_cuda else packed
            grad_x = product(tokens, weight, token_scales, None, ctx.x_dtype).to(ctx.x_dtype)
            grad_x = grad_x.view(*grad_y.shape[:-1], packed.shape[1])
        if ctx.needs_input_grad[8]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, None, None, grad_values, None, None, grad_bias, None, None, None


def _kind_of(packed: Tensor) -> str:
    return "int8" if packed.dtype == torch.int8 else "float8"


def _packed_linear(
    x: Tensor,
    numbers: Tensor,
    token_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    values: Tensor,
    rows: Tensor,
    cols: Tensor,
    bias: Tensor | None = None,
    ticket: Tensor | None = None,
    handle: Tensor | None = None,
    call: int = 0,
) -> Tensor:
    arguments = (x, numbers, token_scales, packed, scales, values, rows, cols, bias, ticket, handle, call)
    y: Tensor = _PackedLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


packed_linear = define(
    "packed_linear",
    "Tensor x, Tensor numbers, Tensor token_scales, Tensor packed, Tensor scales, "
    f"Tensor values, Tensor rows, Tensor cols, Tensor? bias=None, {PROFILED}",
    _packed_linear,
)
"""F.linear(x, W, bias) of W and x in 8 bits, whose gradient goes to ``values``.

x (..., in), and numbers (..., in) and token_scales (..., 1) as ``quantised`` makes them of it; packed (out, in) and
scales (out, 1) as losia_fx.method.packing.pack makes them of W; values (r, c), rows (r,) and cols (c,) sorted int64;
bias (out,) or None; ticket, handle, call as in subnet_linear. Returns y (..., out) in x's dtype, or autocast's.
Gradients: x, of W and grad_y in 8 bits; values (in values' own dtype) and bias, as subnet_linear's.
"""
