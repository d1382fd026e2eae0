"""Products in normal form, held against the graphs that Dynamo makes of every form: same value, or none claimed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from losia_fx.passes.nodes import use_of
from losia_fx.passes.products import Product, find_products, renewed
from tests.support.forms import EXPERTS, FORMS, Form, Holder


class Values(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # what is changed in place later is wanted as it was
        self.of[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def traced(form: Form) -> tuple[fx.GraphModule, Values, fx.Node]:
    """The graph that Dynamo makes, the values in it, and the weight's placeholder."""
    torch.manual_seed(0)
    module = Holder(form).to(form.dtypes[0])
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append((gm, inputs))
        return gm.forward

    torch.compile(module, backend=keep, fullgraph=True)(torch.randn(form.x).to(form.dtypes[0]))
    ((gm, inputs),) = graphs
    values = Values(gm)
    values.run(*inputs)
    holders = gm.graph.find_nodes(op="placeholder")
    (weight,) = [node for node, value in zip(holders, inputs, strict=True) if value is module.weight]
    return gm, values, weight


def normal(product: Product, values: Values) -> Tensor:
    """What the normal form says: after(form(before(x), w))."""
    x, w = values.of[product.x], values.of[product.view.node]
    x = x if product.before is None else x.permute(product.before)
    w = w.mT if product.flipped else w
    if product.form == "linear":
        y = F.linear(x, w, None if product.bias is None else values.of[product.bias])
    elif product.form == "batched":
        y = torch.bmm(x, w)
    else:
        assert product.form == "grouped"
        assert product.offsets is not None
        ends = [0, *values.of[product.offsets].tolist()]
        y = torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(pairwise(ends))])
    return y if product.after is None else y.permute(product.after)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_normal_form(form: Form) -> None:
    _, values, weight = traced(form)
    products, others = find_products(weight, len(form.weight))
    # a product of the weight with itself is one twice over: the plan sorts that out
    mixed = {"products-and-more", "through-itself", "with-itself-behind-a-cast"}
    assert bool(products) != form.whole or form.name in mixed
    assert bool(others) == form.whole or form.name in mixed
    for product in products:
        close = {"rtol": 1e-2, "atol": 1e-2} if form.dtypes[0] == torch.bfloat16 else {}
        torch.testing.assert_close(normal(product, values), values.of[product.node], **close)
        stored = values.of[weight]
        seen = values.of[product.view.node]
        expert = product.view.expert
        if expert is not None:
            stored = stored[values.of[expert] if isinstance(expert, fx.Node) else expert]
        assert torch.equal(seen, (stored.mT if product.view.transposed else stored).to(seen.dtype))
        assert product.holder is weight
        assert product.branch in weight.users
        assert renewed(product) == product


WANTED: dict[str, tuple[str, bool, bool]] = {
    # (normal form, transposed against what is stored, with permutations)
    "linear-3d": ("linear", False, False),
    "addmm": ("linear", True, False),
    "right": ("linear", True, False),
    "right-T": ("linear", False, False),
    "right-twice-turned": ("linear", True, False),
    "left-2d": ("linear", False, True),
    "left-1d": ("linear", False, False),
    "left-3d-turned": ("linear", True, True),
    "einsum": ("linear", False, False),
    "einsum-stored-otherwise": ("linear", True, False),
    "einsum-permuted": ("linear", False, True),
    "bmm": ("batched", False, False),
    "bmm-left": ("batched", True, True),
    "grouped": ("grouped", False, False),
    "grouped-turned": ("grouped", True, False),
    "loop": ("linear", False, False),
}


@pytest.mark.parametrize("name", WANTED)
def test_which_form(name: str) -> None:
    (form,) = [form for form in FORMS if form.name == name]
    _, _, weight = traced(form)
    products, _ = find_products(weight, len(form.weight))
    assert len(products) == (EXPERTS if name == "loop" else 1)
    for product in products:
        permuted = product.before is not None or product.after is not None
        assert (product.form, product.transposed, permuted) == WANTED[name]


def chain(x: Tensor, w: Tensor) -> Tensor:
    t = w.t()
    return (x @ t) @ w


def dead_view(x: Tensor, w: Tensor) -> Tensor:
    w.t()
    return F.linear(x, w)


def untold(x: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(w, x)


def keywords(x: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(input=x, other=w)


def scaled(x: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(x, x, w, beta=2)


def weight_in_both(x: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(w, w)


def numpy_t(x: Tensor, w: Tensor) -> Tensor:
    return x @ torch.ops.aten.numpy_T(w)


def numpy_t_overload(x: Tensor, w: Tensor) -> Tensor:
    return x @ torch.ops.aten.numpy_T.default(w)


def m_t(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.aten.linear.default(x, torch.ops.aten.mT(w))


def turned_by_a_number_of_the_graph(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.transpose(0, x.dim() - 1)


def linear(x: Tensor, w: Tensor) -> Tensor:
    return x @ (w * w)


fx.wrap("linear")


def called_as_torch_does(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, w)


@torch.library.custom_op("losia_tests::matmul", mutates_args=())
def matmul(x: Tensor, w: Tensor) -> Tensor:
    return x @ (w * w)


def operator_called_as_torchs(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.losia_tests.matmul(x, w)


def einsum_of_three(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bi,oi,bo->bo", x, w, x)


@pytest.mark.parametrize(
    ("function", "products", "others"),
    [
        (chain, ["matmul", "matmul_1"], []),
        (dead_view, ["linear"], []),
        (untold, [], ["matmul"]),  # nobody says how many dimensions x has
        (keywords, [], ["matmul"]),
        (scaled, [], ["addmm"]),
        (weight_in_both, [], ["matmul"]),
        (einsum_of_three, [], ["einsum"]),
        # as Dynamo writes x.T and x.mT since torch 2.14; and as exported programs write everything
        (numpy_t, ["matmul"], []),
        (numpy_t_overload, ["matmul"], []),
        (m_t, ["linear_default"], []),
        (turned_by_a_number_of_the_graph, [], ["transpose"]),
        # a name says nothing: these square the weight
        (called_as_torch_does, [], ["linear"]),
        (operator_called_as_torchs, [], ["matmul"]),
    ],
)
def test_by_hand(function: Any, products: list[str], others: list[str]) -> None:
    gm = fx.symbolic_trace(function)
    weight = gm.graph.find_nodes(op="placeholder")[1]
    found, left = find_products(weight, 2)
    assert [product.node.name for product in found] == products
    assert [node.name for node in left] == others


def test_use_of() -> None:
    gm = fx.symbolic_trace(lambda x, w: torch.mm(x, w.t()) @ w + x.mm(w).swapaxes(0, 1).relu())
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    assert [use_of(node) for node in calls] == ["t", "matmul", "matmul", "matmul", "swapaxes", "relu", "add"]
    assert use_of(gm.graph.find_nodes(op="placeholder")[0]) == "placeholder"
