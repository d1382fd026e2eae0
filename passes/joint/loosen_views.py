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

    Runs on the joint graph of forward and backward, for compilers that run its nodes as they are.
    """

    name: ClassVar[str] = "loosen-views"

    def apply(self, gm: fx.GraphModule) -> int:
        found = [node for node in gm.graph.nodes if node.target in (aten.view.default, aten._unsafe_view.default)]
        for node in found:
            node.target = aten.reshape.default
        return len(found)
