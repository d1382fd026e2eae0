"""Products of a weight -> losia.subnet_*: the same value, the gradient to S instead of W."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from losia_fx.errors import PassPostconditionError, PassPreconditionError
from losia_fx.ops.experts import subnet_batched, subnet_grouped
from losia_fx.ops.linear import subnet_linear, subnet_weight
from losia_fx.plan import ProductSite, SubnetPlan, SubnetPort, WholeSite

from .base import GraphPass, append_placeholders, placeholders, region_of
from .products import Product, find_products, renewed
from .rewritten import Rewritten, note, rewritten_nodes
from .views import Permutation

Inputs = dict[int, tuple[fx.Node, ...]]
"""The placeholders of each port's state in one body."""
Edit = Callable[[fx.GraphModule, tuple[str, ...], Inputs], None]
"""Edits one body, given its place and the state's placeholders there."""


def thread_inputs(
    gm: fx.GraphModule, plan: SubnetPlan, names: Callable[[SubnetPort], Iterable[str]], edit: Edit
) -> None:
    """Gives the graph new placeholders for every port, hands them on to the bodies that need them, and edits each."""
    _thread(gm, (), plan, names, edit, [port.index for port in plan.ports])


def _thread(
    gm: fx.GraphModule,
    body: tuple[str, ...],
    plan: SubnetPlan,
    names: Callable[[SubnetPort], Iterable[str]],
    edit: Edit,
    ports: list[int],
) -> None:
    inputs = {port: tuple(append_placeholders(gm.graph, names(plan.ports[port]))) for port in ports}
    for node in list(gm.graph.nodes):
        region = region_of(gm, node)
        if region is None:
            continue
        inner = (*body, region.name)
        used = plan.ports_within(inner)
        if used:
            node.args = (*node.args, *(holder for port in used for holder in inputs[port]))
            _thread(region.body, inner, plan, names, edit, used)
            outputs_may_learn(region.body)
    edit(gm, body, inputs)


def outputs_may_learn(body: fx.GraphModule) -> None:
    """Forgets which outputs of a region asked for no gradient: with frozen weights none did, with a subnet they do.

    torch.compiler.nested_compile_region goes by that.
    """
    for node in body.graph.output_node().all_input_nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
            del node.meta["example_value"]


@dataclass(frozen=True)
class SubnetRewrite(GraphPass):
    """linear(x, W, b) -> losia.subnet_linear(x, W, S, rows, cols, b), and so on for every product of a planned weight;
    whatever else takes W takes losia.subnet_weight(W, S, rows, cols) instead.

    Appends placeholders for S, rows and cols a port, behind the last one, in plan order.
    Raises PassPreconditionError where a planned node is no product of its weight in this graph.
    """

    name: ClassVar[str] = "subnet-rewrite"
    plan: SubnetPlan

    def requires(self, gm: fx.GraphModule) -> None:
        found = self._products(gm)
        for site in self.plan.sites:
            if site.call not in found:
                fqn = self.plan.ports[site.port].facts.fqn
                raise PassPreconditionError(f"{self.name}: {fqn}: node {site.node!r} is no product of it in this graph")
        for whole in self.plan.whole:
            names = {node.name for node in _body(gm, whole.body).graph.nodes}
            missing = [name for name in (whole.holder, *whole.users) if name not in names]
            if missing:
                fqn = self.plan.ports[whole.port].facts.fqn
                raise PassPreconditionError(f"{self.name}: {fqn}: this graph has no node {missing[0]!r} that uses it")

    def apply(self, gm: fx.GraphModule) -> int:
        found = self._products(gm)

        def edit(part: fx.GraphModule, body: tuple[str, ...], inputs: Inputs) -> None:
            for whole in self.plan.whole:
                if whole.body == body:
                    _take_whole(part.graph, whole, inputs[whole.port])
            for site in self.plan.sites:
                if site.body == body:
                    _rewrite(part.graph, renewed(found[site.call]), site, inputs[site.port])

        thread_inputs(gm, self.plan, lambda port: port.input_names, edit)
        return len(self.plan.sites) + len(self.plan.whole)

    def _holders(self, gm: fx.GraphModule) -> dict[tuple[tuple[str, ...], int], list[str]]:
        """(body, port) -> names of the placeholders that stand for the port's weight there."""
        found: dict[tuple[tuple[str, ...], int], list[str]] = {}
        for port in self.plan.ports:
            todo: list[tuple[tuple[str, ...], fx.GraphModule, fx.Node]]
            todo = [((), gm, node) for node in placeholders(gm) if node.name == port.weight]
            while todo:
                body, part, holder = todo.pop()
                found.setdefault((body, port.index), []).append(holder.name)
                for region in filter(None, (region_of(part, user) for user in holder.users)):
                    inside = (*body, region.name)
                    todo += [(inside, region.body, inner) for inner, outer in region.passed() if outer is holder]
        return found

    def _products(self, gm: fx.GraphModule) -> dict[int, Product]:
        """The planned products that are in the graph, by the call of their site."""
        holders = self._holders(gm)
        whole = {(site.body, site.port, user) for site in self.plan.whole for user in site.users}
        found: dict[int, Product] = {}
        for site in self.plan.sites:
            names = holders.get((site.body, site.port), [])
            for holder in _body(gm, site.body).graph.find_nodes(op="placeholder"):
                if holder.name in names:
                    products, _ = find_products(holder, self.plan.ports[site.port].facts.dims)
                    # of a weight multiplied with itself there are two for one node
                    mine = [p for p in products if (site.body, site.port, p.branch.name) not in whole]
                    found.update((site.call, product) for product in mine if product.node.name == site.node)
        return found

    def ensures(self, gm: fx.GraphModule) -> None:
        done = Counter(body for body, _, _ in rewritten_nodes(gm))
        for body, planned in Counter(site.body for site in self.plan.places).items():
            if done[body] != planned:
                raise PassPostconditionError(
                    f"{self.name}: {done[body]} rewritten nodes in {'.'.join(body) or 'the graph'}, {planned} planned"
                )


