"""What a graph of AOTAutograd's costs: FLOPs of its matrix products, and bytes that the forward keeps for the backward.

Counted from shapes; nothing is run. A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from losia_fx._compat import input_index

from .places import weight_of
from .records import bytes_of, tensor_of, value_of

SAME_MEMORY = ("aten.alias", "aten.detach", "aten._unsafe_view")
"""Overloads of these share their input's memory though torch does not call them views."""


def flops_by_weight(gm: fx.GraphModule) -> Counter[str]:
    """FLOPs of the matrix products, by the weight with a subnet that they belong to; "" for all others (attention)."""
    total: Counter[str] = Counter()
    for node in gm.graph.nodes:
        flops = node_flops(node)
        if flops:
            total[weight_of(node)] += flops
    return total


def node_flops(node: fx.Node) -> int:
    """FLOPs of a product, a convolution or an attention; 0 of any other node, and where a size is symbolic."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    grouped = GROUPED.get(node.target.name().partition(".")[0])
    try:
        if grouped is not None:
            return grouped(*args)
        formula: Any = flop_registry.get(node.target.overloadpacket)
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=value_of(node)))
    except TypeError:  # a symbolic size has no value
        return 0


def _product(x: Any, weight: Any, *_: Any) -> int:
    """x (tokens, in), each row through one expert's (in, out)."""
    return int(2 * math.prod(x.shape) * weight.shape[-1])


def _outer(x: Any, grad_y: Any, *_: Any) -> int:
    """x (tokens, in), grad_y (tokens, out): each row adds to one expert's (in, out)."""
    return int(2 * math.prod(x.shape) * grad_y.shape[-1])


def _both(x: Any, weight: Any, *_: Any) -> int:
    """The gradients of x and of the weight."""
    return 2 * _product(x, weight)


GROUPED: dict[str, Callable[..., int]] = {
    "aten::_grouped_mm": lambda a, b, *_: _product(a, b) if b.dim() == 3 else _outer(a.mT, b),
    "losia::grouped_mm": _product,
    "losia::grouped_outer": _outer,
    "transformers::grouped_mm_fallback": _product,
    "transformers::grouped_mm_fallback_backward": _both,
}
"""Products of experts, which torch's counter does not know."""


def saved_for_backward(forward: fx.GraphModule, backward: fx.GraphModule) -> dict[str, int]:
    """What the forward keeps for the backward alone: name of the node that owns the memory -> bytes.

    Parameters, inputs and subnets' state are kept anyway, views share the memory of what they look at.
    """
    saved: dict[str, int] = {}
    for node in saved_nodes(forward, backward):
        base = base_of(node)
        value = tensor_of(base)
        if base.op != "placeholder" and value is not None:
            saved[base.name] = bytes_of(value)
    return saved


def saved_nodes(forward: fx.GraphModule, backward: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of the forward whose values are handed to the backward."""
    made = {node.name: node for node in forward.graph.nodes}
    for holder in backward.graph.find_nodes(op="placeholder"):
        if holder.name in made and input_index(holder) is None:
            yield made[holder.name]


def base_of(node: fx.Node) -> fx.Node:
    """The node that owns the memory that ``node`` looks at."""
    while (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and (node.target.is_view or str(node.target).rpartition(".")[0] in SAME_MEMORY)
        and isinstance(node.args[0], fx.Node)
    ):
        node = node.args[0]
    return node


def held_by_weight(forward: fx.GraphModule, backward: fx.GraphModule) -> dict[str, dict[str, int]]:
    """By weight with a subnet: what its own products read in the backward of what the forward has kept, as above.

    Directly, or through what the backward makes again from it. One activation may be held by several layers.
    """
    memory = {node.name: base_of(node) for node in saved_nodes(forward, backward)}
    reads: dict[fx.Node, frozenset[str] | None] = {}
    held: dict[str, dict[str, int]] = {}
    for node in backward.graph.nodes:
        reads[node] = _reads(node, memory, reads)
        weight = weight_of(node)
        if not weight or not node_flops(node):
            continue
        mine = held.setdefault(weight, {})
        for operand in node.all_input_nodes:
            for name in reads[operand] or ():
                base = memory[name]
                value = tensor_of(base)
                if base.op != "placeholder" and value is not None:
                    mine[base.name] = bytes_of(value)
    return held


def _reads(
    node: fx.Node, memory: dict[str, fx.Node], reads: dict[fx.Node, frozenset[str] | None]
) -> frozenset[str] | None:
    """The saved values that a node of the backward is made of; None where a gradient is part of it."""
    if node.op == "placeholder":
        if node.name in memory:
            return frozenset((node.name,))
        return None if input_index(node) is None else frozenset()
    parts = [reads[given] for given in node.all_input_nodes]
    if any(part is None for part in parts):
        return None
    return frozenset().union(*(part for part in parts if part is not None))
