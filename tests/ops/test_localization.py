"""tap and localize: tickets, any order of backwards, and inputs that live no longer than their graph."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from losia_fx.ops.linear import subnet_linear
from losia_fx.ops.localization import BY_HANDLE, drop_taps, localize, tap, tapped_bytes

HANDLE = 10**9  # far from what real subnets count up to


class Gatherer:
    """Stands in for a subnet: adds up what localize hands over."""

    registered = False

    def __init__(self, profiling: bool = True) -> None:
        self.profiling, self.shape = profiling, (5, 6)
        self.grad: Tensor | None = None
        self.uses = 0
        self.parts: list[tuple[Tensor, int | Tensor | None]] = []

    def begin_use(self) -> None:
        self.uses += 1

    def accumulate(self, grad: Tensor, expert: int | Tensor | None, owned: bool) -> None:
        self.parts.append((grad.clone(), expert))
        if expert is None:
            self.grad = grad.clone() if self.grad is None else self.grad + grad


@pytest.fixture
def gatherer() -> Any:
    gc.collect()
    drop_taps([HANDLE])
    made = Gatherer()
    BY_HANDLE[HANDLE] = made
    yield made
    BY_HANDLE.pop(HANDLE, None)
    drop_taps([HANDLE])


@pytest.fixture
def handle() -> Tensor:
    return torch.tensor([HANDLE])


class Layer:
    def __init__(self, handle: Tensor, into: int = 6, out: int = 5) -> None:
        self.handle = handle
        self.weight = torch.randn(out, into)
        self.rows, self.cols = torch.tensor([0, 2]), torch.tensor([1, 3, 4])
        self.values = self.weight[self.rows][:, self.cols].clone().requires_grad_()

    def __call__(self, x: Tensor, call: int = 0) -> Tensor:
        ticket = tap(x.detach(), self.handle, call)
        result: Tensor = subnet_linear(
            x, self.weight, self.values, self.rows, self.cols, None, ticket, self.handle, call
        )
        return result


def test_a_ticket_is_a_fresh_number_on_the_cpu(gatherer: Gatherer, handle: Tensor) -> None:
    x = torch.randn(3, 6)
    tickets = [tap(x, handle, 0) for _ in range(3)]
    assert all(t.dtype == torch.int64 and t.shape == (1,) and t.device.type == "cpu" for t in tickets)
    assert len({int(t) for t in tickets}) == 3
    assert all(int(t) > 0 for t in tickets)
    assert tapped_bytes() == 3 * x.nbytes


def test_nothing_is_kept_while_idle(gatherer: Gatherer, handle: Tensor) -> None:
    gatherer.profiling = False
    assert int(tap(torch.randn(3, 6), handle, 0)) == 0
    assert int(tap(torch.randn(3, 6), torch.tensor([HANDLE + 1]), 0)) == 0  # nobody of that name
    assert tapped_bytes() == 0


def test_localize_gives_one_zero_of_the_gradients_type(gatherer: Gatherer, handle: Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ticket = tap(torch.randn(3, 6, dtype=dtype), handle, 0)
        zero = localize(torch.full((3, 5), float("inf"), dtype=dtype), ticket, handle, 0)
        assert zero.dtype == dtype
        assert zero.shape == (1,)
        assert float(zero) == 0.0


def test_the_input_is_kept_as_it_was(gatherer: Gatherer, handle: Tensor) -> None:
    x = torch.randn(3, 6)
    original = x.clone()
    ticket = tap(x, handle, 0)
    x.zero_()
    grad_y = torch.randn(3, 5)
    localize(grad_y, ticket, handle, 0)
    assert torch.equal(gatherer.parts[0][0], grad_y.t() @ original)


def test_the_full_gradient(gatherer: Gatherer, handle: Tensor) -> None:
    layer = Layer(handle)
    x, grad = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    layer(x).backward(grad)
    full = grad.flatten(0, 1).t() @ x.flatten(0, 1)
    torch.testing.assert_close(gatherer.grad, full)
    torch.testing.assert_close(layer.values.grad, full[layer.rows][:, layer.cols])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["same", "reversed"])
def test_backwards_in_any_order(gatherer: Gatherer, handle: Tensor, order: tuple[int, int]) -> None:
    layer = Layer(handle)
    inputs, grads = [torch.randn(4, 6) for _ in "ab"], [torch.randn(4, 5) for _ in "ab"]
    outputs = [layer(x) for x in inputs]
    for index in order:
        outputs[index].backward(grads[index])
        assert torch.equal(gatherer.parts[-1][0], grads[index].t() @ inputs[index])
    torch.testing.assert_close(gatherer.grad, sum(g.t() @ x for g, x in zip(grads, inputs, strict=True)))


def test_two_uses_in_one_graph(gatherer: Gatherer, handle: Tensor) -> None:
    layer = Layer(handle, 5, 5)
    x = torch.randn(4, 5)
    w = layer.weight.clone().requires_grad_()
    torch.relu(torch.relu(x @ w.t()) @ w.t()).sum().backward()
    torch.relu(layer(torch.relu(layer(x, 0)), 1)).sum().backward()
    torch.testing.assert_close(gatherer.grad, w.grad)


def test_a_graph_run_backwards_twice_counts_twice(gatherer: Gatherer, handle: Tensor) -> None:
    layer = Layer(handle)
    x, grad = torch.randn(4, 6), torch.randn(4, 5)
    y = layer(x)
    y.backward(grad, retain_graph=True)
    y.backward(2 * grad)
    torch.testing.assert_close(gatherer.grad, 3 * grad.t() @ x)


def test_a_tapped_input_goes_with_its_graph(gatherer: Gatherer, handle: Tensor) -> None:
    layer = Layer(handle)
    x = torch.randn(4, 6)
    y = layer(x)
    assert tapped_bytes() == x.nbytes
    del y
    gc.collect()
    assert tapped_bytes() == 0
    y = layer(x)
    y.sum().backward()
    del y
    gc.collect()
    assert tapped_bytes() == 0


def test_many_micro_batches_pile_nothing_up(gatherer: Gatherer, handle: Tensor) -> None:
    layer = Layer(handle)
    for _ in range(20):
        layer(torch.randn(4, 6)).sum().backward()
        assert tapped_bytes() <= 4 * 6 * 4
    assert len(gatherer.parts) == 20


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_tapped_input_goes_with_its_compiled_graph(gatherer: Gatherer, handle: Tensor, compiler: str) -> None:
    layer = Layer(handle)
    run = torch.compile(layer.__call__, backend=compiler, fullgraph=True)
    for _ in range(3):
        x = torch.randn(4, 6)
        y = run(x)
        assert tapped_bytes() == x.nbytes
        y.sum().backward()
        del y
        gc.collect()
        assert tapped_bytes() == 0
    y = run(x)  # a forward without a backward
    del y
    gc.collect()
    assert tapped_bytes() == 0
    assert len(gatherer.parts) == 3


def test_drop_taps_forgets_forwards_of_before(gatherer: Gatherer, handle: Tensor) -> None:
    layer = Layer(handle)
    y = layer(torch.randn(4, 6))
    drop_taps([HANDLE])
    assert tapped_bytes() == 0
    y.sum().backward()  # the subnet's own gradient is right, the importance hears nothing
    assert layer.values.grad is not None
    assert not gatherer.parts
    gc.collect()


def test_a_backward_after_the_slot_is_not_counted(gatherer: Gatherer, handle: Tensor) -> None:
    layer = Layer(handle)
    y = layer(torch.randn(4, 6))
    gatherer.profiling = False
    y.sum().backward()
    assert not gatherer.parts


def test_a_subnet_that_is_gone_is_no_error(gatherer: Gatherer, handle: Tensor) -> None:
    layer = Layer(handle)
    y = layer(torch.randn(4, 6))
    BY_HANDLE.pop(HANDLE)
    y.sum().backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_switching_recompiles_nothing(gatherer: Gatherer, handle: Tensor, compiler: str) -> None:
    layer = Layer(handle)
    run = torch.compile(layer.__call__, backend=compiler, fullgraph=True)
    full = None
    for profiling in (True, False, True):
        gatherer.profiling, gatherer.grad, layer.values.grad = profiling, None, None
        x, grad = torch.randn(4, 6), torch.randn(4, 5)
        run(x).backward(grad)
        full = grad.t() @ x
        torch.testing.assert_close(layer.values.grad, full[layer.rows][:, layer.cols])
        if profiling:
            torch.testing.assert_close(gatherer.grad, full)
        else:
            assert gatherer.grad is None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_recomputation(gatherer: Gatherer, handle: Tensor, compiler: str) -> None:
    """Under checkpointing the forward, and so tap, runs twice; the gradient counts once."""
    from torch.utils.checkpoint import checkpoint

    layer = Layer(handle)
    x, grad = torch.randn(4, 6, requires_grad=True), torch.randn(4, 5)

    def step(x: Tensor) -> Tensor:
        return checkpoint(lambda x: layer(torch.sin(x)), x, use_reentrant=False)

    y = torch.compile(step, backend=compiler, fullgraph=True)(x)
    y.backward(grad)
    torch.testing.assert_close(gatherer.grad, grad.t() @ torch.sin(x.detach()))
    del y
    gc.collect()
    assert tapped_bytes() == 0


def test_opcheck(gatherer: Gatherer, handle: Tensor) -> None:
    gatherer.profiling = False  # a ticket is fresh each time, which no schema check can know
    torch.library.opcheck(tap, (torch.randn(3, 6), handle, 0))
    torch.library.opcheck(localize, (torch.randn(3, 5), torch.zeros(1, dtype=torch.int64), handle, 0))


def test_cuda_graphs_leave_them_alone() -> None:
    for op in (tap, localize):
        assert torch.Tag.cudagraph_unsafe in op.tags


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("index", [1, -1, [2, 0, 2, 1], [-1, 0, -1, -2], [1, 1, 1, 1]], ids=str)
def test_experts_that_a_tensor_names(gatherer: Gatherer, handle: Tensor, index: Any, transposed: bool) -> None:
    """Of one expert, and of several that need not be different; the numbers may count from the end."""
    experts, chosen = 3, torch.tensor(index)
    form = "linear" if chosen.dim() == 0 else "batched"
    weight = torch.randn(experts, 5, 6, dtype=torch.float64).requires_grad_()  # as it is stored
    gatherer.shape = tuple(weight.shape)
    taken = weight[chosen].mT if transposed else weight[chosen]
    into, out = (-1, -2) if form == "linear" else (-2, -1)
    x, grad_y = (torch.randn(*chosen.shape, 4, taken.shape[dim], dtype=torch.float64) for dim in (into, out))
    (x @ (taken.mT if form == "linear" else taken)).backward(grad_y)
    localize(grad_y, tap(x, handle, 0, form, transposed, None, chosen), handle, 0)
    ((grad, expert),) = gatherer.parts
    found = grad if expert is None else torch.zeros_like(weight).index_add(0, expert, grad.unsqueeze(0))  # type: ignore[arg-type]
    torch.testing.assert_close(found, weight.grad)


def test_an_index_is_kept_as_it_was(gatherer: Gatherer, handle: Tensor) -> None:
    """The compilers reuse the memory of what the graph computed, an index too."""
    gatherer.shape = (3, 5, 6)
    chosen, x, grad_y = torch.tensor([2, 0]), torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    ticket = tap(x, handle, 0, "batched", True, None, chosen)
    expected = torch.stack([grad_y[1].mT @ x[1], torch.zeros(5, 6), grad_y[0].mT @ x[0]])
    chosen.fill_(1)
    localize(grad_y, ticket, handle, 0)
    ((grad, expert),) = gatherer.parts
    assert expert is None
    torch.testing.assert_close(grad, expected)
