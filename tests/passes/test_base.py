"""GraphPass and PassPipeline, and the copy that every pass works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from losia_fx import PassPostconditionError, PassPreconditionError
from losia_fx.passes import GraphPass, PassPipeline, copy_graph_module
from tests.support import graphs


@dataclass(frozen=True)
class Swap(GraphPass):
    """relu -> the function given."""

    name: ClassVar[str] = "swap"
    to: Callable[..., torch.Tensor]

    def apply(self, gm: fx.GraphModule) -> int:
        found = gm.graph.find_nodes(op="call_function", target=torch.relu)
        for node in found:
            node.target = self.to
        return len(found)


class Needy(Swap):
    name: ClassVar[str] = "needy"

    def requires(self, gm: fx.GraphModule) -> None:
        raise PassPreconditionError("needy: no")


class Boastful(Swap):
    name: ClassVar[str] = "boastful"

    def ensures(self, gm: fx.GraphModule) -> None:
        raise PassPostconditionError("boastful: no")


@dataclass(frozen=True)
class Breaker(GraphPass):
    """Leaves a graph that is not valid."""

    name: ClassVar[str] = "breaker"

    def apply(self, gm: fx.GraphModule) -> int:
        first = next(iter(gm.graph.nodes))
        (relu,) = gm.graph.find_nodes(op="call_function", target=torch.relu)
        first.prepend(relu)
        return 1


def test_a_pass_edits_and_recompiles() -> None:
    gm = graphs.trace(graphs.plain)
    result = Swap(torch.sigmoid)(gm)
    assert result.modified
    assert result.graph_module is gm
    x, w, b = torch.randn(2, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(gm(x, w, b), torch.sigmoid(F.linear(x, w, b)))


def test_a_pass_without_a_match_changes_nothing() -> None:
    gm = graphs.trace(graphs.without_bias)
    before = graphs.text(gm)
    assert not Swap(torch.sigmoid)(gm).modified
    assert graphs.text(gm) == before


def test_requires_comes_first() -> None:
    gm = graphs.trace(graphs.plain)
    before = graphs.text(gm)
    with pytest.raises(PassPreconditionError, match="needy"):
        Needy(torch.sigmoid)(gm)
    assert graphs.text(gm) == before


def test_ensures_comes_last() -> None:
    gm = graphs.trace(graphs.plain)
    with pytest.raises(PassPostconditionError, match="boastful"):
        Boastful(torch.sigmoid)(gm)
    assert torch.sigmoid in graphs.targets(gm)


def test_a_broken_graph_does_not_get_through() -> None:
    with pytest.raises(RuntimeError):
        Breaker()(graphs.trace(graphs.plain))


def test_the_representation_is_the_log_line() -> None:
    assert repr(Swap(torch.sigmoid)).startswith("Swap(to=")


def test_the_pipeline_runs_in_order_and_shows_each_graph() -> None:
    gm = graphs.trace(graphs.plain)
    seen: list[tuple[str, bool]] = []

    def observe(name: str, graph: fx.GraphModule) -> None:
        seen.append((name, torch.sigmoid in graphs.targets(graph)))

    assert PassPipeline((Swap(torch.relu), Swap(torch.sigmoid)), observe=observe)(gm).modified
    assert seen == [("swap", False), ("swap", True)]


def test_passes_are_left_out_by_name() -> None:
    gm = graphs.trace(graphs.plain)
    seen: list[str] = []
    pipeline = PassPipeline(
        (Swap(torch.sigmoid), Needy(torch.tanh)),
        disabled=frozenset({"needy"}),
        observe=lambda name, _: seen.append(name),
    )
    assert pipeline(gm).modified
    assert seen == ["swap"]
    everything = PassPipeline((Swap(torch.tanh),), disabled=frozenset({"swap"}))
    assert not everything(graphs.trace(graphs.plain)).modified


def test_torchs_own_pass_manager_runs_a_pass() -> None:
    from torch.fx.passes.infra.pass_manager import PassManager

    gm = graphs.trace(graphs.plain)
    result = PassManager([Swap(torch.sigmoid)])(gm)
    assert result is not None
    assert torch.sigmoid in graphs.targets(result.graph_module)


def test_a_copy_shares_tensors_and_nothing_else() -> None:
    gm = graphs.checkpointed(share_body=True)
    gm.register_buffer("table", torch.randn(3))
    copy = copy_graph_module(gm)
    before = graphs.text(gm)
    bodies = [name for name, m in copy.named_modules() if isinstance(m, fx.GraphModule) and name]
    assert len(bodies) == 2  # one a region, though they shared one
    for module in copy.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=torch.relu):
                node.target = torch.sigmoid
            module.recompile()
    assert graphs.text(gm) == before
    assert torch.relu not in graphs.targets(copy)


def test_a_copy_keeps_the_meta_of_the_output() -> None:
    gm = graphs.trace(graphs.plain)
    (output,) = gm.graph.find_nodes(op="output")
    output.meta["stack_trace"] = "line 9"
    (copied,) = copy_graph_module(gm).graph.find_nodes(op="output")
    assert copied.meta["stack_trace"] == "line 9"


def test_a_copy_keeps_meta_and_values() -> None:
    gm = graphs.trace(graphs.plain)
    for node in gm.graph.nodes:
        node.meta["stack_trace"] = node.name
    gm.meta["mine"] = 1
    copy = copy_graph_module(gm)
    values = [node for node in copy.graph.nodes if node.op != "output"]
    assert [node.meta["stack_trace"] for node in values] == [node.name for node in values]
    assert [node.name for node in copy.graph.nodes] == [node.name for node in gm.graph.nodes]
    assert copy.meta["mine"] == 1
    inputs = torch.randn(2, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(copy(*inputs), gm(*inputs))
