"""The nodes of a graph as plain values: what every dump, diff and picture is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

import losia_fx
from losia_fx.config import matches
from losia_fx.errors import ConfigError
from losia_fx.passes import region_of

from .places import Place, place_of

FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')


@dataclass(frozen=True)
class NodeRecord:
    """One node. Names of nodes in nested bodies start with those of the bodies: "wrap_body_0/linear"."""

    name: str
    op: str
    """fx's word: "placeholder", "call_function", "call_method", "get_attr", "output"."""
    target: str
    """What it calls: "linear", "losia.subnet_linear.v1", "aten.mm.default", ".view"; "" of placeholders and outputs."""
    inputs: tuple[str, ...]
    """Names of the nodes it takes, in order, as often as it takes them."""
    shape: tuple[int | str, ...] | None
    """None where the value is no tensor; symbolic sizes as text."""
    dtype: str
    bytes: int
    """Of the tensor; 0 where it is none, or where a size is symbolic."""
    owner: str
    """Dotted name of the module whose code this is."""
    source: str
    """File and line of that code: "modeling_llama.py:244"."""
    weight: str
    """The parameter that arrives there, or whose product this is part of (see Place)."""
    group: int
    """Of that weight; -1 where it has none."""
    status: str
    """As in Place."""

    @property
    def shape_text(self) -> str:
        return "" if self.shape is None else "x".join(map(str, self.shape)) or "scalar"


def records(gm: fx.GraphModule) -> list[NodeRecord]:
    """Every node of the graph and of the bodies nested in it, in the order in which they run.

    A body's placeholders take the nodes that are passed for them, and the node that runs a body takes its output.
    """
    return list(_records(gm, "", {}))


def _records(gm: fx.GraphModule, prefix: str, passed: dict[str, str]) -> Iterator[NodeRecord]:
    for node in gm.graph.nodes:
        inputs = [f"{prefix}{name}" for name in _inputs(node)]
        if node.name in passed:
            inputs = [passed[node.name]]
        region = region_of(gm, node)
        if region is not None:
            inner = f"{prefix}{region.name}/"
            given = {holder.name: f"{prefix}{outer.name}" for holder, outer in region.passed()}
            yield from _records(region.body, inner, given)
            inputs.append(f"{inner}{region.body.graph.output_node().name}")
        yield _record(node, f"{prefix}{node.name}", inputs)


def _inputs(node: fx.Node) -> list[str]:
    names: list[str] = []
    fx.map_arg((node.args, node.kwargs), lambda argument: names.append(argument.name))
    return names


def _record(node: fx.Node, name: str, inputs: Sequence[str]) -> NodeRecord:
    tensor, place = tensor_of(node), place_of(node)
    known = place or Place()
    return NodeRecord(
        name=name,
        op=node.op,
        target=_target(node),
        inputs=tuple(inputs),
        shape=None if tensor is None else tuple(_size(size) for size in tensor.shape),
        dtype="" if tensor is None else str(tensor.dtype).removeprefix("torch."),
        bytes=0 if tensor is None else bytes_of(tensor),
        owner=_traced_owner(node) if place is None else place.owner,
        source=_source(node.meta.get("stack_trace")),
        weight=known.weight,
        group=known.group,
        status=known.status,
    )


def value_of(node: fx.Node) -> Any:
    """What the node was when it was traced: a fake tensor most often; None where the tracer kept nothing."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is None and "tensor_meta" in node.meta:  # torch.fx.passes.shape_prop
        meta = node.meta["tensor_meta"]
        return torch.empty(meta.shape, dtype=meta.dtype, device="meta") if hasattr(meta, "dtype") else None
    return value


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """As value_of; None where that is no tensor."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def bytes_of(tensor: torch.Tensor) -> int:
    sizes = [_size(size) for size in tensor.shape]
    return math.prod(size for size in sizes if isinstance(size, int)) * tensor.itemsize if _known(sizes) else 0


def _known(sizes: Sequence[int | str]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _target(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "call_method":
        return f".{node.target}"
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _traced_owner(node: fx.Node) -> str:
    """Of a graph that was not captured by losia_fx.tools.capture, what the tracer says."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


@cache
def _source(trace: str | None) -> str:
    """The innermost line of the model's own code: neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(losia_fx.__file__).parent))
    frames = [frame for frame in FRAME.finditer(trace or "") if not frame["file"].startswith(ours)]
    return f"{Path(frames[-1]['file']).name}:{frames[-1]['line']}" if frames else ""


def neighbourhood(nodes: Sequence[NodeRecord], patterns: Sequence[str]) -> list[NodeRecord]:
    """The nodes of the modules that ``patterns`` name (as in LosiaConfig.target), and those next to them."""
    wanted = {node.name for node in nodes if matches(node.owner, patterns) or matches(node.weight, patterns)}
    near = set(wanted)
    for node in nodes:
        if node.name in wanted:
            near.update(node.inputs)
        elif any(name in wanted for name in node.inputs):
            near.add(node.name)
    return [node for node in nodes if node.name in near]


def check_layers(graphs: Sequence[Sequence[NodeRecord]], patterns: Sequence[str]) -> None:
    """Raises ConfigError at a pattern that names no module of any of the graphs."""
    names = dict.fromkeys(name for nodes in graphs for node in nodes for name in (node.owner, node.weight) if name)
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            owners = dict.fromkeys(node.owner for nodes in graphs for node in nodes if node.status and node.owner)
            some = ", ".join(list(owners or names)[:3])
            raise ConfigError(f"--layer {pattern}: no module of that name in the graphs; there are {some}, ...")
