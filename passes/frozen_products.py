"""Rewritten linears -> their form of which the forward and dL/dx are products of 8-bit numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from operator import getitem
from typing import ClassVar

from torch import fx

from losia_fx.errors import PassPostconditionError, PassPreconditionError
from losia_fx.ops.linear import subnet_linear
from losia_fx.ops.packed import packed_linear, quantised
from losia_fx.plan import ProductSite, SubnetPlan

from .base import GraphPass, bodies, graph_modules
from .rewrite import Inputs, thread_inputs
from .rewritten import rewritten_from


@dataclass(frozen=True)
class FrozenProducts(GraphPass):
    """losia.subnet_linear(x, W, S, ...) -> losia.packed_linear(x, *losia.quantised(x), Q, t, S, ...), W ~ Q t.

    What several linears take is quantised once. Appends placeholders for Q and its scales t a port, behind those of
    InsertLocalization, which comes first. W itself enters those products no more.
    """

    name: ClassVar[str] = "frozen-products"
    plan: SubnetPlan

    def requires(self, gm: fx.GraphModule) -> None:
        found = {site.call for part in graph_modules(gm) for node in part.graph.nodes if (site := _site_of(node))}
        for site in self.plan.sites:
            if site.packed and site.call not in found:
                fqn = self.plan.ports[site.port].facts.fqn
                raise PassPreconditionError(f"{self.name}: {fqn}: {site.node!r} is no rewritten linear of this graph")

    def apply(self, gm: fx.GraphModule) -> int:
        packed = set(self.plan.packed_ports)
        kinds = {port.index: port.facts.packed for port in self.plan.ports}
        done = 0

        def edit(part: fx.GraphModule, body: tuple[str, ...], inputs: Inputs) -> None:
            nonlocal done
            made: dict[tuple[fx.Node, str], tuple[fx.Node, ...]] = {}
            for node in list(part.graph.nodes):
                if (site := _site_of(node)) is None:
                    continue
                kind = kinds[site.port]
                assert kind is not None
                x, _, *rest = node.args
                assert isinstance(x, fx.Node)
                if (x, kind) not in made:
                    made[x, kind] = _quantised(part.graph, node, x, kind)
                node.target = packed_linear
                node.args = (x, *made[x, kind], *inputs[site.port], *rest)
                done += 1

        thread_inputs(gm, self.plan, lambda port: port.packed_names if port.index in packed else (), edit)
        return done

    def ensures(self, gm: fx.GraphModule) -> None:
        planned = Counter(site.body for site in self.plan.sites if site.packed)
        for body, part in bodies(gm):
            found = len(part.graph.find_nodes(op="call_function", target=packed_linear))
            if found != planned[body]:
                where = ".".join(body) or "the graph"
                raise PassPostconditionError(
                    f"{self.name}: {found} packed products in {where}, {planned[body]} planned"
                )


def _site_of(node: fx.Node) -> ProductSite | None:
    """The place of a linear that is to be packed."""
    found = rewritten_from(node)
    site = None if found is None or node.target is not subnet_linear else found.site
    return site if isinstance(site, ProductSite) and site.packed else None


def _quantised(graph: fx.Graph, before: fx.Node, x: fx.Node, kind: str) -> tuple[fx.Node, ...]:
    """x's numbers and scales, made before the first node that takes them."""
    with graph.inserting_before(before):
        both = graph.call_function(quantised, (x, kind))
        return tuple(graph.call_function(getitem, (both, part)) for part in range(2))
