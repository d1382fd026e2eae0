"""On a GPU: products of 8-bit numbers, and W's copy in 8 bits through steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import losia_fx
from losia_fx.method.packing import pack, quantise
from losia_fx.ops.packed import packed_linear, product, quantised
from tests.gpu.device import DEVICE, batch, build, learning, step
from tests.support.table import LLAMA

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:losia_fx.*frozen_products")]
KINDS = ["int8", "float8"]
TOKENS = [1, 16, 17, 200]
"""torch._int_mm takes none below 17 on CUDA."""


@pytest.mark.parametrize("tokens", TOKENS)
def test_int8_sums_are_exact(tokens: int) -> None:
    """Forward, and backward with W the other way round in memory."""
    x, weight = torch.randint(-127, 128, (tokens, 64)), torch.randint(-127, 128, (48, 64))
    ones = torch.ones(tokens, 1, device=DEVICE)
    mine, packed = x.to(DEVICE, torch.int8), weight.to(DEVICE, torch.int8)
    assert torch.equal(product(mine, packed.t(), ones, None, torch.float32).cpu().long(), x @ weight.t())
    grad = mine[:, :48].contiguous()
    turned = packed.t().contiguous().t()
    assert torch.equal(product(grad, turned, ones, None, torch.float32).cpu().long(), x[:, :48] @ weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_the_numbers(kind: str, tokens: int, dtype: torch.dtype) -> None:
    """Of what the numbers stand for, multiplied in float64 on the CPU: not every torch has float8 products there."""
    rows, cols = torch.tensor([0, 3, 40]), torch.tensor([1, 2, 63])
    x, weight, grad_y = torch.randn(tokens, 64, dtype=dtype), torch.randn(48, 64), torch.randn(tokens, 48, dtype=dtype)
    here = x.to(DEVICE, copy=True).requires_grad_()
    values = weight[rows][:, cols].to(DEVICE).requires_grad_()
    packed = pack(weight.to(DEVICE, dtype), kind)
    y = packed_linear(here, *quantised(here, kind), *packed, values, rows.to(DEVICE), cols.to(DEVICE))
    y.backward(grad_y.to(DEVICE))
    numbers, scales = (part.double() for part in pack(weight.to(dtype), kind))
    grad = grad_y.double()
    expected = (
        meant(x, kind) @ (numbers * scales).t(),
        meant(grad_y.float() * scales.t().float(), kind) @ numbers,
        grad[:, rows].t() @ x.double()[:, cols],
    )
    for found, right in zip((y, here.grad, values.grad), expected, strict=True):
        assert found is not None
        assert (found.detach().cpu().double() - right).abs().max() <= 0.02 * right.abs().max()


def meant(x: Tensor, kind: str) -> Tensor:
    numbers, scales = quantise(x, kind)
    return numbers.double() * scales.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_steps_learn_and_the_copies_follow(kind: str, compiler: str) -> None:
    options = {"rank_factor": 0.25, "period": 2, "compiler": compiler, "frozen_products": kind}
    model = losia_fx.transform(build(LLAMA, torch.bfloat16), **options)
    optimizer, inputs = torch.optim.AdamW(learning(model), lr=1e-2), batch(LLAMA)
    losses = [float(step(model, optimizer, inputs)) for _ in range(8)]
    assert losses[-1] < losses[0]
    packed = [state for state in losia_fx.controller(model).states if state.packed is not None]
    assert packed
    for state in packed:
        (numbers, scales), (now, now_scales) = state.packed_inputs(), pack(state.weight.detach(), kind)
        torch.testing.assert_close(scales, now_scales)  # a compiler's division may round otherwise
        off = (numbers.float() * scales - now.float() * now_scales).abs()
        assert (off <= 1.01 * now_scales * (1 if kind == "int8" else 32)).all()


def test_quantised_alike() -> None:
    x = torch.randn(5, 64)
    for kind in KINDS:
        (numbers, scales), (mine, mine_scales) = quantise(x, kind), quantise(x.to(DEVICE), kind)
        torch.testing.assert_close(mine_scales.cpu(), scales)
        assert (mine.cpu().float() - numbers.float()).abs().max() <= (1 if kind == "int8" else 32)
