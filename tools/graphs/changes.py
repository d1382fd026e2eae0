"""What the passes changed in a model's graphs, and what that saves against training the same weights in full.

>>> print(diff(capture(model, example)))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import fx

from losia_fx.passes import FORWARD_STAGES, JOINT_STAGES, rewritten_nodes
from losia_fx.plan import ProductSite

from .capture import BACKWARD, FORWARD, Captured, CapturedGraph
from .costs import flops_by_weight, held_by_weight, saved_for_backward
from .places import REMADE
from .records import NodeRecord, records


@dataclass(frozen=True)
class StageDiff:
    """What one pass did to one graph. Names of nodes; those in bodies start with the body's ("wrap_body_0/linear")."""

    graph: int
    before: str
    after: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    rewritten: dict[str, str]
    """Node before -> node that took its place, or the node itself where it was changed in place."""
    remade: tuple[str, ...]
    """Nodes that the pass has the backward make again."""
    ops: dict[str, int]
    """Called -> how many more of them there are now; those whose number is the same are left out."""


@dataclass(frozen=True)
class Cost:
    """Of a step on the example: forward and backward of matrix products, and what is kept in between."""

    flops: int = 0
    saved_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.saved_bytes + other.saved_bytes)


@dataclass(frozen=True)
class LayerDiff:
    """One weight with a subnet, over all its uses in the graphs."""

    weight: str
    shape: tuple[int, ...]
    subnet: tuple[int, ...]
    group: int
    uses: tuple[str, ...]
    """How the graphs write them: "linear", "matmul", ..."""
    before: Cost
    """In full training. saved_bytes: of all that its products read in the backward; several layers may share it."""
    after: Cost


@dataclass(frozen=True)
class Diff:
    model: str
    compiler: str
    stages: tuple[StageDiff, ...]
    layers: tuple[LayerDiff, ...]
    before: Cost
    """Of all graphs, in full training of the same weights; each kept activation counts once."""
    after: Cost
    notes: tuple[str, ...] = field(default=())


def diff(captured: Captured) -> Diff:
    stages = [stage for graph in captured.graphs for stage in _stages(graph)]
    total = [Cost(), Cost()]
    layers: list[tuple[Counter[str], Counter[str]]] = [(Counter(), Counter()), (Counter(), Counter())]
    for graph in captured.graphs:
        for side, made in enumerate((graph.dense, graph.stages)):
            if FORWARD not in made:
                continue
            flops, held, saved = _costs(made[FORWARD], made.get(BACKWARD))
            layers[side][0].update(flops)
            layers[side][1].update(held)
            total[side] += Cost(sum(flops.values()), saved)
    before, after = layers
    rows = tuple(
        LayerDiff(
            name,
            shape,
            subnet,
            group,
            uses,
            Cost(before[0][name], before[1][name]),
            Cost(after[0][name], after[1][name]),
        )
        for name, shape, subnet, group, uses in _layers(captured)
    )
    return Diff(captured.model, captured.config.compiler, tuple(stages), rows, total[0], total[1], _notes(captured))


def _costs(forward: fx.GraphModule, backward: fx.GraphModule | None) -> tuple[Counter[str], Counter[str], int]:
    flops = flops_by_weight(forward)
    if backward is None:
        return flops, Counter(), 0
    flops.update(flops_by_weight(backward))
    held = Counter({name: sum(kept.values()) for name, kept in held_by_weight(forward, backward).items()})
    return flops, held, sum(saved_for_backward(forward, backward).values())


Layer = tuple[str, tuple[int, ...], tuple[int, ...], int, tuple[str, ...]]


def _layers(captured: Captured) -> Iterable[Layer]:
    """(weight, its shape, its subnet's, group, uses) of every weight that a graph uses, in the order of the groups."""
    groups = {name: number for number, names in enumerate(captured.groups) for name in names}
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    uses: dict[str, dict[str, None]] = {}
    for graph in captured.graphs:
        for place in graph.plan.places:
            facts = graph.plan.ports[place.port].facts
            shapes[facts.fqn] = (facts.shape, (*facts.shape[:-2], facts.rows, facts.cols))
            uses.setdefault(facts.fqn, {})[place.use] = None
    for name, group in groups.items():
        if name in shapes:
            yield name, *shapes[name], group, tuple(uses[name])


def _notes(captured: Captured) -> tuple[str, ...]:
    seen = {port.facts.fqn for graph in captured.graphs for port in graph.plan.ports}
    missing = [name for names in captured.groups for name in names if name not in seen]
    if not missing:
        return ()
    return (
        f"{len(missing)} weights are in no graph of this step: a graph that serves several layers is shown once, with "
        f"the first one's weights, and some weights may have had no use ({', '.join(missing[:3])}, ...)",
    )


def _stages(graph: CapturedGraph) -> Iterable[StageDiff]:
    for known in (FORWARD_STAGES, JOINT_STAGES):
        for before, after in pairwise(name for name in known if name in graph.stages):
            yield _stage(graph, before, after)


def _stage(graph: CapturedGraph, before: str, after: str) -> StageDiff:
    nodes_before, nodes_after = records(graph.stages[before]), records(graph.stages[after])
    old, new = {n.name: n for n in nodes_before}, {n.name: n for n in nodes_after}
    sites = {_name(body, node.name): found.site for body, node, found in rewritten_nodes(graph.stages[after])}
    rewritten: dict[str, str] = {}
    for name, node in new.items():
        was, site = old.get(name), sites.get(name)
        if was is None:
            if isinstance(site, ProductSite):
                rewritten[_name(site.body, site.node)] = name
        elif was.target != node.target or (site is not None and was.inputs != node.inputs):
            rewritten[name] = name
    added = tuple(name for name in new if name not in old and name not in rewritten.values())
    removed = tuple(name for name in old if name not in new and name not in rewritten)
    remade = tuple(n for n, node in new.items() if node.status == REMADE and n in old and old[n].status != REMADE)
    ops = _op_changes(nodes_before, nodes_after)
    return StageDiff(graph.index, before, after, added, removed, rewritten, remade, ops)


def _name(body: tuple[str, ...], node: str) -> str:
    return "/".join((*body, node))


def _op_changes(before: Sequence[NodeRecord], after: Sequence[NodeRecord]) -> dict[str, int]:
    count = Counter(node.target or node.op for node in after)
    count.subtract(Counter(node.target or node.op for node in before))
    return {op: change for op, change in sorted(count.items()) if change}
