"""Which nodes use which weight, and the plan that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losia_fx.passes import find_uses
from losia_fx.plan import SubnetPlan
from tests.support import graphs


def places(plan: SubnetPlan) -> tuple[list[tuple[str, str]], list[tuple[tuple[str, ...], str]]]:
    """(node, use) of the products, (users, use) of what takes a weight whole."""
    return [(site.node, site.use) for site in plan.sites], [(site.users, site.use) for site in plan.whole]


def weight_as_input(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(w, w)


def weight_as_bias(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w, w)


def weight_as_bias_by_keyword(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w, bias=w)


def weight_as_input_by_keyword(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(input=w, weight=w)


def returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, w), w


def in_a_list(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w) + torch.cat([w, w])[:, :1].sum()


def view_used_twice(x: Tensor, w: Tensor) -> Tensor:
    t = w.t()
    return x @ t + t.sum()


@pytest.mark.parametrize(
    ("function", "products", "whole"),
    [
        (graphs.plain, [("linear", "linear")], []),
        (graphs.without_bias, [("linear", "linear")], []),
        (graphs.by_keywords, [("linear", "linear")], []),
        (graphs.some_keywords, [("linear", "linear")], []),
        (graphs.used_twice, [("linear", "linear"), ("linear_1", "linear")], []),
        (graphs.used_otherwise, [("linear", "linear")], [(("sum_1",), "sum")]),
        (graphs.no_linear, [], [(("mul",), "mul")]),
        (graphs.unused, [], []),
        (weight_as_input, [], [(("linear",), "linear")]),
        (weight_as_bias, [], [(("linear",), "linear")]),
        (weight_as_bias_by_keyword, [], [(("linear",), "linear")]),
        (weight_as_input_by_keyword, [], [(("linear",), "linear")]),
        (in_a_list, [("linear", "linear")], [(("cat",), "cat")]),
        (view_used_twice, [], [(("t",), "t")]),  # both behind one view: it is taken whole
        (returned, [("linear", "linear")], []),  # what is handed out keeps its identity
    ],
)
def test_plan(function: Callable[..., Any], products: list[Any], whole: list[Any]) -> None:
    assert places(graphs.plan_of(graphs.trace(function), {"w": graphs.facts("w")})) == (products, whole)


@pytest.mark.parametrize(
    ("function", "only"),
    [(graphs.plain, True), (graphs.used_otherwise, False), (graphs.no_linear, False), (graphs.unused, False)],
)
def test_only_products(function: Callable[..., Any], only: bool) -> None:
    uses = find_uses(graphs.trace(function), {"w": 2})
    assert uses["w"].only_products == only


def test_a_product_of_two_weights_is_rewritten_for_one_of_them() -> None:
    def product(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.linear(x, torch.matmul(w, v.t()))

    gm = graphs.trace(product)
    gm.graph.find_nodes(op="call_function", target=torch.matmul)[0].meta["example_value"] = torch.empty(6, 6)
    for holder in gm.graph.find_nodes(op="placeholder"):
        holder.meta["example_value"] = torch.empty(6, 8)
    for node in gm.graph.find_nodes(op="call_method", target="t"):
        node.meta["example_value"] = torch.empty(8, 6)
    plan = graphs.plan_of(gm, {"w": graphs.facts("w"), "v": graphs.facts("v")})
    assert places(plan) == ([("matmul", "matmul")], [(("t",), "t")])
    assert [plan.ports[site.port].weight for site in plan.places] == ["w", "v"]


def test_weights_without_facts_are_not_planned() -> None:
    gm = graphs.trace(graphs.two_weights)
    plan = graphs.plan_of(gm, {"down": graphs.facts("down")})
    assert [(site.node, site.port) for site in plan.sites] == [("linear_1", 0)]
    assert [(port.weight, port.position) for port in plan.ports] == [("down", 2)]
    assert plan.whole == ()


def test_a_weight_without_a_use_gets_no_port() -> None:
    plan = graphs.plan_of(graphs.trace(graphs.unused), {"w": graphs.facts("w")})
    assert plan.ports == plan.sites == plan.whole == ()


def test_a_weight_used_twice_is_one_port_with_two_calls() -> None:
    plan = graphs.plan_of(graphs.trace(graphs.used_twice), {"w": graphs.facts("w")})
    assert len(plan.ports) == 1
    assert [(site.port, site.node) for site in plan.sites] == [(0, "linear"), (0, "linear_1")]
    assert len({site.call for site in plan.sites}) == 2


def test_names_of_placeholders_are_ours() -> None:
    plan = graphs.plan_of(
        graphs.trace(graphs.two_weights), {n: graphs.facts(n, head=n == "down") for n in ("up", "down")}
    )
    up, down = plan.ports
    assert len(up.input_names) == 3
    assert len(down.input_names) == 2  # every column learns: no cols
    names = [*up.input_names, *down.input_names, up.handle_name, down.handle_name]
    assert len(set(names)) == 7
    assert all(name.startswith("losia_") for name in names)


@pytest.mark.parametrize("share_body", [False, True])
def test_linears_in_checkpointed_bodies(share_body: bool) -> None:
    gm = graphs.checkpointed(share_body=share_body)
    bodies = [("body_0",), ("body_0",) if share_body else ("body_1",)]
    uses = find_uses(gm, {"w_0": 2, "w_1": 2})
    found = {name: [(body, product.node.name) for body, product in use.products] for name, use in uses.items()}
    assert found == {"w_0": [(bodies[0], "linear")], "w_1": [(bodies[1], "linear")]}
    assert all(use.only_products for use in uses.values())


def test_analysis_edits_nothing() -> None:
    gm = graphs.checkpointed()
    before = graphs.text(gm)
    graphs.plan_of(gm, {"w_0": graphs.facts("w_0")})
    assert graphs.text(gm) == before
