"""The product of 8-bit whole numbers, and what has Inductor write its result: torch has both under private names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_TOKENS = 17
"""torch._int_mm takes no fewer rows on a CUDA device."""


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, exact. x (tokens, n) and weight (n, m) int8; (tokens, m) int32.

    torch.mm gives int8 back for int8 (2.11 to 2.15), and so wraps around; torch._int_mm sums in int32.
    """
    missing = LEAST_TOKENS - x.shape[0] if x.is_cuda else 0
    if missing > 0:
        return torch._int_mm(F.pad(x, (0, 0, 0, missing)), weight)[: x.shape[0]]
    return torch._int_mm(x, weight)


settle = torch.ops.prims.inductor_force_stride_order.default
"""settle(x, strides of x) is x; Inductor, which takes it from any graph (2.11 and 2.13), makes a buffer of x there.

Whether it does, or has each reader compute x anew, nothing public decides; a copy or an op of our own would cost a pass
over memory more.
"""
