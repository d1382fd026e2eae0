"""Lets a value be shaped anew whatever its order in memory turns out to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..base import GraphPass
from .graph import aten


@dataclass(frozen=True)
class LoosenViews(GraphPass):
    """view(x) -> reshape(x): no copy where a view will do.

    Some kernels (those behind softplus, elu, hardtanh, logsigmoid and others in torch 2.13) give what they make another
    order in memory than its fake tensor had, where their inputs are not contiguous or disagree. A view that was traced
    for the one order cannot be had in the other. A gradient that comes out of a product with a permuted input lies
    otherwise than in the dense graph: without this, models would fail here that run there.

    What _unsafe_view gives is nobody's view, and an output of the graph stays so: its user may change it in place.

    Runs on the joint graph of forward and backward, for compilers that run its nodes as they are.
    """

    name: ClassVar[str] = "loosen-views"

    def apply(self, gm: fx.GraphModule) -> int:
        outputs = set(gm.graph.output_node().all_input_nodes)
        done = 0
        for node in list(gm.graph.nodes):
            if node.target is aten._unsafe_view.default and node in outputs:
                done += _loosen_output(gm.graph, node)
            elif node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default
                done += 1
        return done


def _loosen_output(graph: fx.Graph, node: fx.Node) -> int:
    """_unsafe_view(x) -> _unsafe_view(reshape(x)), of one shape: such a view can always be had."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.target is aten.reshape.default and source.args[1] == node.args[1]:
        return 0
    with graph.inserting_before(node):
        shaped = graph.call_function(aten.reshape.default, node.args)
    shaped.meta.update(node.meta)
    node.update_arg(0, shaped)
    return 1
