"""Where each node of a graph belongs: the module that made it, and the weight whose product it is or is part of.

Kept in the node's meta, so that a graph tells it by itself, under the keys below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from losia_fx._compat import input_index
from losia_fx.model.blocks import plain_name
from losia_fx.passes import placeholders, region_of
from losia_fx.plan import ProductSite, SubnetPlan, WholeSite

OWNER = "losia_owner"
"""Dotted name of the module whose code the node comes from; "" for the root's own and for what belongs to none."""
WEIGHT = "losia_weight"
"""Of a placeholder: the name in the model of the parameter or buffer that arrives there, or, of a subnet's state, that
of its weight. Of any other node: the weight whose product it is part of, if that weight has a subnet."""
GROUP = "losia_group"
"""Number of that weight's group."""
STATUS = "losia_status"
"""PLANNED, REWRITTEN, ADDED or PART; missing on nodes that no pass has to do with."""
PLANNED, REWRITTEN, ADDED, PART = "planned", "rewritten", "added", "part"
"""To be rewritten; made by a rewrite (or fed by one); put there by a pass; after AOTAutograd, part of such a node."""
MARK = "losia_site"
"""Key in meta["custom"], which torch hands on from a node to what is made of it: the number of a site in the plan."""
CALL = "losia_call"
"""losia_fx.passes puts the same number into the meta of a node that a rewrite has made."""


@dataclass(frozen=True)
class Names:
    """Names in the model by the identity of what they name."""

    modules: Mapping[int, str]
    tensors: Mapping[int, str]

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        modules = {id(module): plain_name(name) for name, module in model.named_modules()}
        tensors = {id(t): plain_name(name) for name, t in (*model.named_parameters(), *model.named_buffers())}
        return cls(modules, tensors)

    def of_inputs(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, str]:
        """Placeholder -> name of the parameter or buffer that arrives there."""
        pairs = zip(placeholders(gm), inputs, strict=True)
        return {node.name: self.tensors[id(value)] for node, value in pairs if id(value) in self.tensors}

    def owner(self, node: fx.Node) -> str | None:
        """Of the node's innermost module; None where the node does not say."""
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
        if not stack:
            return None
        key, entry = list(stack.items())[-1]
        known = self.modules.get(int(number)) if (number := str(key).partition("@")[0]).isdigit() else None
        return known if known is not None else str(entry[0])


def weight_groups(groups: Iterable[Iterable[str]]) -> dict[str, int]:
    return {name: number for number, names in enumerate(groups) for name in names}


def mark_sites(gm: fx.GraphModule, plan: SubnetPlan) -> None:
    """Marks the nodes that are to be rewritten, or that a rewrite has made, so that AOTAutograd hands the mark on."""
    for part, body in graph_parts(gm):
        sites = _sites(plan, body)
        for node in part.graph.nodes:
            call = node.meta.get(CALL, sites.get(node.name))
            if call is not None:
                node.meta["custom"] = {**node.meta.get("custom", {}), MARK: call}


def annotate(
    gm: fx.GraphModule,
    names: Names,
    fqns: Mapping[str, str],
    plan: SubnetPlan,
    groups: Mapping[str, int],
    before: fx.GraphModule | None = None,
    given: Sequence[fx.Node] = (),
) -> None:
    """Fills in OWNER, WEIGHT, GROUP and STATUS of every node.

    fqns: placeholder -> name, of a graph of Dynamo's. before: of one that passes have edited, the graph before them.
    given: for a graph of AOTAutograd's, the annotated placeholders of the graph that it was made of.
    """
    state = {name: slot.facts.fqn for slot in plan.slots for name in (*slot.input_names, slot.handle_name)}
    known = {**fqns, **state}
    for holder in placeholders(gm):
        index = input_index(holder)
        if index is not None and index < len(given):
            _copy_place(given[index], holder)
        elif holder.name in known:
            _place(holder, known[holder.name].rpartition(".")[0], known[holder.name], groups)
    for part, _ in graph_parts(gm):
        _describe_state(part, plan)
    weights = [plan.slots[site.slot].facts.fqn for site in sorted(plan.places, key=lambda site: site.call)]
    known_nodes = (
        None if before is None else {body: {n.name for n in part.graph.nodes} for part, body in graph_parts(before)}
    )
    for part, body in graph_parts(gm):
        sites = _sites(plan, body)
        _annotate_nodes(part, names, sites, weights, groups)
        for node in part.graph.nodes:
            status = _status(node, sites, None if known_nodes is None else known_nodes.get(body, set()))
            if status is not None:
                node.meta[STATUS] = status


