"""On a GPU: products of 8-bit numbers against the CPU's, W's copy in 8 bits through steps, and what they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import losia_fx
from losia_fx.method.packing import pack, quantise
from losia_fx.ops.packed import packed_linear, product, quantised
from losia_fx.runtime.expected import share_of_dense
from tests.gpu.device import DEVICE, batch, build, learning, on_cuda, step
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
def test_value_and_gradients_are_the_cpus(kind: str, tokens: int, dtype: torch.dtype) -> None:
    rows, cols = torch.tensor([0, 3, 40]), torch.tensor([1, 2, 63])
    x, weight, grad_y = torch.randn(tokens, 64, dtype=dtype), torch.randn(48, 64), torch.randn(tokens, 48, dtype=dtype)
    found: list[list[Tensor]] = []
    for device in (torch.device("cpu"), DEVICE):
        here = x.to(device, copy=True).requires_grad_()
        values = weight[rows][:, cols].to(device).requires_grad_()
        packed = pack(weight.to(device, dtype), kind)
        y = packed_linear(here, *quantised(here, kind), *packed, values, rows.to(device), cols.to(device))
        y.backward(grad_y.to(device))
        assert here.grad is not None
        assert values.grad is not None
        found.append([each.detach().cpu().double() for each in (y, here.grad, values.grad)])
    for cpu, gpu in zip(*found, strict=True):
        assert (gpu - cpu).abs().max() <= 0.02 * cpu.abs().max()


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


@on_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_product_is_faster(kind: str) -> None:
    """On cards with tensor cores for these numbers: what transform() says of them."""
    needed = (8, 0) if kind == "int8" else (8, 9)
    if torch.cuda.get_device_capability(DEVICE) < needed:
        pytest.skip("a card without such tensor cores")
    assert share_of_dense(kind, torch.bfloat16, DEVICE) < 1


def test_quantised_alike() -> None:
    x = torch.randn(5, 64)
    for kind in KINDS:
        (numbers, scales), (mine, mine_scales) = quantise(x, kind), quantise(x.to(DEVICE), kind)
        torch.testing.assert_close(mine_scales.cpu(), scales)
        assert (mine.cpu().float() - numbers.float()).abs().max() <= (1 if kind == "int8" else 32)
