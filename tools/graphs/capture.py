"""What becomes of a model's graphs: as Dynamo gave them, as AOTAutograd's joint graph, after each pass on either, and
as the forward and the backward that the joint graph is cut into.

>>> captured = capture(model, {"input_ids": ids, "labels": ids})
>>> print(captured.graphs[0].stages["insert-localization"].graph)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from losia_fx._compat import aot_compiler, compiled_apart
from losia_fx.api.transform import CompiledCall, transform
from losia_fx.compile.backend import LosiaBackend
from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaError, LosiaWarning
from losia_fx.passes import (
    DYNAMO,
    FORWARD_STAGES,
    JOINT,
    JOINT_STAGES,
    Observer,
    copy_graph_module,
    graph_modules,
    outputs_may_learn,
    placeholders,
)
from losia_fx.plan import SubnetPlan
from losia_fx.runtime.controller import find_controller
from losia_fx.runtime.quantised_weight import QuantisedWeight

from ..load_model import Example
from .places import Annotator, ModelNames, weight_groups

FORWARD, BACKWARD = "forward", "backward"
"""The last stages: what AOTAutograd cuts the joint graph into."""
STAGES = (*FORWARD_STAGES, *JOINT_STAGES, FORWARD, BACKWARD)
"""All that there are, in order; a pass's stage has the pass's name."""


@dataclass
class CapturedGraph:
    """One graph of a model. Every node says where it belongs: see tools.graphs.places."""

    index: int
    plan: SubnetPlan
    stages: dict[str, fx.GraphModule] = field(default_factory=dict)
    """By names of STAGES, in the order in which they came about. Those of the joint graph are missing where the
    config's compiler makes none, they and BACKWARD where nothing in the graph learns."""
    dense: dict[str, fx.GraphModule] = field(default_factory=dict)
    """FORWARD and BACKWARD of the graph as it was, with the same weights learning in full: what there is to save."""

    @property
    def rewritten(self) -> fx.GraphModule:
        """The forward's graph after the last pass on it."""
        return [gm for stage, gm in self.stages.items() if stage in FORWARD_STAGES][-1]


@dataclass(frozen=True)
class Captured:
    model: str
    """The model's class."""
    config: LosiaConfig
    graphs: tuple[CapturedGraph, ...]
    groups: tuple[tuple[str, ...], ...]
    """Names of the weights with a subnet, by group."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of all graphs, in order."""
        return tuple(name for name in STAGES if any(name in graph.stages for graph in self.graphs))


def capture(model: nn.Module, example: Any, config: LosiaConfig | None = None) -> Captured:
    """Runs a step (forward and backward, no optimizer) of a copy of ``model`` and keeps what the passes made of it.

    example: the arguments of one call (see Example.of). config: the defaults, or, of a model that is transformed
    already, its own; config.compiler says for which compiler AOTAutograd makes forward and backward, and nothing is
    compiled any further. The model is left as it was.
    Raises what transform() raises; LosiaError where the model cannot run a step on this example.
    """
    example = Example.of(example)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LosiaWarning)  # about what would be trained: nothing is, here
        if find_controller(twin) is None:
            transform(twin, config)
    controller = find_controller(twin)
    assert controller is not None
    settings = config or controller.config
    groups = tuple(tuple(names) for names in controller.groups)

    recorder = _Recorder(ModelNames.of(twin), settings, weight_groups(groups))
    backend = LosiaBackend(settings, inner=recorder.compile, watch=recorder.watch)
    _step(twin, CompiledCall(twin, settings, backend), example)
    return Captured(type(model).__name__, settings, tuple(recorder.graphs), groups)


def _step(model: nn.Module, call: Callable[..., Any], example: Example) -> None:
    model.zero_grad()
    try:
        with torch.enable_grad():
            outputs = [tensor for tensor in tensors_of(call(*example.args, **example.kwargs)) if tensor.requires_grad]
            if not outputs:
                raise LosiaError(f"no output of {type(model).__name__} depends on a weight that learns")
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    except LosiaError:
        raise
    except Exception as error:  # the model's own, Dynamo's, AOTAutograd's
        first = str(error).strip().partition("\n")[0]
        raise LosiaError(f"{type(model).__name__} cannot run a step: {type(error).__name__}: {first}") from error
    finally:
        model.zero_grad()


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The loss, where the output has one; else all tensors in it."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        loss = output.get("loss")
        for value in output.values() if loss is None else (loss,):
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)


class _Recorder:
    """Keeps the graphs of one model, from the backend that makes them."""

    def __init__(self, names: ModelNames, config: LosiaConfig, groups: Mapping[str, int]) -> None:
        self.graphs: list[CapturedGraph] = []
        self._names, self._config, self._groups = names, config, groups

    def watch(self, gm: fx.GraphModule, inputs: Sequence[Any], plan: SubnetPlan) -> Observer:
        graph = CapturedGraph(len(self.graphs), plan)
        self.graphs.append(graph)
        annotator, fqns = self._annotator(graph), self._names.of_inputs(gm, inputs)

        def keep(stage: str, after: fx.GraphModule) -> None:
            kept = copy_graph_module(after)
            before = None if stage in (DYNAMO, JOINT) else graph.stages[DYNAMO if stage in FORWARD_STAGES else JOINT]
            if stage in FORWARD_STAGES:
                annotator.annotate_forward(kept, fqns, before)
            else:
                annotator.annotate_traced(kept, placeholders(graph.rewritten), before)
            graph.stages[stage] = kept
            if stage == DYNAMO and plan.ports:
                self._compile_dense(after, graph)

        return keep

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The inner compiler. gm: what the last pass left of the graph that was watched last."""
        graph = self.graphs[-1]
        compiled = self._aot(gm, inputs, graph, graph.stages)
        if not graph.plan.ports:
            graph.dense |= {stage: made for stage, made in graph.stages.items() if stage in (FORWARD, BACKWARD)}
        return compiled

    def _compile_dense(self, gm: fx.GraphModule, graph: CapturedGraph) -> None:
        """AOTAutograd of the graph itself, were its weights not frozen for their subnets' sake."""
        inputs = [holder.meta["example_value"] for holder in placeholders(gm)]
        for port in graph.plan.ports:
            weight = inputs[port.position]
            weight = weight.dense() if isinstance(weight, QuantisedWeight) else weight
            inputs[port.position] = weight.detach().requires_grad_()
        plain = copy_graph_module(gm)
        for body in graph_modules(plain):
            if body is not plain:
                outputs_may_learn(body)
        with compiled_apart():
            self._aot(plain, inputs, graph, graph.dense)

    def _aot(
        self, gm: fx.GraphModule, inputs: Sequence[Any], graph: CapturedGraph, into: dict[str, fx.GraphModule]
    ) -> Callable[..., Any]:
        annotator, given = self._annotator(graph), placeholders(graph.rewritten)
        annotator.mark_sites(gm)  # AOTAutograd hands these marks on to the nodes that it makes

        def keep(stage: str) -> Callable[[fx.GraphModule], None]:
            def keep_stage(made: fx.GraphModule) -> None:
                annotator.annotate_traced(made, given)
                into[stage] = made

            return keep_stage

        compiler = aot_compiler(self._config.compiler, keep(FORWARD), keep(BACKWARD))
        compiled: Callable[..., Any] = compiler(gm, list(inputs))
        return compiled

    def _annotator(self, graph: CapturedGraph) -> Annotator:
        return Annotator(self._names, graph.plan, self._groups)
