"""losia.subnet_linear against its plain reference, against dense autograd, and as torch.library sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losia_fx.ops.linear import subnet_linear

INTO, OUT = 12, 10
SHAPES = {"1d": (INTO,), "2d": (5, INTO), "3d": (2, 3, INTO), "4d": (2, 1, 3, INTO), "empty": (0, INTO)}


def reference(x: Tensor, weight: Tensor, values: Tensor, rows: Tensor, cols: Tensor | None) -> Tensor:
    """The same value and the same gradient of ``values`` in plain autograd, at full cost.

    W enters as a constant in which the subnet's elements depend on ``values``.
    """
    cols = torch.arange(weight.shape[1], device=weight.device) if cols is None else cols
    subnet = weight.detach()[rows][:, cols]
    through = torch.zeros_like(weight).index_put((rows[:, None], cols), (values - values.detach()).to(weight.dtype))
    assert subnet.shape == values.shape
    return F.linear(x, weight.detach() + through)


class Case:
    """One weight with a subnet, and leaves for everything that can learn."""

    def __init__(
        self,
        shape: tuple[int, ...] = (2, 3, INTO),
        bias: bool = True,
        head: bool = False,
        dtype: torch.dtype = torch.float64,
        values_dtype: torch.dtype | None = None,
    ) -> None:
        self.x = torch.randn(shape, dtype=dtype).requires_grad_()
        self.weight = torch.randn(OUT, INTO, dtype=dtype)
        self.bias = torch.randn(OUT, dtype=dtype).requires_grad_() if bias else None
        self.rows = torch.tensor([0, 3, 4, 9])
        self.cols = None if head else torch.tensor([1, 2, 11])
        self.values = self.block(self.weight).to(values_dtype or dtype).requires_grad_()
        self.grad_y = torch.randn(*shape[:-1], OUT, dtype=dtype)

    def block(self, full: Tensor) -> Tensor:
        picked = full[self.rows]
        return (picked if self.cols is None else picked[:, self.cols]).detach().clone()

    def run(self, function: Callable[..., Tensor] = subnet_linear) -> Tensor:
        return function(self.x, self.weight, self.values, self.rows, self.cols, self.bias)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """y, and the gradients of x, W and b by plain autograd in ``dtype``."""
        x, w = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.weight))
        b = None if self.bias is None else self.bias.detach().to(dtype).requires_grad_()
        y = F.linear(x, w, b)
        y.backward(self.grad_y.to(dtype))
        assert x.grad is not None
        assert w.grad is not None
        return y, x.grad, w.grad, None if b is None else b.grad


def test_a_device_without_autocast() -> None:
    """torch raises where one asks for the autocast of such a device."""
    assert not torch.amp.is_autocast_available("meta")
    x, weight, values = (torch.empty(size, device="meta") for size in ((3, INTO), (OUT, INTO), (2, 1)))
    rows, cols = (torch.empty(count, dtype=torch.int64, device="meta") for count in (2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = subnet_linear(x, weight, values, rows, cols)
    assert (y.shape, y.dtype, y.device.type) == ((3, OUT), torch.float32, "meta")


@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_float64_is_exact(shape: tuple[int, ...], bias: bool, head: bool) -> None:
    case = Case(shape, bias, head)
    y, grad_x, grad_w, grad_b = case.dense(torch.float64)
    mine = case.run()
    mine.backward(case.grad_y)
    torch.testing.assert_close(mine, y)
    torch.testing.assert_close(case.x.grad, grad_x)
    torch.testing.assert_close(case.values.grad, case.block(grad_w))
    if bias:
        assert case.bias is not None
        torch.testing.assert_close(case.bias.grad, grad_b)
    assert case.weight.grad is None


@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
def test_the_reference_agrees(head: bool) -> None:
    case, twin = Case(bias=False, head=head), Case(bias=False, head=head)
    for name in ("x", "weight", "values"):
        getattr(twin, name).data = getattr(case, name).detach().clone()
    expected = reference(twin.x, twin.weight, twin.values, twin.rows, twin.cols)
    expected.backward(case.grad_y)
    mine = case.run()
    mine.backward(case.grad_y)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(case.x.grad, twin.x.grad)
    torch.testing.assert_close(case.values.grad, twin.values.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
def test_low_precision_is_as_close_as_dense(dtype: torch.dtype, head: bool) -> None:
    case = Case((4, 8, INTO), True, head, dtype, values_dtype=torch.float32)
    truth = case.dense(torch.float64)
    plain = case.dense(dtype)
    y = case.run()
    y.backward(case.grad_y)
    assert case.values.grad is not None
    assert case.x.grad is not None
    assert case.bias is not None
    assert case.bias.grad is not None
    assert y.dtype == case.x.grad.dtype == case.bias.grad.dtype == dtype
    assert case.values.grad.dtype == torch.float32
    mine = (y, case.x.grad, case.values.grad, case.bias.grad)
    for index, got in enumerate(mine):
        exact, theirs = truth[index], plain[index]
        assert exact is not None
        assert theirs is not None
        if index == 2:
            exact, theirs = case.block(exact), case.block(theirs)
        error, allowed = (got.double() - exact).norm(), (theirs.double() - exact).norm()
        assert error <= 2 * allowed + 1e-6, f"output {index}: {error} against {allowed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
def test_autocast_is_as_close_as_dense_autocast(dtype: torch.dtype, head: bool) -> None:
    case = Case((4, 8, INTO), True, head, torch.float32)
    truth = case.dense(torch.float64)
    with torch.autocast("cpu", dtype):
        y = case.run()
        x, w = (t.detach().clone().requires_grad_() for t in (case.x, case.weight))
        b = case.bias.detach().clone().requires_grad_() if case.bias is not None else None
        dense = F.linear(x, w, b)
    assert y.dtype == dense.dtype == dtype
    y.backward(case.grad_y.to(dtype))
    dense.backward(case.grad_y.to(dtype))
    torch.testing.assert_close(y, dense, rtol=0, atol=0)
    assert case.bias is not None
    assert b is not None
    triples: list[tuple[Any, Any, Any]] = [
        (case.x.grad, truth[1], x.grad),
        (case.values.grad, case.block(truth[2]), case.block(w.grad if w.grad is not None else w)),
        (case.bias.grad, truth[3], b.grad),
    ]
    for got, exact, theirs in triples:
        assert got.dtype == torch.float32
        assert (got.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + 1e-6


class Products(TorchDispatchMode):
    """The sizes of every matrix product, and the sizes of everything made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.made.append(tuple(result.shape))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
                self.products.append(tuple(result.shape))
        return result


