"""losia.subnet_linear -> losia.packed_linear: what is alike is quantised once, and everything else stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from losia_fx import LosiaConfig, PassPostconditionError, PassPreconditionError
from losia_fx.method.packing import pack
from losia_fx.ops.linear import subnet_linear
from losia_fx.ops.packed import packed_linear, quantised
from losia_fx.passes import FrozenProducts, InsertLocalization, SubnetRewrite, copy_graph_module, forward_pipeline
from losia_fx.plan import SubnetFacts, SubnetPlan
from tests.support import graphs
from tests.support.eight_bits import KINDS
from tests.support.graphs import INTO


def three(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    return F.linear(F.linear(x, q) + F.linear(x, k) * F.linear(x, v), o)


def transposed(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def cast(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w.float())


def both(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w) @ w


def facts(name: str, head: bool = False, packed: str | None = "int8") -> SubnetFacts:
    return dataclasses.replace(graphs.facts(name, INTO, INTO, head), packed=packed)


def made(function: Callable[..., Any], *weights: str, **options: Any) -> tuple[fx.GraphModule, SubnetPlan]:
    gm = graphs.trace(function)
    plan = graphs.plan_of(gm, {name: facts(name, **options) for name in weights})
    SubnetRewrite(plan)(gm)
    return gm, plan


def count(gm: fx.GraphModule) -> dict[str, int]:
    found = graphs.targets(gm)
    return {op.name().partition("::")[2].partition(".")[0]: found.count(op) for op in (quantised, packed_linear)}


@pytest.mark.parametrize("name", ["plain", "without_bias", "used_twice"])
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    gm, plan = made(getattr(graphs, name), "w")
    InsertLocalization(plan)(gm)
    before = graphs.text(gm)
    assert FrozenProducts(plan)(gm).modified
    golden(f"frozen_products_{name}", graphs.before_and_after(before, graphs.text(gm)))


def test_what_several_linears_take_is_quantised_once() -> None:
    gm, plan = made(three, "q", "k", "v", "o")
    FrozenProducts(plan)(gm)
    assert count(gm) == {"quantised": 2, "packed_linear": 4}
    assert subnet_linear not in graphs.targets(gm)


def test_in_a_checkpointed_region_it_is_quantised_within(golden: Callable[[str, str], None]) -> None:
    gm = copy_graph_module(graphs.checkpointed())
    each = {name: dataclasses.replace(graphs.facts(name), packed="float8") for name in ("w_0", "w_1")}
    plan = graphs.plan_of(gm, each)
    SubnetRewrite(plan)(gm)
    before = graphs.text(gm)
    FrozenProducts(plan)(gm)
    assert count(gm) == {"quantised": 2, "packed_linear": 2}
    golden("frozen_products_checkpointed", graphs.before_and_after(before, graphs.text(gm)))


@pytest.mark.parametrize(
    ("function", "options"), [(transposed, {}), (cast, {}), (graphs.without_bias, {"packed": None})]
)
def test_what_is_no_plain_linear_stays(function: Callable[..., Any], options: dict[str, Any]) -> None:
    gm, plan = made(function, "w", **options)
    before = graphs.text(gm)
    assert not FrozenProducts(plan)(gm).modified
    assert graphs.text(gm) == before
    assert plan.packed_ports == []


def test_a_weight_with_both_kinds_of_use() -> None:
    gm, plan = made(both, "w")
    assert [(site.use, site.packed) for site in plan.sites] == [("linear", True), ("matmul", False)]
    FrozenProducts(plan)(gm)
    targets = graphs.targets(gm)
    assert targets.count(packed_linear) == targets.count(subnet_linear) == 1


def test_placeholders_come_last_and_only_where_they_are_used() -> None:
    gm = graphs.trace(graphs.two_weights)
    each = {"up": graphs.facts("up"), "down": dataclasses.replace(graphs.facts("down"), packed="int8")}
    plan = graphs.plan_of(gm, each)
    for step in (SubnetRewrite, InsertLocalization, FrozenProducts):
        step(plan)(gm)
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    assert names[-4:] == [*(port.handle_name for port in plan.ports), *plan.ports[1].packed_names]


def test_a_graph_that_is_not_rewritten_and_a_second_time_are_refused() -> None:
    gm, plan = made(graphs.without_bias, "w")
    FrozenProducts(plan)(gm)
    for other in (gm, graphs.trace(graphs.without_bias)):
        before = graphs.text(other)
        with pytest.raises(PassPreconditionError, match=r"frozen-products: w: 'linear' is no rewritten linear"):
            FrozenProducts(plan)(other)
        assert graphs.text(other) == before


def test_it_says_so_where_a_product_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, plan = made(graphs.used_twice, "w")
    monkeypatch.setattr(FrozenProducts, "apply", lambda self, gm: 0)
    with pytest.raises(PassPostconditionError, match="0 packed products in the graph, 2 planned"):
        FrozenProducts(plan)(gm)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_pipeline_runs_it_where_the_option_asks(kind: str | None) -> None:
    config = LosiaConfig(frozen_products=kind)
    names = [step.name for step in forward_pipeline(made(graphs.plain, "w")[1], config).passes]
    assert names == ["subnet-rewrite", "insert-localization", *(["frozen-products"] if kind else [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_value_and_gradients_are_those_of_the_op(kind: str, compiler: str) -> None:
    """With a tap in it, and a weight that is used twice."""
    inputs = {"x": torch.randn(5, 16, requires_grad=True), "w": torch.randn(16, 16)}
    gm = graphs.trace(graphs.used_twice)
    plan = graphs.plan_of(gm, {"w": dataclasses.replace(graphs.facts("w", 16, 16), packed=kind)})
    for step in (SubnetRewrite, InsertLocalization, FrozenProducts):
        step(plan)(gm)
    state = graphs.State(inputs, plan)
    state.by_name |= dict(zip(plan.ports[0].packed_names, pack(inputs["w"], kind), strict=True))
    y = torch.compile(gm, backend=compiler, fullgraph=True)(*state.arguments(gm, inputs))
    y.square().sum().backward()

    x, values = (t.detach().clone().requires_grad_() for t in (inputs["x"], state.values["w"]))
    rows, cols = torch.tensor(graphs.ROWS), torch.tensor(graphs.COLS)
    expected = x
    for number in range(2):
        taken = torch.relu(expected) if number else expected
        expected = packed_linear(taken, *quantised(taken, kind), *pack(inputs["w"], kind), values, rows, cols)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(inputs["x"].grad, x.grad)
    torch.testing.assert_close(state.values["w"].grad, values.grad)
