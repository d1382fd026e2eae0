"""Graphviz's DOT: a box a node, a frame a module, rewritten nodes filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .places import ADDED, PART, PLANNED, REMADE, REWRITTEN
from .records import NodeRecord

FILL = {REWRITTEN: "#f4a259", PLANNED: "#f9dcc4", ADDED: "#bde0fe", REMADE: "#cdeac0", PART: "#f9dcc4"}


def dot(name: str, nodes: Sequence[NodeRecord]) -> str:
    """A digraph; inputs that are not among ``nodes`` are left out."""
    return "\n".join(_lines(name, nodes)) + "\n"


def _lines(name: str, nodes: Sequence[NodeRecord]) -> Iterator[str]:
    yield f"digraph {quoted(name)} {{"
    yield '  rankdir=TB; node [shape=box, fontname="sans-serif", fontsize=10];'
    owners = dict.fromkeys(node.owner for node in nodes)
    for number, owner in enumerate(owners):
        inside = [f"    {_node(node)}" for node in nodes if node.owner == owner]
        if not owner:
            yield from inside
            continue
        yield f"  subgraph cluster_{number} {{"
        yield f"    label={quoted(owner)}; color=gray;"
        yield from inside
        yield "  }"
    known = {node.name for node in nodes}
    for node in nodes:
        for given in dict.fromkeys(node.inputs):
            if given in known:
                yield f"  {quoted(given)} -> {quoted(node.name)};"
    yield "}"


def _node(node: NodeRecord) -> str:
    said = "\\n".join(part for part in (node.name, node.target or node.op, node.shape_text) if part)
    fill = f', style=filled, fillcolor="{FILL[node.status]}"' if node.status else ""
    return f'{quoted(node.name)} [label="{_escaped(said)}"{fill}];'


def quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace('"', '\\"')
