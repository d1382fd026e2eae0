"""What becomes of a model's graphs: as Dynamo gave them, after each pass, and as AOTAutograd's forward and backward.

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

from losia_fx._compat import aot_compiler, compile_call
from losia_fx.backend import LosiaBackend
from losia_fx.config import LosiaConfig
from losia_fx.controller import find_controller
from losia_fx.errors import LosiaError, LosiaWarning
from losia_fx.passes import Observer, copy_graph_module, placeholders, plan_subnets
from losia_fx.plan import SubnetFacts, SubnetPlan
from losia_fx.transform import RECOMPILE_LIMIT, CompiledCall, free_input_gradients, restore, transform

from .load_model import Example
from .owners import Names, annotate, mark_sites, weight_groups

DYNAMO, FORWARD, BACKWARD = "dynamo", "forward", "backward"
"""Stages: before any pass, and what AOTAutograd makes of the last pass's graph. A pass's stage has the pass's name."""


@dataclass
class CapturedGraph:
    """One graph of a model. Every node's meta says where it belongs: see losia_fx.tools.owners."""

    index: int
    plan: SubnetPlan
    stages: dict[str, fx.GraphModule] = field(default_factory=dict)
    """In the order in which they came about. BACKWARD is missing where nothing in the graph learns."""


@dataclass(frozen=True)
class Captured:
    model: str
    """The model's class."""
    config: LosiaConfig
    graphs: tuple[CapturedGraph, ...]
    dense: tuple[CapturedGraph, ...]
    """The plain model's graphs, where the same weights learn in full: no pass has run, so DYNAMO, FORWARD, BACKWARD."""
    groups: tuple[tuple[str, ...], ...]
    """Names of the weights with a subnet, by group."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of all graphs, in order."""
        found = {name: None for graph in self.graphs for name in graph.stages}
        last = [name for name in (FORWARD, BACKWARD) if name in found]
        return (*(name for name in found if name not in last), *last)


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
    facts = {state.name: state.facts for state in controller.states}
    learns = {name for name, p in twin.named_parameters() if p.requires_grad} | set(facts)
    groups = tuple(tuple(names) for names in controller.groups)

    ours = _Recorder(Names.of(twin), settings, weight_groups(groups))
    backend = LosiaBackend(settings, inner=ours.compile, watch=ours.watch)
    _step(twin, CompiledCall(twin, settings, backend), example)
    root = restore(twin)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in learns)
    plain = _Recorder(Names.of(root), settings, weight_groups(groups))
    free_input_gradients(root)
    _step(root, compile_call(root, plain.dense_backend(facts), RECOMPILE_LIMIT), example)
    return Captured(type(model).__name__, settings, tuple(ours.graphs), tuple(plain.graphs), groups)


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

    def __init__(self, names: Names, config: LosiaConfig, groups: Mapping[str, int]) -> None:
        self.graphs: list[CapturedGraph] = []
        self._names, self._config, self._groups = names, config, groups

    def watch(self, gm: fx.GraphModule, inputs: Sequence[Any], plan: SubnetPlan) -> Observer:
        graph = CapturedGraph(len(self.graphs), plan)
        self.graphs.append(graph)
        fqns = self._names.of_inputs(gm, inputs)

        def keep(stage: str, after: fx.GraphModule) -> None:
            kept = copy_graph_module(after)
            annotate(kept, self._names, fqns, plan, self._groups)
            graph.stages[stage] = kept

        keep(DYNAMO, gm)
        return keep

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The inner compiler. gm: what the last pass left of the graph that was watched last."""
        graph = self.graphs[-1]
        mark_sites(gm, graph.plan)  # AOTAutograd hands these marks on to the nodes that it makes
        last = graph.stages[list(graph.stages)[-1]]

        def keep(stage: str) -> Callable[[fx.GraphModule], None]:
            def keep_stage(made: fx.GraphModule) -> None:
                annotate(made, self._names, {}, graph.plan, self._groups, given=placeholders(last))
                graph.stages[stage] = made

            return keep_stage

        compiled: Callable[..., Any] = aot_compiler(self._config.compiler, keep(FORWARD), keep(BACKWARD))(
            gm, list(inputs)
        )
        return compiled

    def dense_backend(self, facts: Mapping[str, SubnetFacts]) -> Callable[..., Any]:
        """A backend that rewrites nothing; the products that would be rewritten are marked all the same."""

        def backend(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
            copied = copy_graph_module(gm)
            fqns = self._names.of_inputs(gm, inputs)
            plan = plan_subnets(copied, {holder: facts[fqn] for holder, fqn in fqns.items() if fqn in facts})
            self.watch(copied, inputs, plan)
            return self.compile(copied, inputs)

        return backend
