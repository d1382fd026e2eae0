"""The kinds of 8-bit numbers that this torch multiplies on a CPU: with 2.11 none in float8."""

from __future__ import annotations

import functools

import pytest
import torch

from losia_fx.method.packing import DTYPES, quantise
from losia_fx.ops.packed import product


@functools.cache
def is_multiplied(kind: str) -> bool:
    (x, token_scales), (weight, scales) = quantise(torch.ones(16, 16), kind), quantise(torch.ones(16, 16), kind)
    try:
        product(x, weight.t(), token_scales, scales.t(), torch.float32)
    except NotImplementedError:
        return False
    return True


needs_float8 = pytest.mark.skipif(not is_multiplied("float8"), reason="this torch has no product of float8 on a CPU")
KINDS = [pytest.param(kind, marks=needs_float8) if kind == "float8" else kind for kind in DTYPES]
