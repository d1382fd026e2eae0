"""Adds the localization node: tap before each rewritten product; its localize comes with the product's backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from losia_fx.ops.linear import subnet_linear, subnet_weight
from losia_fx.ops.localization import tap
from losia_fx.plan import SubnetPlan

from .base import GraphPass
from .products import Product
from .subnet_rewrite import CALL, PRODUCT, Inputs, thread_inputs


@dataclass(frozen=True)
class InsertLocalization(GraphPass):
    """losia.subnet_linear(x, ...) -> losia.subnet_linear(x, ..., losia.tap(x, handle, call), handle, call).

    Appends one placeholder a slot, the handle, behind those of SubnetRewrite, which comes first.
    """

    name: ClassVar[str] = "insert-localization"
    plan: SubnetPlan

    def apply(self, gm: fx.GraphModule) -> int:
        slot_of = {site.call: site.slot for site in self.plan.places}
        done = 0

        def edit(part: fx.GraphModule, body: tuple[str, ...], inputs: Inputs) -> None:
            nonlocal done
            for node in list(part.graph.nodes):
                call = node.meta.get(CALL)
                if call is not None:
                    _insert(part.graph, node, call, inputs[slot_of[call]][0])
                    done += 1

        thread_inputs(gm, self.plan, lambda slot: (slot.handle_name,), edit)
        return done


def _insert(graph: fx.Graph, node: fx.Node, call: int, handle: fx.Node) -> None:
    if node.target is subnet_weight:  # its backward has the full gradient in its hands: no input to keep
        node.args = (*node.args[:4], handle, call)
        return
    product: Product = node.meta[PRODUCT]
    with graph.inserting_before(node):
        ticket = graph.call_function(tap, (node.args[0], handle, call, *_place(product)))
    given = 6 if node.target is subnet_linear or product.form == "grouped" else 5
    node.args = (*node.args[:given], ticket, handle, call)


def _place(product: Product) -> tuple[Any, ...]:
    """tap's further arguments: how the product goes with the weight as it is stored; () for a plain linear."""
    expert = product.view.expert
    index = product.offsets if product.form == "grouped" else expert if isinstance(expert, fx.Node) else None
    place = (product.form, product.transposed, expert if isinstance(expert, int) else None, index)
    return () if place == ("linear", False, None, None) else place