def test_the_backward_makes_nothing_of_the_weights_size() -> None:
    case = Case((6, INTO))
    y = case.run()
    with Products() as seen:
        y.backward(case.grad_y)
    assert sorted(seen.products) == [(4, 3), (6, INTO)]
    assert (OUT, INTO) not in seen.made


def test_an_input_that_needs_no_gradient_costs_no_product() -> None:
    case = Case((6, INTO))
    case.x.requires_grad_(False)
    y = case.run()
    with Products() as seen:
        y.backward(case.grad_y)
    assert seen.products == [(4, 3)]
    assert case.x.grad is None
    torch.testing.assert_close(case.values.grad, case.block(case.grad_y.t() @ case.x))


def test_a_frozen_subnet_costs_no_product() -> None:
    case = Case((6, INTO))
    case.values.requires_grad_(False)
    y = case.run()
    with Products() as seen:
        y.backward(case.grad_y)
    assert seen.products == [(6, INTO)]


@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
def test_what_is_saved_for_the_backward(head: bool) -> None:
    """1/4 of x, the weight itself, no copy of either; the head needs all of x."""
    case = Case((6, INTO), head=head)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.run()
    floats = sorted(tuple(t.shape) for t in saved if t.is_floating_point())
    assert floats == sorted([(6, INTO if head else 3), (OUT, INTO)])
    assert any(t.data_ptr() == case.weight.data_ptr() for t in saved)


