"""Ops whose kernels lay out what they make otherwise than traced, around products with permuted inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import losia_fx
from losia_fx.method.subnet import gather
from losia_fx.passes import LoosenViews
from tests.support import graphs
from tests.support.joint_graphs import Stack, drawn, lively, loss_of, plain_gradients

EXPERTS, WIDTH, TOKENS = 3, 6, 5

aten = torch.ops.aten


class Turned(nn.Module):
    """x (EXPERTS, TOKENS, WIDTH) -> linear, turned -> act -> a product with the weight on the left -> act -> linear."""

    def __init__(self, act: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.across, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(TOKENS, TOKENS), nn.Linear(WIDTH, WIDTH)
        stacked = product is torch.bmm
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) if stacked else torch.randn(WIDTH, WIDTH))
        self.num_experts = EXPERTS
        self.act, self.product = act, product

    def forward(self, x: Tensor) -> Tensor:
        turned = self.act(self.across(self.into(x).mT))
        return self.out(self.act(self.product(self.weight, turned)).mT)


def permuted(weight: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oi,bit->tob", weight, x).permute(2, 1, 0)


ACTS = {"softplus": F.softplus, "elu": F.elu, "hardtanh": F.hardtanh, "logsigmoid": F.logsigmoid, "silu": F.silu}
PRODUCTS = {"matmul": torch.matmul, "bmm": torch.bmm, "einsum": permuted}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("act", ACTS)
def test_runs_and_is_exact(act: str, product: str) -> None:
    model = drawn(Stack(lambda: Turned(ACTS[act], PRODUCTS[product]), layers=1)).double()
    x = lively(EXPERTS, TOKENS, WIDTH)
    expected = plain_gradients(model, x)
    ours = losia_fx.transform(copy.deepcopy(model), rank_factor=0.5, compiler="aot_eager")
    loss_of(ours, x).backward()
    subnets = losia_fx.subnets(ours)
    assert len(subnets) == 4
    for name, subnet in subnets.items():
        assert expected[name].any()
        torch.testing.assert_close(subnet.values.grad, gather(expected[name], subnet.rows, subnet.cols))


def test_every_view_and_nothing_else() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(aten.view.default, (x, [6]))
    unsafe = graph.call_function(aten._unsafe_view.default, (view, [2, 3]))
    graph.output(graph.call_function(aten.t.default, (unsafe,)))
    gm = fx.GraphModule({}, graph)
    across = torch.arange(6).view(2, 3).t()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        gm(across)
    assert LoosenViews()(gm).modified
    assert graphs.targets(gm) == [aten.reshape.default, aten.reshape.default, aten.t.default]
    assert gm(across).tolist() == [[0, 4], [3, 2], [1, 5]]
    assert not LoosenViews()(gm).modified


class Masked(Stack):
    """Some of what comes out is written over, in another graph than the one that made it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        y[..., :2] = -1.0
        return y


def test_what_a_graph_gives_may_be_changed_in_place() -> None:
    model = drawn(Masked(lambda: nn.Linear(WIDTH, WIDTH, bias=False), layers=2)).double()
    x = lively(EXPERTS, TOKENS, WIDTH)
    expected = plain_gradients(model, x)
    ours = losia_fx.transform(copy.deepcopy(model), rank_factor=0.5, compiler="aot_eager")
    loss_of(ours, x).backward()
    for name, subnet in losia_fx.subnets(ours).items():
        torch.testing.assert_close(subnet.values.grad, gather(expected[name], subnet.rows, subnet.cols))
