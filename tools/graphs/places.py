"""Where each node of a graph belongs: the module that made it, and the weight whose product it is or is part of.

Kept in the node's meta, so that a graph, and every copy of it, tells it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from losia_fx._compat import input_index
from losia_fx.method.packing import DTYPES
from losia_fx.model.blocks import plain_name
from losia_fx.passes import bodies, placeholders, region_of, rewritten_from
from losia_fx.plan import ProductSite, SubnetPlan

PLANNED, REWRITTEN, ADDED, REMADE, PART = "planned", "rewritten", "added", "remade", "part"
"""Of a node: to be rewritten; made, fed or changed by a rewrite; put there by a pass; to be made again in the backward
because a pass says so; after AOTAutograd, part of what was rewritten."""

_PLACE = "losia_place"
_MARK = "losia_site"
"""Key in meta["custom"], which torch hands on from a node to what is made of it: the number of a site in the plan."""


@dataclass(frozen=True)
class Place:
    """Where a node belongs."""

    owner: str = ""
    """Dotted name of the module whose code the node comes from; "" for the root's own and for what belongs to none."""
    weight: str = ""
    """Of a placeholder: the name in the model of the parameter or buffer that arrives there, or, of a subnet's state,
    that of its weight. Of any other node: the weight whose product it is part of, if that weight has a subnet."""
    group: int = -1
    """Number of that weight's group; -1 where it has none."""
    status: str = ""
    """PLANNED, REWRITTEN, ADDED, REMADE or PART; "" of nodes that no pass has to do with."""


def place_of(node: fx.Node) -> Place | None:
    """None where nobody has said."""
    found: Place | None = node.meta.get(_PLACE)
    return found


def weight_of(node: fx.Node) -> str:
    """Place.weight; "" where there is none."""
    return (place_of(node) or Place()).weight


@dataclass(frozen=True)
class ModelNames:
    """Names in the model by the identity of what they name."""

    modules: Mapping[int, str]
    tensors: Mapping[int, str]

    @classmethod
    def of(cls, model: nn.Module) -> ModelNames:
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


@dataclass(frozen=True)
class Annotator:
    """Gives every node of a graph its place, at any stage of that graph."""

    names: ModelNames
    plan: SubnetPlan
    groups: Mapping[str, int]
    """Weight -> number of its group."""

    def mark_sites(self, gm: fx.GraphModule) -> None:
        """Marks the nodes that are to be rewritten, or that a rewrite has made, so that AOTAutograd hands it on."""
        for path, part in bodies(gm):
            planned = self._planned(path)
            for node in part.graph.nodes:
                call = _call_of(node, planned)
                if call is not None:
                    node.meta["custom"] = {**node.meta.get("custom", {}), _MARK: call}

    def annotate_forward(
        self, gm: fx.GraphModule, fqns: Mapping[str, str], before: fx.GraphModule | None = None
    ) -> None:
        """A graph of Dynamo's. fqns: placeholder -> name; before: of one that passes have edited, the graph as it
        was."""
        state = {name: port.facts.fqn for port in self.plan.ports for name in port.state_names}
        for holder in placeholders(gm):
            weight = state.get(holder.name, fqns.get(holder.name))
            if weight is not None:
                self._put(holder, None, weight)
        old = None if before is None else {path: {n.name for n in part.graph.nodes} for path, part in bodies(before)}
        for path, part in bodies(gm):
            _describe_state(part, self.plan)
            planned = self._planned(path)
            self._fill(part, partial(_call_of, planned=planned))
            for node in part.graph.nodes:
                if rewritten_from(node) is not None or (node.name in planned and old is not None):
                    _set_status(node, REWRITTEN)
                elif node.name in planned:
                    _set_status(node, PLANNED)
                elif old is not None and node.name not in old.get(path, ()):
                    _set_status(node, ADDED)

    def annotate_traced(
        self, gm: fx.GraphModule, given: Sequence[fx.Node], before: fx.GraphModule | None = None
    ) -> None:
        """A graph of AOTAutograd's. given: the annotated placeholders of the graph that it was made of; before: of one
        that passes have edited, the graph as it was."""
        for holder in placeholders(gm):
            index = input_index(holder)
            if index is not None and index < len(given):
                _copy_place(given[index], holder)
        for _, part in bodies(gm):
            self._fill(part, _handed_on)
        for _, part in bodies(gm):
            for node in part.graph.nodes:
                if _handed_on(node) is not None:
                    _set_status(node, PART)
        if before is not None:
            _say_what_changed(before, gm)

    def _planned(self, path: tuple[str, ...]) -> dict[str, int]:
        """Node -> number of the site, for the nodes of one body that are planned to be rewritten."""
        found: dict[str, int] = {}
        for site in self.plan.places:
            if site.body == path:
                for name in (site.node,) if isinstance(site, ProductSite) else site.users:
                    found.setdefault(name, site.call)
        return found

    def _fill(self, part: fx.GraphModule, call_of: Callable[[fx.Node], int | None]) -> None:
        """Places the nodes that have none yet. call_of: the number of the site that a node is, or is made of."""
        weights = {site.call: self.plan.ports[site.port].facts.fqn for site in self.plan.places}
        for node in reversed(part.graph.nodes):
            region = region_of(part, node)
            if region is not None:
                for inner, outer in region.passed():
                    _copy_place(outer, inner)
            if place_of(node) is not None:
                continue
            owner, call = self.names.owner(node), call_of(node)
            if call is not None:
                self._put(node, owner, weights[call])
            elif owner is None and node.op == "call_function" and not node.meta.get("stack_trace") and node.users:
                _copy_place(next(iter(node.users)), node)  # put there by a pass, for the node that uses it
            else:
                node.meta[_PLACE] = Place(owner or "")

    def _put(self, node: fx.Node, owner: str | None, weight: str) -> None:
        owner = weight.rpartition(".")[0] if owner is None else owner
        node.meta[_PLACE] = Place(owner, weight, self.groups.get(weight, -1))


