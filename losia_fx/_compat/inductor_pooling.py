"""Inductor divides by too much in the backward of an average pooling whose last windows stick out of the image.

With ceil_mode=True a mean is of what a window has of the image and its padding, in the forward and in eager mode's
backward. Inductor's lowerings of avg_pool2d_backward (avg_pool1d's and lp_pool's too) and avg_pool3d_backward divide by
the whole kernel, where count_include_pad is True, as it is by default: gradients that are too small in silence, of a
border of what is pooled (RT-DETR's shortcuts) or of all of it (ALIGN's vision tower, whose kernel is wider than its
image by far).

Seen in torch 2.11.0, 2.13.0 and 2.14.1 (tests/test_compat.py); ends with the torch that divides by the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch._inductor.lowering import fallback_handler, lowerings


@cache
def divide_by_what_is_pooled() -> None:
    """From now on, in this process: such a backward is eager mode's kernel."""
    for op in (torch.ops.aten.avg_pool2d_backward.default, torch.ops.aten.avg_pool3d_backward.default):
        lowerings[op] = _mended(lowerings[op], fallback_handler(op, add_to_fallback_set=False))


def _mended(lowering: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(lowering)
    def mended(
        grad: Any,
        x: Any,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None = None,
    ) -> Any:
        sticks_out = ceil_mode and count_include_pad and divisor_override is None
        chosen = kernel if sticks_out else lowering
        return chosen(grad, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    return mended
