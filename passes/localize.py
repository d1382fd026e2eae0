"""Adds the localization node: tap before each rewritten product; its localize comes with the product's backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from losia_fx.ops.linear import subnet_linear
from losia_fx.ops.localization import tap
from losia_fx.plan import SubnetPlan

from .base import GraphPass
from .products import Product
from .rewrite import Inputs, thread_inputs
from .rewritten import Rewritten, rewritten_from


@dataclass(frozen=True)
class InsertLocalization(GraphPass):
    """losia.subnet_linear(x, ...) -> losia.subnet_linear(x, ..., losia.tap(x, handle, call), handle, call).

    Appends one placeholder a port, the handle, behind those of SubnetRewrite, which comes first.
    """

    name: ClassVar[str] = "insert-localization"
    plan: SubnetPlan

    def apply(self, gm: fx.GraphModule) -> int:
        done = 0

        def edit(part: fx.GraphModule, body: tuple[str, ...], inputs: Inputs) -> None:
            nonlocal done
            for node in list(part.graph.nodes):
                found = rewritten_from(node)
                if found is not None:
                    _insert(part.graph, node, found, inputs[found.site.port][0])
                    done += 1

        thread_inputs(gm, self.plan, lambda port: (port.handle_name,), edit)
        return done


def _insert(graph: fx.Graph, node: fx.Node, rewritten: Rewritten, handle: fx.Node) -> None:
    call, product = rewritten.site.call, rewritten.product
    if product is None:  # a losia.subnet_weight's backward has the full gradient in its hands: no input to keep
        node.args = (*node.args[:4], handle, call)
        return
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
