"""What a joint graph of forward and backward says of its nodes, and how far back a value can be made again.

For the passes that run on it, between AOTAutograd's tracing and its cut in two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten

LONGEST = 16
"""Elementwise nodes that one value is made again with. What lies further back is no longer cheap to repeat."""

CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default, aten.alias.default)
"""The same elements in another tensor. alias: what is left of x[:, :]."""
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class Joint:
    """forward: what the forward's results depend on; behind: what depends on a gradient that comes in."""

    forward: frozenset[fx.Node]
    behind: frozenset[fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph) -> Joint:
        behind = _behind_tangents(graph)
        return cls(frozenset(_forward(graph, behind)), frozenset(behind))


def _forward(graph: fx.Graph, behind: set[fx.Node]) -> set[fx.Node]:
    front = [node for node in graph.output_node().all_input_nodes if node not in behind]
    found = set(front)
    while front:
        front = [source for node in front for source in node.all_input_nodes if source not in found]
        found.update(front)
    return found


def _behind_tangents(graph: fx.Graph) -> set[fx.Node]:
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        comes_in = node.op == "placeholder" and "tangents" in str(node.target)
        if comes_in or any(source in behind for source in node.all_input_nodes):
            behind.add(node)
    return behind


def picked(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, index) of a node x[..., index] as ops.pick traces it: a gather along the last dimension, index expanded."""
    if node.target is not aten.gather.default:
        return None
    x, dim, index = node.args[:3]
    assert isinstance(x, fx.Node)
    if not isinstance(index, fx.Node) or index.target is not aten.expand.default or dim not in (-1, rank(x) - 1):
        return None
    cols = index.args[0]
    return (x, cols) if isinstance(cols, fx.Node) and rank(cols) == 1 else None


def moves_over(node: fx.Node) -> list[fx.Node] | None:
    """The inputs of ``node`` whose last dimension is its own, where each column of it needs their columns alone."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not is_tensor(node):
        return None
    size = node.meta["val"].shape[-1] if rank(node) else 1
    whole = [source for source in node.all_input_nodes if is_tensor(source) and rank(source)]
    if node.target in RESHAPES:
        return whole if whole and whole[0].meta["val"].shape[-1] == size else None
    elementwise = torch.Tag.pointwise in node.target.tags or node.target in CASTS
    if not elementwise or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    return [source for source in whole if source.meta["val"].shape[-1] == size] if size != 1 else None


class Chain:
    """The elementwise nodes that a value is made again with, from what the backward has anyway.

    backward: the nodes that the backward runs whatever becomes of the value.
    """

    def __init__(self, backward: set[fx.Node]) -> None:
        self._backward = backward
        self.nodes: set[fx.Node] = set()

    def covers(self, node: fx.Node) -> bool:
        """Whether the nodes above ``node`` end, within reach, in what the backward has anyway."""
        if node in self.nodes or self.has(node) or node.op == "placeholder":
            return True
        inputs = moves_over(node)
        if inputs is None or len(self.nodes) >= LONGEST:
            return False
        self.nodes.add(node)
        return all(self.covers(source) for source in inputs)

    def has(self, node: fx.Node) -> bool:
        return any(user in self._backward for user in node.users)

    def extend(self, value: fx.Node) -> None:
        """Starts from what the backward's own values are made of, where that is one other value that it has: a silu's
        is, a relu's is not. ``value``: what the chain makes.

        A silu that the backward makes again itself would otherwise be written to memory, for the gather to read.
        """
        sources = (source for node in self.nodes for source in moves_over(node) or ())
        front = [value, *sources]
        while front:
            node = front.pop()
            if node not in self.nodes:
                front += self._beyond(node)

    def _beyond(self, node: fx.Node) -> list[fx.Node]:
        """Takes in ``node`` and what is between it and the next value that the backward has; returns that, if any."""
        inputs = None if node.op == "placeholder" else moves_over(node)
        if inputs is not None and (node.target in CASTS or node.target in RESHAPES):
            self.nodes.add(node)
            return inputs
        between: set[fx.Node] = set()
        ends: set[fx.Node] = set()
        front = [node]
        while front:
            current = front.pop()
            inputs = None if current.op == "placeholder" else moves_over(current)
            if inputs is None or len(self.nodes | between) >= LONGEST:
                return []
            between.add(current)
            for source in filter(is_tensor, current.all_input_nodes):
                if source not in inputs:
                    return []
                if self.has(source):
                    ends.add(source)
                else:
                    front.append(source)
        if len(ends) != 1:
            return []
        self.nodes |= between
        return list(ends)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def rank(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, torch.Tensor) else 0
