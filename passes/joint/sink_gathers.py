"""Moves the columns that a backward needs of a product's input up to where that input was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from losia_fx.ops.localization import tap

from ..base import GraphPass
from .graph import RESHAPES, Chain, Joint, aten, moves_over, picked, rank


@dataclass(frozen=True)
class SinkGathers(GraphPass):
    """f(a, b)[..., cols] -> f(a[..., cols], b[..., cols]), f elementwise, where the backward has a and b anyway.

    A product keeps x[..., cols] for its backward. Where x is, say, a normalised residual, the residual is kept for the
    norm's own backward: with the gather moved up to it the partitioner finds that nothing needs to be kept for the
    product, and the few columns are normalised again. Gathers of gradients stay where they are, and so do those in
    checkpointed regions, which keep nothing.

    Runs on the joint graph of forward and backward.
    """

    name: ClassVar[str] = "sink-gathers"

    def apply(self, gm: fx.GraphModule) -> int:
        joint = Joint.of(gm.graph)
        found = {
            node: pair
            for node in gm.graph.nodes
            if node not in joint.forward and node not in joint.behind and "recompute" not in node.meta
            if (pair := picked(node)) is not None
        }
        # Nodes that the backward has a use for, be it for values of the forward alone (a gelu's derivative).
        backward = {n for n in gm.graph.nodes if n not in joint.forward and n not in found and n.target != tap}
        done = sum(_sink(gm.graph, node, *pair, backward) for node, pair in found.items())
        if done:
            gm.graph.eliminate_dead_code()
        return done


def _sink(graph: fx.Graph, node: fx.Node, x: fx.Node, cols: fx.Node, backward: set[fx.Node]) -> bool:
    chain = Chain(backward)
    if not chain.covers(x):
        return False
    chain.extend(x)
    if not chain.nodes:
        return False
    with graph.inserting_before(node):
        new = _Writer(graph, node, cols, chain).write(x)
    for user in node.users:
        if user.target in RESHAPES:  # what is made anew may lie in another order than what was gathered
            user.target = aten.reshape.default
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


class _Writer:
    """Writes the nodes of a chain anew, for the columns of one gather."""

    def __init__(self, graph: fx.Graph, gather: fx.Node, cols: fx.Node, chain: Chain) -> None:
        self._graph, self._gather, self._cols, self._chain = graph, gather, cols, chain
        self._written: dict[fx.Node, fx.Node] = {}

    def write(self, node: fx.Node) -> fx.Node:
        if node not in self._written:
            self._written[node] = self._again(node) if node in self._chain.nodes else self._leaf(node)
        return self._written[node]

    def _leaf(self, node: fx.Node) -> fx.Node:
        return self._call(aten.index.Tensor, (node, [None] * (rank(node) - 1) + [self._cols]), {})

    def _again(self, node: fx.Node) -> fx.Node:
        inputs = moves_over(node)
        assert inputs is not None
        if node.target in RESHAPES:
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
