"""Which nodes use which weight, and the plan that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losia_fx.passes import Use, find_uses
from losia_fx.plan import LeftAlone
from tests import graphs


def linears(uses: list[Use]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(use.holder, use.node, use.body) for use in uses if use.linear]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (graphs.plain, [("w", "linear", ())]),
        (graphs.without_bias, [("w", "linear", ())]),
        (graphs.by_keywords, [("w", "linear", ())]),
        (graphs.some_keywords, [("w", "linear", ())]),
        (graphs.used_twice, [("w", "linear", ()), ("w", "linear_1", ())]),
        (graphs.used_otherwise, [("w", "linear", ())]),
        (graphs.two_weights, [("up", "linear", ()), ("down", "linear_1", ())]),
        (graphs.no_linear, []),
    ],
)
def test_uses(function: Callable[..., Any], expected: list[tuple[str, str, tuple[str, ...]]]) -> None:
    assert linears(find_uses(graphs.trace(function))) == expected


def test_every_other_use_is_said_too() -> None:
    uses = find_uses(graphs.trace(graphs.used_otherwise))
    (other,) = [use for use in uses if use.holder == "w" and not use.linear]
    assert other.node == "sum_1"
    assert other.target == "sum"


def test_an_input_and_a_bias_are_no_weights() -> None:
    uses = find_uses(graphs.trace(graphs.plain))
    assert {(use.holder, use.linear) for use in uses} == {("x", False), ("w", True), ("b", False)}


def weight_as_input(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(w, w)


def weight_as_bias(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w, w)


def weight_as_bias_by_keyword(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w, bias=w)


def weight_as_input_by_keyword(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(input=w, weight=w)


@pytest.mark.parametrize(
    "function",
    [
        weight_as_input,
        weight_as_bias,
        weight_as_bias_by_keyword,
        weight_as_input_by_keyword,
    ],
)
def test_a_weight_that_is_something_else_of_its_linear_too_is_left_alone(function: Callable[..., Any]) -> None:
    gm = graphs.trace(function)
    plan = graphs.plan_of(gm, {"w": graphs.facts("w")})
    assert not plan.sites
    assert [left.fqn for left in plan.left] == ["w"]


def returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, w), w


def in_a_list(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w) + torch.cat([w, w])[:, :1].sum()


def by_method(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w) @ w.t().t()


@pytest.mark.parametrize("function", [graphs.used_otherwise, in_a_list, by_method, returned])
def test_a_weight_used_by_something_else_too_is_left_alone_with_a_reason(function: Callable[..., Any]) -> None:
    gm = graphs.trace(function)
    plan = graphs.plan_of(gm, {"w": graphs.facts("model.w")})
    assert plan.slots == plan.sites == ()
    (left,) = plan.left
    assert isinstance(left, LeftAlone)
    assert left.fqn == "model.w"
    assert left.node in {node.name for node in gm.graph.nodes}
    assert left.reason


def test_weights_without_facts_are_not_planned() -> None:
    gm = graphs.trace(graphs.two_weights)
    plan = graphs.plan_of(gm, {"down": graphs.facts("down")})
    assert [(site.node, site.slot) for site in plan.sites] == [("linear_1", 0)]
    assert [(slot.weight, slot.position) for slot in plan.slots] == [("down", 2)]
    assert plan.left == ()


def test_a_weight_without_a_use_gets_no_slot() -> None:
    def unused(x: Tensor, w: Tensor) -> Tensor:
        return torch.relu(x)

    plan = graphs.plan_of(graphs.trace(unused), {"w": graphs.facts("w")})
    assert plan.slots == plan.sites == plan.left == ()


def test_a_weight_used_twice_is_one_slot_with_two_calls() -> None:
    plan = graphs.plan_of(graphs.trace(graphs.used_twice), {"w": graphs.facts("w")})
    assert len(plan.slots) == 1
    assert [(site.slot, site.node) for site in plan.sites] == [(0, "linear"), (0, "linear_1")]
    assert len({site.call for site in plan.sites}) == 2


def test_names_of_placeholders_are_ours() -> None:
    plan = graphs.plan_of(
        graphs.trace(graphs.two_weights), {n: graphs.facts(n, head=n == "down") for n in ("up", "down")}
    )
    up, down = plan.slots
    assert len(up.input_names) == 3
    assert len(down.input_names) == 2  # every column learns: no cols
    names = [*up.input_names, *down.input_names, up.handle_name, down.handle_name]
    assert len(set(names)) == 7
    assert all(name.startswith("losia_") for name in names)


@pytest.mark.parametrize("share_body", [False, True])
def test_linears_in_checkpointed_bodies(share_body: bool) -> None:
    gm = graphs.checkpointed(share_body=share_body)
    uses = find_uses(gm)
    bodies = [("body_0",), ("body_0",) if share_body else ("body_1",)]
    assert linears(uses) == [("w_0", "linear", bodies[0]), ("w_1", "linear", bodies[1])]
    assert {use.holder for use in uses} == {"x", "w_0", "b_0", "w_1", "b_1"}


def test_analysis_edits_nothing() -> None:
    gm = graphs.checkpointed()
    before = graphs.text(gm)
    graphs.plan_of(gm, {"w_0": graphs.facts("w_0")})
    assert graphs.text(gm) == before
