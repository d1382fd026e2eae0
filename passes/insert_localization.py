"""Adds the localization node: tap before each rewritten linear; its localize comes with the linear's backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from losia_fx.ops import subnet_linear, tap
from losia_fx.plan import LinearSite, SubnetPlan

from .base import GraphPass
from .subnet_rewrite import Inputs, thread_inputs


@dataclass(frozen=True)
class InsertLocalization(GraphPass):
    """losia.subnet_linear(x, ...) -> losia.subnet_linear(x, ..., losia.tap(x, handle, call), handle, call).

    Appends one placeholder a slot, the handle, behind those of SubnetRewrite, which comes first.
    """

    name: ClassVar[str] = "insert-localization"
    plan: SubnetPlan

    def apply(self, gm: fx.GraphModule) -> int:
        return thread_inputs(gm, self.plan, lambda slot: (slot.handle_name,), self._insert)

    @staticmethod
    def _insert(graph: fx.Graph, node: fx.Node, site: LinearSite, inputs: Inputs) -> None:
        if node.target is not subnet_linear:  # SubnetRewrite was disabled: nothing to localize for
            return
        (handle,) = inputs[site.slot]
        with graph.inserting_before(node):
            ticket = graph.call_function(tap, (node.args[0], handle, site.call))
        node.args = (*node.args[:6], ticket, handle, site.call)
