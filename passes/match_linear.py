"""Analysis: which nodes use which parameter, and the plan that follows. Edits nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx

from losia_fx.plan import LeftAlone, LinearSite, SubnetFacts, SubnetPlan, SubnetSlot

from .base import checkpoint_body, placeholders


@dataclass(frozen=True)
class Use:
    """A node that takes a graph's input directly."""

    holder: str
    """Name of the outermost graph's placeholder."""
    node: str
    body: tuple[str, ...]
    linear: bool
    """The input is the weight of this F.linear, and nothing else of it."""
    target: str


def linear_arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """x, weight and bias of an F.linear node, from args or kwargs."""
    names = dict(zip(("input", "weight", "bias"), node.args, strict=False))
    found = {**names, **node.kwargs}
    x, weight, bias = found["input"], found["weight"], found.get("bias")
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    assert bias is None or isinstance(bias, fx.Node)
    return x, weight, bias


def is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is F.linear


def find_uses(gm: fx.GraphModule) -> list[Use]:
    """Every use of every input of the graph, those inside checkpointed bodies included, in graph order."""
    return _uses(gm, (), {node: node.name for node in placeholders(gm)})


def _uses(gm: fx.GraphModule, body: tuple[str, ...], origin: Mapping[fx.Node, str]) -> list[Use]:
    found = []
    for node in gm.graph.nodes:
        nested = checkpoint_body(gm, node)
        if nested is not None:
            name, child = nested
            passed = zip(placeholders(child), node.args[1:], strict=False)
            inner = {holder: origin[outer] for holder, outer in passed if outer in origin}
            found += _uses(child, (*body, name), inner)
            continue
        for used in node.all_input_nodes:
            if used in origin and node.op != "placeholder":
                linear = is_linear(node) and [arg is used for arg in linear_arguments(node)] == [False, True, False]
                found.append(Use(origin[used], node.name, body, linear, _name_of(node)))
    return found


def _name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def plan_subnets(gm: fx.GraphModule, uses: Sequence[Use], facts: Mapping[str, SubnetFacts]) -> SubnetPlan:
    """The plan for the weights that ``facts`` names by placeholder.

    A weight that is also used otherwise is left alone altogether: its subnet would see only a part of its gradient.
    """
    position = {node.name: index for index, node in enumerate(placeholders(gm))}
    slots: list[SubnetSlot] = []
    sites: list[LinearSite] = []
    left: list[LeftAlone] = []
    for holder, fact in facts.items():
        mine = [use for use in uses if use.holder == holder]
        others = [use for use in mine if not use.linear]
        if others:
            left += [LeftAlone(fact.fqn, use.node, f"used by {use.target}, which no pass rewrites") for use in others]
            continue
        if not mine:
            continue
        slots.append(SubnetSlot(len(slots), holder, position[holder], fact))
        for use in mine:
            sites.append(LinearSite(use.node, use.body, slots[-1].index, len(sites)))
    return SubnetPlan(tuple(slots), tuple(sites), tuple(left))
