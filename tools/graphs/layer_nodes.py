"""The nodes around one weight, before the passes and after them, as the page shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from losia_fx.passes import DYNAMO, graph_modules

from .capture import Captured
from .places import weight_of
from .records import tensor_of

Line = dict[str, str]

PARTS: Mapping[str, str] = {
    "losia_values": "S",
    "losia_rows": "rows",
    "losia_cols": "cols",
    "losia_handle": "handle",
    "losia_packed": "W in 8 bits",
    "losia_scales": "its scales",
}
"""Of a subnet's state: how the placeholders' names start, and what they hold."""


def before_and_after(captured: Captured) -> dict[str, tuple[list[Line], list[Line]]]:
    """By weight: the nodes that are its own, and those that they take and that take them, in the order of the graph.

    A line has name, op, inputs, value (shape and dtype), and mark: "removed" or "added" by the passes, "" of either.
    """
    found: dict[str, tuple[list[Line], list[Line]]] = {}
    for graph in captured.graphs:
        before, after = _lines(graph.stages[DYNAMO]), _lines(graph.rewritten)
        for name in after:
            pair = found.setdefault(name, ([], []))
            old, new = before.get(name, {}), after[name]
            pair[0].extend({**line, "mark": "" if node in new else "removed"} for node, line in old.items())
            pair[1].extend({**line, "mark": "" if node in old else "added"} for node, line in new.items())
    return found


def _lines(gm: fx.GraphModule) -> dict[str, dict[str, Line]]:
    """{weight: {node: its line}}; a node of a nested body goes under its own name."""
    found: dict[str, dict[str, Line]] = {}
    for module in graph_modules(gm):
        nodes = list(module.graph.nodes)
        place = {node: index for index, node in enumerate(nodes)}
        around: dict[str, set[fx.Node]] = {}
        for node in nodes:
            weight = weight_of(node)
            if weight:
                near = () if node.op == "placeholder" else (*node.all_input_nodes, *_takers(node))
                around.setdefault(weight, set()).update((node, *near))
        for weight, some in around.items():
            lines = found.setdefault(weight, {})
            lines.update({node.name: _line(node) for node in sorted(some, key=place.__getitem__)})
    return found


def _takers(node: fx.Node) -> Iterator[fx.Node]:
    return (user for user in node.users if user.op != "output")


def _line(node: fx.Node) -> Line:
    value = tensor_of(node)
    said = "" if value is None else f"{' x '.join(map(str, value.shape)) or 'scalar'} {_dtype(value.dtype)}"
    inputs = ", ".join(map(_name, node.all_input_nodes))
    return {"name": _name(node), "op": _op(node), "inputs": inputs, "value": said}


def _name(node: fx.Node) -> str:
    """The node's own; of a parameter or buffer, which Dynamo names by its whole path, the end of the model's name."""
    weight = weight_of(node) if node.op == "placeholder" else ""
    if not weight or node.name.startswith(tuple(PARTS)):
        return node.name
    return ".".join(weight.split(".")[-2:])


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _op(node: fx.Node) -> str:
    if node.op == "placeholder":
        weight = weight_of(node)
        return f"input: {_part(node.name, weight)}" if weight else "input"
    if node.op == "call_function":
        target = node.target
        return str(target) if hasattr(target, "overloadpacket") else str(getattr(target, "__name__", target))
    return f".{node.target}()" if node.op == "call_method" else node.op


def _part(name: str, weight: str) -> str:
    return next((said for prefix, said in PARTS.items() if name.startswith(prefix)), weight)
