"""Graphs for the tests of the passes, built by hand: weights are placeholders, as Dynamo hands them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from losia_fx.passes import plan_subnets
from losia_fx.passes.base import graph_modules
from losia_fx.plan import SubnetFacts, SubnetPlan

INTO, OUT = 8, 6
ROWS, COLS = (1, 4), (0, 2, 7)

checkpoint = torch.ops.higher_order.tag_activation_checkpoint


def facts(fqn: str, out: int = OUT, into: int = INTO, head: bool = False) -> SubnetFacts:
    return SubnetFacts(fqn, (out, into), len(ROWS), into if head else len(COLS), head, "float32")


def trace(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(function)


def plan_of(gm: fx.GraphModule, weights: Mapping[str, SubnetFacts]) -> SubnetPlan:
    return plan_subnets(gm, weights)


def text(gm: fx.GraphModule) -> str:
    """A graph and those nested in it, a node a line; where torch keeps a function is no matter of ours."""
    lines = []
    for name, module in gm.named_modules():
        if not isinstance(module, fx.GraphModule):
            continue
        lines.append(f"graph {name or '(main)'}:")
        for node in module.graph.nodes:
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
            lines.append(f"  {node.name} = {node.op} {target}({arguments})")
    return "\n".join(lines) + "\n"


def before_and_after(before: str, after: str) -> str:
    return f"before\n======\n{before}\nafter\n=====\n{after}"


def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.relu(F.linear(x, w, b))


def without_bias(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def by_keywords(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(bias=b, weight=w, input=x)


def some_keywords(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, weight=w, bias=None)


def used_twice(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(x, w)), w)


def used_otherwise(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w) + w.sum()


def two_weights(x: Tensor, up: Tensor, down: Tensor, b: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(x, up, b)), down)


def no_linear(x: Tensor, w: Tensor) -> Tensor:
    return torch.relu(x * w)


def unused(x: Tensor, w: Tensor) -> Tensor:
    return torch.relu(x)


def checkpointed(regions: int = 2, share_body: bool = False) -> fx.GraphModule:
    """x -> [linear, relu] * regions, each in a checkpointed body of its own, or all in one that is called twice."""
    holder = nn.Module()
    for index in range(1 if share_body else regions):
        holder.add_module(f"body_{index}", trace(plain))
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = [(graph.placeholder(f"w_{i}"), graph.placeholder(f"b_{i}")) for i in range(regions)]
    for index, (w, b) in enumerate(weights):
        body = graph.get_attr(f"body_{0 if share_body else index}")
        x = graph.call_function(checkpoint, (body, x, w, b), {"use_reentrant": False})
    graph.output(x)
    return fx.GraphModule(holder, graph)


class State:
    """Tensors for a graph's state placeholders, by name."""

    def __init__(self, weights: Mapping[str, Tensor], plan: SubnetPlan, handle: int = 0) -> None:
        self.values: dict[str, Tensor] = {}
        self.by_name: dict[str, Tensor] = {}
        rows = torch.tensor(ROWS)
        for port in plan.ports:
            weight = weights[port.weight].detach()
            cols = torch.arange(weight.shape[1]) if port.facts.whole_cols else torch.tensor(COLS)
            values = weight[rows][:, cols].clone().requires_grad_()
            self.values[port.weight] = values
            self.by_name |= dict(zip(port.input_names, (values, rows, cols), strict=False))
            self.by_name[port.handle_name] = torch.tensor([handle])

    def arguments(self, gm: fx.GraphModule, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        return [self.by_name[name] if name in self.by_name else inputs[name] for name in names]


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for module in graph_modules(gm) for node in module.graph.nodes if node.op == "call_function"]
