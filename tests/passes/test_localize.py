"""tap before each rewritten linear, its ticket and handle in the linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from losia_fx.ops.linear import subnet_linear
from losia_fx.ops.localization import tap
from losia_fx.passes import InsertLocalization, SubnetRewrite, copy_graph_module
from losia_fx.plan import SubnetPlan
from losia_fx.registry import BY_HANDLE
from tests.support import graphs
from tests.support.graphs import INTO


def rewritten(function: Callable[..., object], *weights: str, size: int = INTO) -> tuple[fx.GraphModule, SubnetPlan]:
    gm = graphs.trace(function)
    plan = graphs.plan_of(gm, {name: graphs.facts(name, size, size) for name in weights})
    return SubnetRewrite(plan)(gm).graph_module, plan


@pytest.mark.parametrize("name", ["plain", "without_bias", "used_twice"])
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    gm, plan = rewritten(getattr(graphs, name), "w")
    before = graphs.text(gm)
    result = InsertLocalization(plan)(gm)
    assert result.modified
    golden(f"insert_localization_{name}", graphs.before_and_after(before, graphs.text(gm)))


def test_golden_checkpointed(golden: Callable[[str, str], None]) -> None:
    gm = copy_graph_module(graphs.checkpointed())
    plan = graphs.plan_of(gm, {"w_0": graphs.facts("w_0"), "w_1": graphs.facts("w_1")})
    SubnetRewrite(plan)(gm)
    before = graphs.text(gm)
    golden(
        "insert_localization_checkpointed",
        graphs.before_and_after(before, graphs.text(InsertLocalization(plan)(gm).graph_module)),
    )


def test_each_linear_has_a_tap_of_its_own() -> None:
    gm, plan = rewritten(graphs.used_twice, "w")
    InsertLocalization(plan)(gm)
    taps = gm.graph.find_nodes(op="call_function", target=tap)
    linears = gm.graph.find_nodes(op="call_function", target=subnet_linear)
    assert len(taps) == len(linears) == 2
    for ticket, linear in zip(taps, linears, strict=True):
        assert ticket.args[0] is linear.args[0]  # the same x
        assert linear.args[6] is ticket
        assert linear.args[7] is ticket.args[1]
        assert linear.args[8] == ticket.args[2]
    assert len({ticket.args[2] for ticket in taps}) == 2
    assert [str(n.target) for n in gm.graph.find_nodes(op="placeholder")][-1] == plan.ports[0].handle_name


def test_handles_come_behind_all_state_in_plan_order() -> None:
    gm, plan = rewritten(graphs.two_weights, "up", "down")
    InsertLocalization(plan)(gm)
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    assert names[4:] == [*(n for port in plan.ports for n in port.input_names), *(s.handle_name for s in plan.ports)]


def test_meta_is_kept() -> None:
    gm, plan = rewritten(graphs.plain, "w")
    (node,) = gm.graph.find_nodes(op="call_function", target=subnet_linear)
    node.meta["stack_trace"] = "line 7"
    InsertLocalization(plan)(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=subnet_linear)
    assert node.meta["stack_trace"] == "line 7"


def test_no_site_is_no_change() -> None:
    gm = graphs.trace(graphs.unused)
    plan = graphs.plan_of(gm, {"w": graphs.facts("w")})
    before = graphs.text(gm)
    assert not InsertLocalization(plan)(gm).modified
    assert graphs.text(gm) == before


def test_without_the_rewrite_no_tap_is_made() -> None:
    gm = graphs.trace(graphs.plain)
    plan = graphs.plan_of(gm, {"w": graphs.facts("w")})
    InsertLocalization(plan)(gm)
    assert tap not in graphs.targets(gm)


class Gatherer:
    profiling, shape = True, (INTO, INTO)

    def __init__(self) -> None:
        self.grad = torch.zeros(INTO, INTO)

    def begin_use(self) -> None:
        pass

    def accumulate(self, grad: torch.Tensor, expert: int | None, owned: bool) -> None:
        assert expert is None
        self.grad += grad


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_the_full_gradient_of_a_weight_used_twice(compiler: str) -> None:
    gm, plan = rewritten(graphs.used_twice, "w")
    InsertLocalization(plan)(gm)
    inputs = {"x": torch.randn(5, INTO), "w": torch.randn(INTO, INTO, requires_grad=True)}
    graphs.used_twice(*inputs.values()).sum().backward()
    gatherer = BY_HANDLE[10**9 + 1] = Gatherer()
    state = graphs.State(inputs, plan, handle=10**9 + 1)
    run = torch.compile(gm, backend=compiler, fullgraph=True)
    run(*state.arguments(gm, inputs)).sum().backward()
    torch.testing.assert_close(gatherer.grad, inputs["w"].grad)