def _status(node: fx.Node, sites: Mapping[str, int], known: set[str] | None) -> str | None:
    if CALL in node.meta:
        return REWRITTEN
    if node.name in sites:
        return PLANNED if known is None else REWRITTEN
    if MARK in node.meta.get("custom", {}):
        return PART
    return ADDED if known is not None and node.name not in known else None


def _describe_state(part: fx.GraphModule, plan: SubnetPlan) -> None:
    """Shape and dtype of the subnets' placeholders, which the passes have no tensor for."""
    described: dict[str, torch.Tensor] = {}
    for slot in plan.slots:
        facts = slot.facts
        values, rows, cols = (facts.rows, facts.cols), (facts.rows,), (facts.cols,)
        experts = facts.shape[:-2]
        described[slot.handle_name] = torch.empty(1, dtype=torch.int64, device="meta")
        for name, shape in zip(slot.input_names, (values, rows, cols), strict=False):
            dtype = getattr(torch, facts.dtype) if shape == values else torch.int64
            described[name] = torch.empty((*experts, *shape), dtype=dtype, device="meta")
    for holder in placeholders(part):
        if holder.name in described:
            holder.meta.setdefault("example_value", described[holder.name])


def _annotate_nodes(
    part: fx.GraphModule, names: Names, sites: Mapping[str, int], weights: Sequence[str], groups: Mapping[str, int]
) -> None:
    for node in reversed(part.graph.nodes):
        region = region_of(part, node)
        if region is not None:
            for inner, outer in region.passed():
                _copy_place(outer, inner)
        call = node.meta.get("custom", {}).get(MARK, node.meta.get(CALL, sites.get(node.name)))
        if OWNER in node.meta:
            continue
        owner = names.owner(node)
        if call is not None:
            _place(node, owner, weights[call], groups)
        elif owner is None and node.op == "call_function" and not node.meta.get("stack_trace") and node.users:
            _copy_place(next(iter(node.users)), node)  # put there by a pass, for the node that uses it
        else:
            node.meta[OWNER] = owner or ""


def _place(node: fx.Node, owner: str | None, weight: str, groups: Mapping[str, int]) -> None:
    node.meta[OWNER] = weight.rpartition(".")[0] if owner is None else owner
    node.meta[WEIGHT] = weight
    if weight in groups:
        node.meta[GROUP] = groups[weight]


def _copy_place(source: fx.Node, target: fx.Node) -> None:
    for key in (OWNER, WEIGHT, GROUP):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def graph_parts(gm: fx.GraphModule, body: tuple[str, ...] = ()) -> Iterable[tuple[fx.GraphModule, tuple[str, ...]]]:
    """Every graph, outer ones first, and the names of the bodies that lead there."""
    yield gm, body
    for node in gm.graph.nodes:
        region = region_of(gm, node)
        if region is not None:
            yield from graph_parts(region.body, (*body, region.name))


def _sites(plan: SubnetPlan, body: tuple[str, ...]) -> dict[str, int]:
    """Node -> number of the site, for the nodes of one body that are planned to be rewritten."""
    found: dict[str, int] = {}
    for site in plan.places:
        if site.body == body:
            for name in _nodes_of(site):
                found.setdefault(name, site.call)
    return found


def _nodes_of(site: ProductSite | WholeSite) -> tuple[str, ...]:
    return (site.node,) if isinstance(site, ProductSite) else site.users
