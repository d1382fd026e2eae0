"""What one node of a graph says of itself: what it calls, in a word, its arguments by name, and its value's sizes."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from losia_fx._compat import grouped_products


def use_of(node: fx.Node) -> str:
    """What a node does, in one word: the same for a function, an operator, a method and an attribute.

    Words without a dot are torch's: a function or an operator of anybody else's has its full name, and is no product.
    """
    if node.op == "call_method":
        word = str(node.target)
    elif node.op != "call_function":
        return node.op
    elif node.target in grouped_products():
        return "grouped_mm"
    else:
        word = str(node.args[1]) if node.target is getattr else _name_of(node.target)
    return "matmul" if word in ("mm", "__matmul__") else word


def _name_of(function: Any) -> str:
    packet = function.overloadpacket if isinstance(function, torch._ops.OpOverload) else function
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return str(packet).removeprefix("aten.")
    name = str(getattr(function, "__name__", function))
    if any(getattr(home, name, None) is function for home in (torch, F, operator, torch.ops.higher_order)):
        return name
    return f"{getattr(function, '__module__', None) or '?'}.{name}"


def renorms(node: fx.Node) -> bool:
    """Whether the node is an embedding that writes to its table, to keep the rows that it looks up short."""
    if use_of(node) not in ("embedding", "embedding_bag"):
        return False
    return (node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")) is not None


def dims_of(node: Any) -> int | None:
    """Dimensions of a node's value, where the tracer says."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None


def size_of(node: fx.Node, dim: int) -> Any:
    """Length of a dimension of a node's value, where the tracer says."""
    value = node.meta.get("example_value")
    return value.shape[dim] if isinstance(value, torch.Tensor) and -value.dim() <= dim < value.dim() else None


def agree(first: Any, second: Any) -> bool:
    """Whether two lengths are the same for all that is known: products that broadcast have no normal form."""
    return first is None or second is None or first is second or bool(first == second)


def bound(node: fx.Node, *names: str) -> dict[str, Any] | None:
    """The arguments by name; None where there are others than these."""
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return None
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
