"""Has the backward make a product's whole input again, where that costs next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from losia_fx.ops.localization import tap

from ..base import GraphPass
from .graph import RESHAPES, Chain, Joint, aten, picked

_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)


@dataclass(frozen=True)
class RemakeInputs(GraphPass):
    """Marks x of a head's product, and what makes it of values that the backward has anyway, to be recomputed.

    The subnet of an output head has every column, so its gradient needs all of x: as a rule a normalised residual,
    beside the residual that the norm keeps for its own backward. The partitioner would keep both, since it counts what
    a product of the backward reads as too expensive to make again; here that is one norm. So it is with packed weights
    that the backward turns round (a GPU's, and float8).

    Runs on the joint graph of forward and backward, behind SinkGathers.
    """

    name: ClassVar[str] = "remake-inputs"

    def apply(self, gm: fx.GraphModule) -> int:
        joint = Joint.of(gm.graph)
        outputs = set(gm.graph.output_node().all_input_nodes)
        readers: dict[fx.Node, set[fx.Node]] = {}
        for x, path in _whole_inputs(gm.graph, joint):
            readers.setdefault(x, set()).update(path)
        done = 0
        for x, path in readers.items():
            backward = {n for n in gm.graph.nodes if n not in joint.forward and n not in path and n.target != tap}
            chain = Chain(backward)
            if x in outputs or "recompute" in x.meta or not chain.covers(x):
                continue
            if any(node.target is not aten.alias.default for node in chain.nodes):
                done += 1
                for node in chain.nodes:
                    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        return done + _remake_turned(gm.graph, joint)


def _remake_turned(graph: fx.Graph, joint: Joint) -> int:
    """Marks copies of packed weights that the backward's products want turned round: to keep one is to hold the weight
    a second time, and the partitioner takes that for as good as to keep the weight itself."""
    done = 0
    for copy in graph.find_nodes(op="call_function", target=aten.clone.default):
        source = copy.args[0]
        while source.target in _TRANSPOSES:
            source = source.args[0]
        fresh = "recompute" not in copy.meta and copy not in joint.forward
        if source.op == "placeholder" and fresh and copy.meta["val"].dtype.itemsize == 1:
            done += 1
            copy.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return done


def _whole_inputs(graph: fx.Graph, joint: Joint) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """x of each product g_y[..., rows]^T x in the backward, and the nodes between the two with the product."""
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        left, right = node.args
        while left.target in RESHAPES or left.target in _TRANSPOSES:
            left = left.args[0]
        if left not in joint.behind or picked(left) is None:
            continue
        path = {node}
        while right.target in RESHAPES and right not in joint.forward:
            path.add(right)
            right = right.args[0]
        if right in joint.forward:
            yield right, path
