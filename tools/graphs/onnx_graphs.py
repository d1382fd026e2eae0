"""The rewritten graphs of a model as modules that torch.onnx can export, each product a node losia::SubnetLinear."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import losia_fx
from losia_fx.api.transform import CompiledCall
from losia_fx.compile.backend import LosiaBackend
from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaError, LosiaWarning
from losia_fx.ops.experts import subnet_batched, subnet_grouped
from losia_fx.passes import Observer, Product, Rewritten, copy_graph_module, placeholders, rewritten_from
from losia_fx.plan import SubnetPlan, SubnetPort
from losia_fx.runtime.controller import find_controller

from ..load_model import Example
from .places import Annotator, ModelNames, place_of, weight_groups

LINEAR, BATCHED = "SubnetLinear", "SubnetBatched"


@dataclass(frozen=True)
class LinearUse:
    """A losia::SubnetLinear of the forward, for its backward. weight is (out, in) as the product takes it."""

    parameter: str
    attributes: Mapping[str, Any]
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Tensor
    cols: Tensor | None
    """None where every column learns."""


@dataclass
class RewrittenGraph:
    """One graph of the forward, after SubnetRewrite, and what goes into it."""

    gm: fx.GraphModule
    plan: SubnetPlan
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Placeholder -> parameter, buffer or subnet's state, detached."""
    names: dict[str, str] = field(default_factory=dict)
    """Placeholder -> the name of that in the model."""
    batch: dict[str, Any] = field(default_factory=dict)
    """Placeholder -> value, for the inputs that come from outside the model."""
    groups: dict[str, int] = field(default_factory=dict)
    uses: list[LinearUse] = field(default_factory=list)
    """Of the last run (torch.export takes back what a run changes in the module itself)."""


def rewritten_graphs(model: nn.Module, example: Example, config: LosiaConfig) -> list[RewrittenGraph]:
    """The graphs of the forward in which anything is rewritten, without localization and in evaluation mode."""
    twin = copy.deepcopy(model).eval()
    use_batched = getattr(twin, "set_experts_implementation", None)
    if use_batched is not None:  # ONNX knows no grouped product; transformers' experts have another form
        use_batched("batched_mm")
    if find_controller(twin) is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LosiaWarning)
            losia_fx.transform(twin, config)
    taken = _Taken(twin, example)
    backend = LosiaBackend(config, inner=taken.compile, watch=taken.watch)
    try:
        with torch.enable_grad():
            CompiledCall(twin, config, backend)(*example.args, **example.kwargs)
    except LosiaError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise LosiaError(f"{type(model).__name__} cannot run: {type(error).__name__}: {first}") from error
    return [graph for graph in taken.graphs if graph.plan.ports]


