"""What the graphs of a captured step tell of its cost: the products of its weights, what is kept for the backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from losia_fx.ops.localization import tap
from losia_fx.passes import SubnetRewrite, rewritten_nodes

from ..graphs.capture import BACKWARD, FORWARD, CapturedGraph
from ..graphs.costs import base_of, saved_for_backward, saved_nodes
from ..graphs.places import weight_of
from ..graphs.records import tensor_of


@dataclass(frozen=True)
class WeightUse:
    """One product of a weight with a subnet: (tokens, inner) times (inner, outer), over all its experts together."""

    weight: str
    use: str
    """How the graph writes it."""
    tokens: int
    inner: int
    """The dimension that is summed over: of x's features."""
    outer: int
    itemsize: int
    """Bytes an element of x."""

    @property
    def flops(self) -> int:
        """Of the product itself; dL/dx and dL/dW in full take as many each."""
        return 2 * self.tokens * self.inner * self.outer


def weight_uses(graphs: tuple[CapturedGraph, ...]) -> tuple[WeightUse, ...]:
    """Every rewritten product of a step; uses that no rewrite covers are not among them (CapturedGraph.plan.whole)."""
    return tuple(use for graph in graphs for use in _uses(graph))


def _uses(graph: CapturedGraph) -> Iterator[WeightUse]:
    if SubnetRewrite.name not in graph.stages:
        return
    for _, _, rewritten in rewritten_nodes(graph.stages[SubnetRewrite.name]):
        product, site = rewritten.product, rewritten.site
        if product is None:
            continue
        facts = graph.plan.ports[site.port].facts
        # normal forms: (out, in) of a linear, (E, in, out) of the others; see losia_fx.passes.products
        outer, inner = facts.shape[-2:] if product.form == "linear" else facts.shape[:-3:-1]
        if product.transposed:
            outer, inner = inner, outer
        x = tensor_of(product.x)
        if x is not None:
            yield WeightUse(facts.fqn, site.use, x.numel() // inner, inner, outer, x.element_size())


def saved_bytes(stages: Iterable[Mapping[str, fx.GraphModule]]) -> int:
    """What the forwards keep for their backwards, weights and inputs aside. stages: of each graph, dense or not."""
    pairs = [(graph[FORWARD], graph[BACKWARD]) for graph in stages if BACKWARD in graph]
    return sum(sum(saved_for_backward(*pair).values()) for pair in pairs)


def kept_columns(graphs: tuple[CapturedGraph, ...]) -> dict[str, int]:
    """By weight: the bytes of its inputs' columns that the forwards keep for its own dL/dS.

    Many keep none: where the backward has what an input was made of, it makes the columns again.
    """
    found: dict[str, int] = {}
    for graph in graphs:
        sizes = {port.facts.fqn: (port.facts.rows, port.facts.cols) for port in graph.plan.ports}
        pair = (graph.stages[FORWARD], graph.stages[BACKWARD]) if BACKWARD in graph.stages else None
        for node in {base_of(node) for node in saved_nodes(*pair)} if pair else ():
            name, value = weight_of(node), tensor_of(node)
            if name in sizes and value is not None and value.is_floating_point() and value.shape[-1] in sizes[name]:
                found[name] = found.get(name, 0) + value.numel() * value.element_size()
    return found


def tapped(graphs: tuple[CapturedGraph, ...]) -> dict[str, int]:
    """By weight: the bytes that its taps copy in the forward, while its group is profiled.

    Of an x that is kept whole anyhow (the head's), AOTAutograd moves the tap into the backward: that one is not in it.
    """
    found: dict[str, int] = {}
    for graph in graphs:
        nodes = graph.stages[FORWARD].graph.nodes if BACKWARD in graph.stages else ()
        for node in nodes:
            if node.target is tap:
                x, handle = tensor_of(node.args[0]), node.args[1]
                assert x is not None
                name = weight_of(handle)
                found[name] = found.get(name, 0) + x.numel() * x.element_size()
    return found
