"""Moves the columns that a backward needs of a product's input up to where that input was made.

Runs on the joint graph of forward and backward, between AOTAutograd's tracing and its cut in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from losia_fx.taps import tap

from .base import GraphPass

aten = torch.ops.aten

LONGEST = 16
"""Elementwise nodes that one gather may be moved over. What lies further back is no longer cheap to repeat."""

_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class SinkGathers(GraphPass):
    """f(a, b)[..., cols] -> f(a[..., cols], b[..., cols]), f elementwise, where the backward has a and b anyway.

    A product keeps x[..., cols] for its backward. Where x is, say, a normalised residual, the residual is kept for the
    norm's own backward: with the gather moved up to it the partitioner finds that nothing needs to be kept for the
    product, and the few columns are normalised again. Gathers of gradients stay where they are, and so do those in
    checkpointed regions, which keep nothing.
    """

    name: ClassVar[str] = "sink-gathers"

    def apply(self, gm: fx.GraphModule) -> int:
        behind = _behind_tangents(gm.graph)
        forward = _forward(gm.graph, behind)
        found = {
            node: picked
            for node in gm.graph.nodes
            if node not in forward and node not in behind and (picked := _picked(node)) is not None
        }
        # Nodes that the backward has a use for, be it for values of the forward alone (a gelu's derivative).
        backward = {node for node in gm.graph.nodes if node not in forward and node not in found and node.target != tap}
        done = sum(_sink(gm.graph, node, *picked, backward) for node, picked in found.items())
        if done:
            gm.graph.eliminate_dead_code()
        return done


def _forward(graph: fx.Graph, behind: set[fx.Node]) -> set[fx.Node]:
    """Every node that the forward's results depend on."""
    front = [node for node in graph.output_node().all_input_nodes if node not in behind]
    found = set(front)
    while front:
        front = [source for node in front for source in node.all_input_nodes if source not in found]
        found.update(front)
    return found


def _behind_tangents(graph: fx.Graph) -> set[fx.Node]:
    """Every node that depends on a gradient that comes in."""
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        comes_in = node.op == "placeholder" and "tangents" in str(node.target)
        if comes_in or any(source in behind for source in node.all_input_nodes):
            behind.add(node)
    return behind


def _picked(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, cols) of a node x[..., cols] as ops.pick traces it: a gather along the last dimension, its index expanded."""
    if node.target is not aten.gather.default or "recompute" in node.meta:
        return None
    x, dim, index = node.args[:3]
    assert isinstance(x, fx.Node)
    if not isinstance(index, fx.Node) or index.target is not aten.expand.default or dim not in (-1, _rank(x) - 1):
        return None
    cols = index.args[0]
    return (x, cols) if isinstance(cols, fx.Node) and _rank(cols) == 1 else None


def _sink(graph: fx.Graph, node: fx.Node, x: fx.Node, cols: fx.Node, backward: set[fx.Node]) -> bool:
    plan = _Plan(backward)
    if not plan.covers(x) or not plan.moved:
        return False
    with graph.inserting_before(node):
        new = _Writer(graph, node, cols, plan).write(x)
    for user in node.users:
        if user.target in _RESHAPES:  # what is made anew may lie in another order than what was gathered
            user.target = aten.reshape.default
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


class _Plan:
    """Which nodes above x are made again for its columns, and where the gathers end up."""

    def __init__(self, backward: set[fx.Node]) -> None:
        self._backward = backward
        self.moved: set[fx.Node] = set()

    def covers(self, node: fx.Node) -> bool:
        """Whether the chain above ``node`` ends, within reach, in what the backward has anyway."""
        if node in self.moved:
            return True
        if any(user in self._backward for user in node.users):
            self._to_source(node)
            return True
        if node.op == "placeholder":
            return True
        inputs = _moves_over(node)
        if inputs is None or len(self.moved) >= LONGEST:
            return False
        self.moved.add(node)
        return all(self.covers(source) for source in inputs)

    def _to_source(self, node: fx.Node) -> None:
        """What the backward has of a cast or an activation may be what it was made of: a relu's is not, a silu's is."""
        while (inputs := _moves_over(node)) is not None and len(inputs) == len(node.all_input_nodes) == 1:
            same = node.target in _CASTS or node.target in _RESHAPES
            if not same and not any(user in self._backward for user in inputs[0].users):
                return
            self.moved.add(node)
            node = inputs[0]


def _moves_over(node: fx.Node) -> list[fx.Node] | None:
    """The inputs of ``node`` whose last dimension is its own, where each column of it needs their columns alone."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not _is_tensor(node):
        return None
    size = node.meta["val"].shape[-1] if _rank(node) else 1
    whole = [source for source in node.all_input_nodes if _is_tensor(source) and _rank(source)]
    if node.target in _RESHAPES:
        return whole if whole and whole[0].meta["val"].shape[-1] == size else None
    elementwise = torch.Tag.pointwise in node.target.tags or node.target in _CASTS
    if not elementwise or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    return [source for source in whole if source.meta["val"].shape[-1] == size] if size != 1 else None


class _Writer:
    """Writes the moved nodes anew, for the columns of one gather."""

    def __init__(self, graph: fx.Graph, gather: fx.Node, cols: fx.Node, plan: _Plan) -> None:
        self._graph, self._gather, self._cols, self._plan = graph, gather, cols, plan
        self._written: dict[fx.Node, fx.Node] = {}

    def write(self, node: fx.Node) -> fx.Node:
        if node not in self._written:
            self._written[node] = self._again(node) if node in self._plan.moved else self._leaf(node)
        return self._written[node]

    def _leaf(self, node: fx.Node) -> fx.Node:
        return self._call(aten.index.Tensor, (node, [None] * (_rank(node) - 1) + [self._cols]), {})

    def _again(self, node: fx.Node) -> fx.Node:
        inputs = _moves_over(node)
        assert inputs is not None
        if node.target in _RESHAPES:
            shape = node.args[1]
            assert isinstance(shape, Sequence)
            width = self._cols.meta["val"].shape[0]
            # reshape: the columns of a tensor that could be viewed so may lie otherwise
            return self._call(aten.reshape.default, (self.write(inputs[0]), [*shape[:-1], width]), {})
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: self.write(source) if source in inputs else source
        )
        return self._call(node.target, args, kwargs)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        new = self._graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
        new.meta = {**self._gather.meta, "val": target(*values[0], **values[1])}
        new.meta.pop("tensor_meta", None)
        return new


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _rank(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, torch.Tensor) else 0