class _Taken:
    """Takes graphs and their inputs from the backend."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.graphs: list[RewrittenGraph] = []
        self._names = ModelNames.of(model)
        self._groups = weight_groups(losia_fx.controller(model).groups)
        self._states = losia_fx.subnets(model)
        self._called = {id(value): name for name, value in example.kwargs.items()}
        self._called |= {id(value): f"input_{index}" for index, value in enumerate(example.args)}

    def watch(self, gm: fx.GraphModule, inputs: Sequence[Any], plan: SubnetPlan) -> Observer:
        fqns = self._names.of_inputs(gm, inputs)
        graph = RewrittenGraph(gm, plan, groups=self._groups)
        self.graphs.append(graph)
        for holder, value in zip(placeholders(gm), inputs, strict=True):
            if holder.name in fqns:
                graph.names[holder.name] = fqns[holder.name]
                graph.tensors[holder.name] = value.detach()
            else:
                graph.batch[holder.name] = value
                graph.names[holder.name] = self._called.get(id(value), holder.name)
        for port in plan.ports:
            subnet = self._states[port.facts.fqn]
            for holder_name, part in zip(port.input_names, ("values", "rows", "cols"), strict=False):
                graph.tensors[holder_name] = getattr(subnet, part).detach()
                graph.names[holder_name] = f"{port.facts.fqn}_subnet" + ("" if part == "values" else f"_{part}")

        def keep(stage: str, after: fx.GraphModule) -> None:
            graph.gm = copy_graph_module(after)
            Annotator(self._names, plan, self._groups).annotate_forward(graph.gm, fqns)

        return keep

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return gm.forward


class ExportableGraph(nn.Module):
    """Runs a rewritten graph; its parameters keep their names, so that ONNX initializers do."""

    def __init__(self, graph: RewrittenGraph, config: LosiaConfig) -> None:
        super().__init__()
        self._graph, self._config = graph, config
        for name, tensor in graph.tensors.items():
            owner, _, key = graph.names[name].rpartition(".")
            holder = _module(self, owner)
            if key not in holder._buffers:
                holder.register_buffer(key, tensor)

    def forward(self, *batch: Any) -> Any:
        self._graph.uses.clear()
        given = dict(zip(self._graph.batch, batch, strict=True))
        for name in self._graph.tensors:
            owner, _, key = self._graph.names[name].rpartition(".")
            given[name] = getattr(_module(self, owner), key)
        inputs = [given[holder.name] for holder in placeholders(self._graph.gm)]
        return _Exporter(self, self._graph, self._config).run(*inputs)


class _Scope(nn.Module):
    """A module of the model, by its name alone: what runs within it is exported under that name."""

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def _module(root: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if part not in root._modules:
            root.add_module(part, _Scope())
        root = getattr(root, part)
    return root


class _Exporter(fx.Interpreter):
    """Runs the graph node by node: rewritten products become symbolic ONNX nodes, every node tells its module."""

    def __init__(self, root: nn.Module, graph: RewrittenGraph, config: LosiaConfig) -> None:
        super().__init__(graph.gm)
        self._root, self._graph, self._config = root, graph, config

    def run_node(self, n: fx.Node) -> Any:
        place = place_of(n)
        if n.op not in ("call_function", "call_method") or place is None or not place.owner:
            return self._run_alone(n)
        return _module(self._root, place.owner)(lambda: self._run_alone(n))

    def _run_alone(self, n: fx.Node) -> Any:
        rewritten = rewritten_from(n)
        if rewritten is None:
            return super().run_node(n)
        return self._symbol(n, self.map_nodes_to_values(n.args, n), rewritten)

    def _symbol(self, node: fx.Node, args: Any, rewritten: Rewritten) -> Tensor:
        port, product = self._graph.plan.ports[rewritten.site.port], rewritten.product
        facts = port.facts
        if product is None:
            whole: Tensor = args[0]
            return whole
        if node.target is subnet_grouped:
            raise LosiaError(f"{facts.fqn}: ONNX has no grouped product of experts, and the model offers no other form")
        x, weight, values, rows, cols = args[:5]
        attributes = {
            "parameter": facts.fqn,
            "group": self._graph.groups[facts.fqn],
            "rank_factor": self._config.output_rank_factor if facts.whole_cols else self._config.rank_factor,
        }
        if cols is None:
            cols = torch.arange(weight.shape[1], device=weight.device)
        if node.target is subnet_batched:
            return _symbolic(BATCHED, (x, weight, values, rows, cols), attributes, (*x.shape[:-1], weight.shape[2]))
        self._note(product, port, attributes, x, weight)
        y = _symbolic(LINEAR, (x, weight, values, rows, cols), attributes, (*x.shape[:-1], weight.shape[0]))
        return y if args[5] is None else y + args[5]

    def _note(
        self, product: Product, port: SubnetPort, attributes: Mapping[str, Any], x: Tensor, weight: Tensor
    ) -> None:
        if product.view.expert is not None:  # which expert it is, only the graph knows
            return
        state = [self._graph.tensors[name] for name in port.input_names]
        rows, cols = state[1], state[2] if len(state) > 2 else None
        if product.transposed and cols is not None:
            rows, cols = cols, rows
        shapes = tuple(x.shape), tuple(weight.shape)
        self._graph.uses.append(LinearUse(port.facts.fqn, attributes, *shapes, x.dtype, rows, cols))


def _symbolic(name: str, inputs: Sequence[Tensor], attributes: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
    attrs: Any = dict(attributes)
    y: Tensor = torch.onnx.ops.symbolic(
        f"losia::{name}", inputs, attrs=attrs, dtype=inputs[0].dtype, shape=shape, version=1
    )
    return y
