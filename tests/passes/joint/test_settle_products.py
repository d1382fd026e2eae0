"""Where the sums of products of 8-bit numbers are written to memory, in graphs as AOTAutograd traces them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from losia_fx._compat import settle
from losia_fx.ops.packed import product
from losia_fx.passes import SettleProducts

TOKENS, IN, OUT = 24, 16, 32

aten = torch.ops.aten

Body = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    y = product(x, weight, x_scales, weight_scales, torch.bfloat16).to(torch.bfloat16)
    return torch.sigmoid(y) * y


def biased(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    y = (product(x, weight, x_scales, weight_scales, torch.bfloat16) + bias).to(torch.bfloat16)
    return torch.sigmoid(y) * y


def in_float32(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    y = product(x, weight, x_scales, weight_scales, torch.float32)
    return y + torch.ones(TOKENS, OUT)


def without_rows_scales(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    return product(x, weight, x_scales, None, torch.float32).to(torch.bfloat16).exp()


def read_twice(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    y = product(x, weight, x_scales, weight_scales, torch.float32)
    return y.to(torch.bfloat16) * y


def drawn(device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device)

    factors = torch.rand(TOKENS, 1, generator=generator), torch.rand(1, OUT, generator=generator)
    return numbers(TOKENS, IN), numbers(IN, OUT), *(each.to(device) for each in factors), torch.ones(OUT, device=device)


def settled(body: Body, device: str = "cpu") -> tuple[fx.GraphModule, list[fx.Node]]:
    gm = make_fx(body, tracing_mode="fake")(*drawn(device))
    SettleProducts()(gm)
    return gm, gm.graph.find_nodes(op="call_function", target=settle)


@pytest.mark.parametrize(
    ("body", "last"),
    [
        (plain, aten._to_copy.default),
        (biased, aten._to_copy.default),
        (in_float32, aten.mul.Tensor),  # what it is added to is as large: no part of the product
        (without_rows_scales, aten._to_copy.default),
        (read_twice, aten.mul.Tensor),
    ],
)
def test_what_the_readers_of_a_product_read_is_settled(body: Body, last: object) -> None:
    gm, (node,) = settled(body)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    assert source.target is last
    assert list(source.users) == [node]
    assert node.meta["val"].dtype == source.meta["val"].dtype
    assert node.args[1] == [OUT, 1]
    assert torch.equal(gm(*drawn()), body(*drawn()))


def test_sums_that_nothing_scales() -> None:
    _, (node,) = settled(lambda x, weight, *others: torch._int_mm(x, weight))
    assert node.args[0].target is aten._int_mm.default  # type: ignore[union-attr]


def test_each_product_by_itself() -> None:
    _, nodes = settled(lambda *inputs: plain(*inputs) + biased(*inputs))
    assert len(nodes) == 2


def test_other_devices_are_let_be() -> None:
    assert settled(plain, "meta")[1] == []


def test_a_graph_without_such_products() -> None:
    gm = make_fx(lambda x: x.mm(x).exp())(torch.ones(3, 3))
    assert not SettleProducts()(gm).modified