@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
@pytest.mark.parametrize("shape", [(INTO,), (2, 2, INTO)], ids=["1d", "3d"])
def test_gradcheck_of_input_and_bias(shape: tuple[int, ...], head: bool) -> None:
    """S enters the value through W only, so numeric differences exist for x and b; S is held against W's below."""
    case = Case(shape, head=head)
    values = case.values.detach()
    assert torch.autograd.gradcheck(
        lambda x, b: subnet_linear(x, case.weight, values, case.rows, case.cols, b), (case.x, case.bias)
    )


@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
def test_the_subnets_gradient_is_the_numeric_derivative_by_the_weight(head: bool) -> None:
    case = Case((2, 2, INTO), head=head)
    case.run().backward(case.grad_y)
    numeric = torch.zeros_like(case.values)
    step = 1e-6
    with torch.no_grad():
        for i, row in enumerate(case.rows.tolist()):
            for j, col in enumerate(range(INTO) if case.cols is None else case.cols.tolist()):
                change = []
                for sign in (1, -1):
                    moved = case.weight.clone()
                    moved[row, col] += sign * step
                    change.append((F.linear(case.x, moved, case.bias) * case.grad_y).sum())
                numeric[i, j] = (change[0] - change[1]) / (2 * step)
    torch.testing.assert_close(case.values.grad, numeric, rtol=1e-6, atol=1e-8)


def test_a_use_twice_adds_up() -> None:
    case = Case((3, INTO))
    second = torch.randn(4, INTO, dtype=torch.float64)
    grad = torch.randn(4, OUT, dtype=torch.float64)
    a = case.run()
    b = subnet_linear(second, case.weight, case.values, case.rows, case.cols)
    torch.autograd.backward([a, b], [case.grad_y, grad])
    torch.testing.assert_close(case.values.grad, case.block(case.grad_y.t() @ case.x + grad.t() @ second))


def test_inputs_that_are_not_contiguous() -> None:
    case = Case((4, 3, INTO))
    case.x = torch.randn(INTO, 3, 4, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    case.grad_y = torch.randn(OUT, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    _, grad_x, grad_w, _ = case.dense(torch.float64)
    case.run().backward(case.grad_y)
    torch.testing.assert_close(case.x.grad, grad_x)
    torch.testing.assert_close(case.values.grad, case.block(grad_w))


def test_opcheck() -> None:
    """test_autograd_registration is for ops with an autograd key; this one is composite and dissolves before it."""
    case = Case((2, 3, INTO), dtype=torch.float32)
    for head in (False, True):
        arguments = (case.x, case.weight, case.values, case.rows, None if head else case.cols, case.bias)
        values = case.weight[case.rows].clone().requires_grad_() if head else case.values
        torch.library.opcheck(
            subnet_linear,
            (*arguments[:2], values, *arguments[3:]),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"),
        )


def test_under_no_grad_it_is_linear() -> None:
    case = Case()
    with torch.no_grad():
        y = case.run()
    assert y.grad_fn is None
    assert torch.equal(y, F.linear(case.x, case.weight, case.bias))


def test_it_is_one_node_until_the_compiler_takes_it_apart() -> None:
    case = Case((6, INTO), dtype=torch.float32)
    graphs: list[torch.fx.GraphModule] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(lambda: case.run(), backend=look, fullgraph=True)()
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [subnet_linear]


COMPILERS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
def test_compiled(compiler: str, head: bool) -> None:
    case = Case((2, 3, INTO), head=head)
    y, grad_x, grad_w, grad_b = case.dense(torch.float64)

    def step(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return subnet_linear(x, case.weight, values, case.rows, case.cols, bias) * 2

    mine = torch.compile(step, backend=compiler, fullgraph=True)(case.x, case.values, case.bias)
    mine.backward(case.grad_y / 2)
    torch.testing.assert_close(mine, 2 * y)
    torch.testing.assert_close(case.x.grad, grad_x)
    torch.testing.assert_close(case.values.grad, case.block(grad_w))
    assert case.bias is not None
    torch.testing.assert_close(case.bias.grad, grad_b)
