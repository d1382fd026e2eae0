"""What a rewrite notes at each node that it makes, for the passes behind it and for whoever reads the graph later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from losia_fx.plan import ProductSite, WholeSite

from .base import bodies
from .products import Product

_KEY = "losia_rewritten"
"""In a node's meta, which copies of the graph share."""


@dataclass(frozen=True)
class Rewritten:
    """One use of a weight that is rewritten."""

    site: ProductSite | WholeSite
    """Its place in the plan."""
    product: Product | None
    """What the node was, in normal form, in the nodes of the graph that was rewritten; None of a WholeSite."""


def note(node: fx.Node, rewritten: Rewritten) -> None:
    node.meta[_KEY] = rewritten


def rewritten_from(node: fx.Node) -> Rewritten | None:
    """What ``node`` was rewritten from; None where it is of another making."""
    found: Rewritten | None = node.meta.get(_KEY)
    return found


def rewritten_nodes(gm: fx.GraphModule) -> Iterator[tuple[tuple[str, ...], fx.Node, Rewritten]]:
    """(body, node, what it was rewritten from) of every rewritten node, those in nested bodies included."""
    for body, part in bodies(gm):
        for node in part.graph.nodes:
            found = rewritten_from(node)
            if found is not None:
                yield body, node, found
