"""linear -> losia.subnet_linear: the same value, the gradient to S instead of W."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from losia_fx.errors import PassPostconditionError, PassPreconditionError
from losia_fx.ops import subnet_linear
from losia_fx.plan import LinearSite, SubnetPlan, SubnetSlot

from .base import GraphPass, append_placeholders, checkpoint_body
from .match_linear import is_linear, linear_arguments

Inputs = dict[int, tuple[fx.Node, ...]]

SITE = "losia_site"
"""Key in a node's meta: the name that the plan knows it by, for the passes after the one that replaced it."""


def thread_inputs(
    gm: fx.GraphModule,
    plan: SubnetPlan,
    names: Callable[[SubnetSlot], Iterable[str]],
    edit: Callable[[fx.Graph, fx.Node, LinearSite, Inputs], None],
) -> int:
    """Gives the graph new placeholders for every slot, hands them on to the bodies that need them, and edits each site.

    Returns the number of sites.
    """
    inputs = {slot.index: tuple(append_placeholders(gm.graph, names(slot))) for slot in plan.slots}
    _thread(gm, (), plan, names, edit, inputs)
    return len(plan.sites)


def _thread(
    gm: fx.GraphModule,
    body: tuple[str, ...],
    plan: SubnetPlan,
    names: Callable[[SubnetSlot], Iterable[str]],
    edit: Callable[[fx.Graph, fx.Node, LinearSite, Inputs], None],
    inputs: Inputs,
) -> None:
    sites = {site.node: site for site in plan.sites_in(body)}
    for node in list(gm.graph.nodes):
        site = sites.get(node.meta.get(SITE, node.name))
        if site is not None:
            edit(gm.graph, node, site, inputs)
        nested = checkpoint_body(gm, node)
        if nested is None:
            continue
        inner = (*body, nested[0])
        used = sorted({site.slot for site in plan.sites if site.body[: len(inner)] == inner})
        if not used:
            continue
        child = nested[1]
        own = {slot: tuple(append_placeholders(child.graph, names(plan.slots[slot]))) for slot in used}
        node.args = (*node.args, *(holder for slot in used for holder in inputs[slot]))
        _thread(child, inner, plan, names, edit, own)


@dataclass(frozen=True)
class SubnetRewrite(GraphPass):
    """linear(x, W, b) -> losia.subnet_linear(x, W, S, rows, cols, b).

    Appends placeholders for S, rows and cols a slot, behind the last one, in plan order.
    Raises PassPreconditionError where a planned node is no linear of this graph.
    """

    name: ClassVar[str] = "subnet-rewrite"
    plan: SubnetPlan

    def requires(self, gm: fx.GraphModule) -> None:
        for site in self.plan.sites:
            graph = _body(gm, site.body).graph
            if not any(node.name == site.node and is_linear(node) for node in graph.nodes):
                fqn = self.plan.slots[site.slot].facts.fqn
                raise PassPreconditionError(f"{self.name}: {fqn}: node {site.node!r} is no linear of this graph")

    def apply(self, gm: fx.GraphModule) -> int:
        return thread_inputs(gm, self.plan, lambda slot: slot.input_names, self._rewrite)

    def ensures(self, gm: fx.GraphModule) -> None:
        for body in {site.body for site in self.plan.sites}:
            count = len(_body(gm, body).graph.find_nodes(op="call_function", target=subnet_linear))
            if count != len(self.plan.sites_in(body)):
                raise PassPostconditionError(
                    f"{self.name}: {count} rewritten nodes in {'.'.join(body) or 'the graph'}, "
                    f"{len(self.plan.sites_in(body))} planned"
                )

    @staticmethod
    def _rewrite(graph: fx.Graph, node: fx.Node, site: LinearSite, inputs: Inputs) -> None:
        x, weight, bias = linear_arguments(node)
        values, rows, *cols = inputs[site.slot]
        with graph.inserting_before(node):
            new = graph.call_function(subnet_linear, (x, weight, values, rows, cols[0] if cols else None, bias))
        # Same value, same meta: example_value, stack_trace and nn_module_stack stay true.
        new.meta = {**node.meta, SITE: site.node}
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _body(gm: fx.GraphModule, path: tuple[str, ...]) -> fx.GraphModule:
    for name in path:
        child = gm.get_submodule(name)
        assert isinstance(child, fx.GraphModule)
        gm = child
    return gm
