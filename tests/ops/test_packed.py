"""losia.packed_linear: exact in whole numbers, the backward its formula says, and as torch.library sees it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losia_fx import GradientError
from losia_fx.method.packing import pack, quantise
from losia_fx.ops.linear import subnet_linear
from losia_fx.ops.packed import packed_linear, quantised
from tests.support.eight_bits import KINDS

INTO, OUT = 32, 16
SHAPES = {"1d": (INTO,), "2d": (5, INTO), "3d": (2, 3, INTO), "empty": (0, INTO)}
TOLERANCE = {"int8": 3e-7, "float8": 1e-6}
"""Of sums in float32 against float64's."""


class Case:
    def __init__(
        self,
        kind: str = "int8",
        shape: tuple[int, ...] = (2, 3, INTO),
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.kind = kind
        self.x = torch.randn(shape, dtype=dtype).requires_grad_()
        self.weight = torch.randn(OUT, INTO, dtype=dtype)
        self.bias = torch.randn(OUT, dtype=dtype).requires_grad_() if bias else None
        self.rows, self.cols = torch.tensor([0, 3, 4, 9]), torch.tensor([1, 2, 31])
        self.values = self.weight[self.rows][:, self.cols].float().requires_grad_()
        self.grad_y = torch.randn(*shape[:-1], OUT).to(dtype)

    def run(self, x: Tensor | None = None, packed: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.x if x is None else x
        packed = packed or pack(self.weight, self.kind)
        y: Tensor = packed_linear(x, *quantised(x, self.kind), *packed, self.values, self.rows, self.cols, self.bias)
        return y

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """y and the gradients of x and S, as subnet_linear has them."""
        x, values = self.x.detach().clone().requires_grad_(), self.values.detach().clone().requires_grad_()
        y = subnet_linear(x, self.weight, values, self.rows, self.cols, self.bias)
        y.backward(self.grad_y)
        assert x.grad is not None
        assert values.grad is not None
        return y, x.grad, values.grad


def in_float64(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    numbers, scales = quantise(x.detach().reshape(-1, x.shape[-1]), kind)
    return numbers.double(), scales.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_it_is_the_quantised_product_in_float64(kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    """Forward: the sums of the 8-bit numbers, times both scales. dL/dx: those of grad_y times W's scales, quantised."""
    case = Case(kind, shape, bias)
    y = case.run()
    y.backward(case.grad_y)
    (x, sx), (w, sw) = in_float64(case.x, kind), in_float64(case.weight, kind)
    expected = (x @ w.t()) * sx * sw.t()
    if case.bias is not None:
        expected = expected + case.bias.detach()
        assert case.bias.grad is not None
        torch.testing.assert_close(case.bias.grad, case.grad_y.reshape(-1, OUT).sum(0))
    g, sg = in_float64(case.grad_y * sw.float().t(), kind)
    size = float(sum(t.abs().max() for t in (expected, case.grad_y) if t.numel()))
    close = {"rtol": TOLERANCE[kind], "atol": TOLERANCE[kind] * size}
    assert (y.dtype, y.shape) == (torch.float32, (*shape[:-1], OUT))
    torch.testing.assert_close(y.double().reshape(-1, OUT), expected, **close)
    assert case.x.grad is not None
    torch.testing.assert_close(case.x.grad.double().reshape(-1, INTO), (g @ w) * sg, **close)


def test_int8_sums_are_exact() -> None:
    """With scales of one the result is the whole number itself, up to 127 * 127 * in."""
    case = Case(shape=(9, INTO), bias=False)
    case.x = torch.randint(-127, 128, (9, INTO)).float()
    case.x[:, 0], case.weight = 127, torch.randint(-127, 128, (OUT, INTO)).float()
    case.weight[:, 0] = -127
    assert torch.equal(case.run().long(), case.x.long() @ case.weight.long().t())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_gradient_of_the_subnet_is_the_dense_one_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype=dtype)
    y = case.run()
    y.backward(case.grad_y)
    plain, grad_x, grad_values = case.dense()
    assert case.x.grad is not None
    assert case.values.grad is not None
    assert y.dtype == case.x.grad.dtype == dtype
    assert case.values.grad.dtype == torch.float32
    assert torch.equal(case.values.grad, grad_values)
    allowed = 0.03 if kind == "int8" else 0.08
    assert (y - plain).norm() <= allowed * plain.norm()
    assert (case.x.grad - grad_x).norm() <= allowed * grad_x.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    case = Case(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run()
        plain = F.linear(case.x, case.weight, case.bias)
    assert y.dtype == plain.dtype == torch.bfloat16
    y.backward(case.grad_y.bfloat16())
    assert case.x.grad is not None
    assert case.x.grad.dtype == torch.float32
    assert (y - plain).norm() <= 0.08 * plain.norm()


def test_the_numbers_take_no_gradient() -> None:
    numbers, scales = quantised(torch.randn(3, INTO).requires_grad_(), "float8")
    assert not numbers.requires_grad
    assert not scales.requires_grad


def test_a_token_that_is_not_finite_says_so_and_no_other() -> None:
    x = torch.randn(4, INTO)
    x[2, 5] = float("inf")
    y = Case(bias=False).run(x)
    assert y[[0, 1, 3]].isfinite().all()
    assert not y[2].isfinite().any()


def test_second_derivatives_are_refused() -> None:
    case = Case()
    with pytest.raises(GradientError, match="second derivatives"):
        torch.autograd.grad(case.run().sum(), case.x, create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    case = Case(kind)
    x = case.x.detach().requires_grad_()
    numbers, scales = quantised(x, kind)
    arguments = (x, numbers, scales, *pack(case.weight, kind), case.values, case.rows, case.cols, case.bias)
    tests = ("test_faketensor",) if kind == "float8" else ("test_schema", "test_faketensor")  # it has no float8 kernels
    torch.library.opcheck(packed_linear, arguments, test_utils=tests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_for_any_number_of_tokens(kind: str, compiler: str) -> None:
    case = Case(kind)
    packed = pack(case.weight, kind)
    compiled = torch.compile(case.run, backend=compiler, fullgraph=True, dynamic=True)
    for tokens in (3, 7, 20):
        x = torch.randn(2, tokens, INTO)
        torch.testing.assert_close(compiled(x, packed), case.run(x), rtol=1e-5, atol=1e-5)


def test_a_device_without_such_kernels_is_traced() -> None:
    """On the meta device all shapes and dtypes are those of the others."""
    case = Case()
    x, weight, values = (torch.empty(t.shape, device="meta") for t in (case.x, case.weight, case.values))
    rows, cols = (t.to("meta") for t in (case.rows, case.cols))
    y = packed_linear(x, *quantised(x, "int8"), *quantise(weight, "int8"), values, rows, cols)
    assert (y.shape, y.dtype) == ((2, 3, OUT), torch.float32)
