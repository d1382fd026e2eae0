"""linear -> losia.subnet_linear: same value, same graph around it, the gradient in S."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from losia_fx import PassPostconditionError, PassPreconditionError
from losia_fx.ops.linear import subnet_linear
from losia_fx.passes import SubnetRewrite, copy_graph_module, rewrite
from losia_fx.plan import SubnetPlan
from tests.support import graphs
from tests.support.graphs import INTO, OUT

CASES: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], list[str]]] = {
    "plain": (graphs.plain, {"x": (5, INTO), "w": (OUT, INTO), "b": (OUT,)}, ["w"]),
    "without_bias": (graphs.without_bias, {"x": (2, 3, INTO), "w": (OUT, INTO)}, ["w"]),
    "by_keywords": (graphs.by_keywords, {"x": (5, INTO), "w": (OUT, INTO), "b": (OUT,)}, ["w"]),
    "some_keywords": (graphs.some_keywords, {"x": (5, INTO), "w": (OUT, INTO)}, ["w"]),
    "used_twice": (graphs.used_twice, {"x": (5, INTO), "w": (INTO, INTO)}, ["w"]),
    "two_weights": (
        graphs.two_weights,
        {"x": (5, INTO), "up": (OUT, INTO), "down": (OUT, OUT + 2), "b": (OUT,)},
        ["up"],
    ),
}
CASES["two_weights"][1].update({"down": (OUT, OUT)})


def make(name: str, head: bool = False) -> tuple[fx.GraphModule, SubnetPlan, dict[str, Tensor]]:
    function, shapes, weights = CASES[name]
    gm = graphs.trace(function)
    inputs = {key: torch.randn(shape, requires_grad=True) for key, shape in shapes.items()}
    plan = graphs.plan_of(gm, {key: graphs.facts(key, *shapes[key], head) for key in weights})
    return gm, plan, inputs


@pytest.mark.parametrize("name", list(CASES))
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    gm, plan, _ = make(name)
    before = graphs.text(gm)
    result = SubnetRewrite(plan)(gm)
    assert result.modified
    golden(f"subnet_rewrite_{name}", graphs.before_and_after(before, graphs.text(result.graph_module)))


def test_golden_head(golden: Callable[[str, str], None]) -> None:
    gm, plan, _ = make("without_bias", head=True)
    before = graphs.text(gm)
    golden("subnet_rewrite_head", graphs.before_and_after(before, graphs.text(SubnetRewrite(plan)(gm).graph_module)))


def test_golden_checkpointed(golden: Callable[[str, str], None]) -> None:
    gm = graphs.checkpointed()
    before = graphs.text(gm)
    plan = graphs.plan_of(gm, {"w_0": graphs.facts("w_0"), "w_1": graphs.facts("w_1")})
    after = graphs.text(SubnetRewrite(plan)(copy_graph_module(gm)).graph_module)
    golden("subnet_rewrite_checkpointed", graphs.before_and_after(before, after))


@pytest.mark.parametrize("head", [False, True], ids=["block", "head"])
@pytest.mark.parametrize("name", list(CASES))
def test_same_value_and_the_block_of_the_gradient(name: str, head: bool) -> None:
    gm, plan, inputs = make(name, head)
    expected = gm(*inputs.values())
    grad = torch.randn_like(expected)
    expected.backward(grad)
    dense = {key: value.grad for key, value in inputs.items()}
    for value in inputs.values():
        value.grad = None
    rewritten = SubnetRewrite(plan)(copy_graph_module(gm)).graph_module
    state = graphs.State(inputs, plan)
    mine = rewritten(*state.arguments(rewritten, inputs))
    torch.testing.assert_close(mine, expected)
    mine.backward(grad)
    rows = torch.tensor(graphs.ROWS)
    for key, value in inputs.items():
        if key not in state.values:
            torch.testing.assert_close(value.grad, dense[key])
            continue
        assert value.grad is None  # nothing dense for a weight with a subnet
        full = dense[key]
        assert full is not None
        block = full[rows] if head else full[rows][:, torch.tensor(graphs.COLS)]
        torch.testing.assert_close(state.values[key].grad, block)


@pytest.mark.parametrize("share_body", [False, True])
def test_checkpointed_bodies_compute_the_same(share_body: bool) -> None:
    """A body that is called with two weights trains each of them."""
    size = 8
    gm = graphs.checkpointed(share_body=share_body)
    inputs = {"x": torch.randn(5, size)}
    for index in range(2):
        inputs |= {f"w_{index}": torch.randn(size, size), f"b_{index}": torch.randn(size)}
    for value in inputs.values():
        value.requires_grad_()
    x = inputs["x"]
    for index in range(2):
        x = torch.relu(F.linear(x, inputs[f"w_{index}"], inputs[f"b_{index}"]))
    x.sum().backward()
    dense = {key: value.grad for key, value in inputs.items()}
    weights = {f"w_{i}": graphs.facts(f"w_{i}", size, size) for i in range(2)}
    copy = copy_graph_module(gm)
    plan = graphs.plan_of(copy, weights)
    rewritten = SubnetRewrite(plan)(copy).graph_module
    state = graphs.State(inputs, plan)
    rows, cols = torch.tensor(graphs.ROWS), torch.tensor(graphs.COLS)
    run = torch.compile(rewritten, backend="eager")
    mine = run(*state.arguments(rewritten, inputs))
    torch.testing.assert_close(mine, x)
    for value in inputs.values():
        value.grad = None
    mine.sum().backward()
    for key, values in state.values.items():
        full = dense[key]
        assert full is not None
        torch.testing.assert_close(values.grad, full[rows][:, cols])
        assert inputs[key].grad is None


def test_no_use_is_no_change() -> None:
    gm = graphs.trace(graphs.unused)
    before = graphs.text(gm)
    result = SubnetRewrite(graphs.plan_of(gm, {"w": graphs.facts("w")}))(gm)
    assert not result.modified
    assert graphs.text(gm) == before


def test_what_is_not_planned_stays_a_linear() -> None:
    gm, plan, _ = make("two_weights")
    SubnetRewrite(plan)(gm)
    assert graphs.targets(gm) == [subnet_linear, torch.relu, F.linear]


def test_meta_stays_with_the_value() -> None:
    gm, plan, _ = make("plain")
    (node,) = gm.graph.find_nodes(op="call_function", target=F.linear)
    meta = {"example_value": torch.empty(5, OUT, device="meta"), "stack_trace": "line 7", "nn_module_stack": {"a": 1}}
    node.meta.update(meta)
    relu = gm.graph.find_nodes(op="call_function", target=torch.relu)[0]
    relu.meta["stack_trace"] = "line 8"
    SubnetRewrite(plan)(gm)
    (new,) = gm.graph.find_nodes(op="call_function", target=subnet_linear)
    assert {key: new.meta[key] for key in meta} == meta
    assert gm.graph.find_nodes(op="call_function", target=torch.relu)[0].meta["stack_trace"] == "line 8"
    assert all(node.name != "linear" or node.target is not F.linear for node in gm.graph.nodes)


def test_placeholders_come_last_in_plan_order() -> None:
    gm, _, inputs = make("two_weights")
    plan = graphs.plan_of(gm, {k: graphs.facts(k, *inputs[k].shape) for k in ("down", "up")})
    SubnetRewrite(plan)(gm)
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    assert names == ["x", "up", "down", "b", *plan.ports[0].input_names, *plan.ports[1].input_names]
    assert [port.weight for port in plan.ports] == ["down", "up"]


def test_the_original_is_untouched() -> None:
    gm = graphs.checkpointed()
    before, codes = graphs.text(gm), [m.code for m in gm.modules() if isinstance(m, fx.GraphModule)]
    plan = graphs.plan_of(gm, {"w_0": graphs.facts("w_0"), "w_1": graphs.facts("w_1")})
    copy = copy_graph_module(gm)
    SubnetRewrite(plan)(copy)
    assert subnet_linear in graphs.targets(copy)
    assert graphs.text(gm) == before
    assert [m.code for m in gm.modules() if isinstance(m, fx.GraphModule)] == codes
    assert subnet_linear not in graphs.targets(gm)


def test_the_rewrite_twice_is_refused() -> None:
    gm, plan, _ = make("plain")
    SubnetRewrite(plan)(gm)
    once = graphs.text(gm)
    with pytest.raises(PassPreconditionError):
        SubnetRewrite(plan)(gm)
    assert graphs.text(gm) == once


@pytest.mark.parametrize("node", ["relu", "no_such_node", "w"])
def test_requires_a_linear(node: str) -> None:
    gm, plan, _ = make("plain")
    wrong = dataclasses.replace(plan, sites=(dataclasses.replace(plan.sites[0], node=node),))
    before = graphs.text(gm)
    with pytest.raises(PassPreconditionError) as caught:
        SubnetRewrite(wrong)(gm)
    assert repr(node) in str(caught.value)
    assert "subnet-rewrite" in str(caught.value)
    assert plan.ports[0].facts.fqn in str(caught.value)
    assert graphs.text(gm) == before


def test_ensures_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, plan, _ = make("plain")
    monkeypatch.setattr(rewrite, "_rewrite", lambda graph, product, site, state: None)
    with pytest.raises(PassPostconditionError, match="subnet-rewrite"):
        SubnetRewrite(plan)(gm)
