"""Graphs as networkx graphs, and what one can ask them.

>>> graph = to_networkx(captured.graphs[0].stages["insert-localization"])
>>> longest_rewritten_path(graph)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx

from losia_fx.errors import LosiaError
from losia_fx.passes import DYNAMO

from .capture import BACKWARD, FORWARD, CapturedGraph
from .costs import held_by_weight
from .places import REWRITTEN
from .records import NodeRecord, records

DiGraph: TypeAlias = Any
"""networkx.DiGraph, which has no types of its own; its nodes are names."""
ROOT = ""
"""The node that stands before all inputs where dominators are looked for."""


def import_networkx() -> Any:
    try:
        import networkx
    except ModuleNotFoundError:
        raise LosiaError("this needs networkx: install losia-fx[tools]") from None
    return networkx


def to_networkx(gm: fx.GraphModule) -> DiGraph:
    """A DiGraph of the nodes of ``gm`` and of the bodies nested in it; edges lead from a value to its users.

    Attributes of a node: op, target, shape ("2x16x128"), dtype, owner, source, weight, status (strings), bytes, group,
    position (ints) and rewritten (bool). Of an edge: arguments, the places ("0,2") that the value has among the user's,
    and bytes. All typed, none missing: GraphML and GEXF carry them both ways.
    """
    return graph_of(records(gm))


def graph_of(nodes: Sequence[NodeRecord]) -> DiGraph:
    """As to_networkx; inputs that are not among ``nodes`` are left out."""
    graph: DiGraph = import_networkx().DiGraph()
    for position, node in enumerate(nodes):
        graph.add_node(
            node.name,
            op=node.op,
            target=node.target,
            shape=node.shape_text,
            dtype=node.dtype,
            owner=node.owner,
            source=node.source,
            weight=node.weight,
            status=node.status,
            bytes=node.bytes,
            group=node.group,
            position=position,
            rewritten=node.status == REWRITTEN,
        )
    sizes = {node.name: node.bytes for node in nodes}
    for node in nodes:
        for name in dict.fromkeys(node.inputs):
            if name in sizes:
                places = ",".join(str(index) for index, given in enumerate(node.inputs) if given == name)
                graph.add_edge(name, node.name, arguments=places, bytes=sizes[name])
    return graph


def longest_rewritten_path(graph: DiGraph) -> list[str]:
    """The rewritten nodes on the path that has most of them, in order: how deep the rewritten layers are stacked."""
    nx = import_networkx()
    best: dict[str, tuple[int, str | None]] = {}
    for node in nx.topological_sort(graph):
        count, before = max(((best[p][0], p) for p in graph.predecessors(node)), default=(0, None))
        best[node] = (count + bool(graph.nodes[node]["rewritten"]), before)
    last: str | None = max(best, key=lambda name: best[name][0], default=None)
    path: list[str] = []
    while last is not None:
        if graph.nodes[last]["rewritten"]:
            path.append(last)
        last = best[last][1]
    return path[::-1]


def loss_of(graph: DiGraph) -> str:
    """The node whose value is the loss: the first scalar among the outputs, else the first output."""
    (output,) = (name for name, data in graph.nodes(data=True) if data["op"] == "output" and "/" not in name)
    given = sorted(graph.predecessors(output), key=lambda name: _first(graph.edges[name, output]["arguments"]))
    if not given:
        raise LosiaError("the graph hands nothing out: there is no loss in it")
    scalars = [name for name in given if graph.nodes[name]["shape"] == "scalar"]
    return str((scalars or given)[0])


def _first(places: str) -> int:
    return int(places.partition(",")[0])


def loss_dominators(graph: DiGraph, sources: Iterable[str] | None = None) -> list[str]:
    """The nodes that lie on every path from ``sources`` to the loss, in order; the loss itself is the last.

    sources: by default the first input that is no parameter, buffer or subnet's state: the batch, without its labels.
    """
    nx = import_networkx()
    if sources is None:
        data = graph.nodes(data=True)
        batch = [n for n, d in data if d["op"] == "placeholder" and not d["weight"] and not graph.in_degree(n)]
        sources = batch[:1]
    loss = loss_of(graph)
    rooted = graph.copy()
    rooted.add_edges_from((ROOT, source) for source in sources)
    if not rooted.has_node(ROOT) or not nx.has_path(rooted, ROOT, loss):
        return [loss]
    before = nx.immediate_dominators(rooted, ROOT)
    chain = [loss]
    while before.get(chain[-1]) not in (None, ROOT, chain[-1]):
        chain.append(before[chain[-1]])
    return chain[::-1]


@dataclass(frozen=True)
class Held:
    """What one weight's products keep alive from the forward to the backward: node that owns the memory -> bytes."""

    weight: str
    group: int
    before: dict[str, int]
    """In full training: names in graph.dense["forward"]."""
    after: dict[str, int]
    """Names in graph.stages["forward"]."""

    @property
    def freed(self) -> int:
        """Bytes. What several layers hold goes only when all of them let go of it."""
        return sum(self.before.values()) - sum(self.after.values())


def held_activations(graph: CapturedGraph) -> list[Held]:
    """By rewritten weight of the graph: the activations that it holds, in full training and with its subnet."""
    if BACKWARD not in graph.stages or BACKWARD not in graph.dense:
        return []
    before, after = (held_by_weight(made[FORWARD], made[BACKWARD]) for made in (graph.dense, graph.stages))
    groups = {node.weight: node.group for node in records(graph.stages[DYNAMO]) if node.group >= 0}
    names = dict.fromkeys(port.facts.fqn for port in graph.plan.ports)
    return [Held(name, groups.get(name, -1), before.get(name, {}), after.get(name, {})) for name in names]


def group_subgraph(graph: DiGraph, group: int) -> DiGraph:
    """The nodes of one group's weights and all that lies between them. Raises LosiaError where there are none."""
    nx = import_networkx()
    members = {name for name, data in graph.nodes(data=True) if data["group"] == group}
    if not members:
        known = sorted({data["group"] for _, data in graph.nodes(data=True)} - {-1})
        raise LosiaError(f"group {group}: no node of the graph belongs to it; there are {known}")
    before: set[str] = set().union(*(nx.ancestors(graph, name) for name in members))
    after: set[str] = set().union(*(nx.descendants(graph, name) for name in members))
    result: DiGraph = graph.subgraph(members | (before & after)).copy()
    return result