def _call_of(node: fx.Node, planned: Mapping[str, int]) -> int | None:
    found = rewritten_from(node)
    return planned.get(node.name) if found is None else found.site.call


def _handed_on(node: fx.Node) -> int | None:
    """The mark of the node that AOTAutograd made this one of."""
    call: int | None = node.meta.get("custom", {}).get(_MARK)
    return call


def _set_status(node: fx.Node, status: str) -> None:
    node.meta[_PLACE] = replace(place_of(node) or Place(), status=status)


def _say_what_changed(before: fx.GraphModule, after: fx.GraphModule) -> None:
    old = {node.name: node for node in before.graph.nodes}
    for node in after.graph.nodes:
        was = old.get(node.name)
        if was is None:
            _set_status(node, ADDED)
        elif was.target != node.target:
            _set_status(node, REWRITTEN)
        elif "recompute" in node.meta and "recompute" not in was.meta:  # torch's key: the cut goes by it
            _set_status(node, REMADE)


def _copy_place(source: fx.Node, target: fx.Node) -> None:
    place = place_of(source)
    if place is not None:
        target.meta[_PLACE] = replace(place, status="")


def _describe_state(part: fx.GraphModule, plan: SubnetPlan) -> None:
    """Shape and dtype of the subnets' placeholders, which the passes have no tensor for."""
    described: dict[str, torch.Tensor] = {}
    for port in plan.ports:
        facts = port.facts
        values, rows, cols = (facts.rows, facts.cols), (facts.rows,), (facts.cols,)
        experts = facts.shape[:-2]
        described[port.handle_name] = torch.empty(1, dtype=torch.int64, device="meta")
        packed, scales = port.packed_names
        described[packed] = torch.empty(facts.shape, dtype=DTYPES[facts.packed or "int8"], device="meta")
        described[scales] = torch.empty(facts.shape[0], 1, device="meta")
        for name, shape in zip(port.input_names, (values, rows, cols), strict=False):
            dtype = getattr(torch, facts.dtype) if shape == values else torch.int64
            described[name] = torch.empty((*experts, *shape), dtype=dtype, device="meta")
    for holder in placeholders(part):
        if holder.name in described:
            holder.meta.setdefault("example_value", described[holder.name])