def _take_whole(graph: fx.Graph, site: WholeSite, state: tuple[fx.Node, ...]) -> None:
    """The users get the weight by losia.subnet_weight."""
    nodes = {node.name: node for node in graph.nodes}
    weight = nodes[site.holder]
    values, rows, *cols = state
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        whole = graph.call_function(subnet_weight, (weight, values, rows, cols[0] if cols else None))
    whole.meta = dict(weight.meta)
    note(whole, Rewritten(site, None))
    for user in site.users:
        nodes[user].replace_input_with(weight, whole)


def _rewrite(graph: fx.Graph, product: Product, site: ProductSite, state: tuple[fx.Node, ...]) -> None:
    node = product.node
    with graph.inserting_before(node):
        values, rows, cols = _oriented(graph, product, state)
        weight = _swapped(graph, product.view.node) if product.flipped else product.view.node
        x = _permuted(graph, product.x, product.before)
        if product.form == "linear":
            new = graph.call_function(subnet_linear, (x, weight, values, rows, cols, product.bias))
        elif product.form == "grouped":
            new = graph.call_function(subnet_grouped, (x, weight, values, rows, cols, product.offsets))
        else:
            new = graph.call_function(subnet_batched, (x, weight, values, rows, cols))
        result = _lying_like(graph, node, _permuted(graph, new, product.after)) if product.after else new
    # Same value, same meta: example_value, stack_trace and nn_module_stack stay true.
    result.meta = dict(node.meta)
    new.meta = dict(node.meta)
    if result is not new:
        new.meta.pop("example_value", None)
    note(new, Rewritten(site, product))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _oriented(graph: fx.Graph, product: Product, state: tuple[fx.Node, ...]) -> list[fx.Node | None]:
    """S, rows and cols as the normal form wants them: of the chosen experts, and transposed where the weight is."""
    parts: list[fx.Node | None] = [*state, *([None] * (3 - len(state)))]
    expert = product.view.expert
    if expert is not None:
        parts = [part and graph.call_function(operator.getitem, (part, expert)) for part in parts]
    values, rows, cols = parts
    if not product.transposed:
        return [values, rows, cols]
    assert values is not None
    return [_swapped(graph, values), cols, rows]


def _swapped(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_method("transpose", (node, -2, -1))


def _permuted(graph: fx.Graph, node: fx.Node, order: Permutation | None) -> fx.Node:
    moves = order is not None and order != tuple(range(len(order)))
    return graph.call_method("permute", (node, order)) if moves else node


def _lying_like(graph: fx.Graph, dense: fx.Node, node: fx.Node) -> fx.Node:
    """``node`` with its dimensions in the order in memory that those of the dense product have, where the tracer says.

    Dynamo has traced what follows for that order: a view() of the product, say, cannot be had in every other.
    """
    value = dense.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return node
    order = tuple(sorted(range(value.dim()), key=value.stride, reverse=True))
    back = tuple(order.index(dim) for dim in range(value.dim()))
    outermost_first = _permuted(graph, node, order)
    return _permuted(graph, graph.call_method("contiguous", (outermost_first,)), back)


def _body(gm: fx.GraphModule, path: tuple[str, ...]) -> fx.GraphModule:
    child: Any = gm
    for name in path:
        child = child.get_submodule(name)
    assert isinstance(child, fx.GraphModule)
    return child
