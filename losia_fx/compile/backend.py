"""The Dynamo backend: copy the graph -> plan -> passes -> inner compiler -> a callable that looks state up at run time.

One compiled graph may serve many layers and many models, so nothing of a subnet is closed over: which S, rows, cols and
handle go into a slot is decided by the weight that arrives with the call.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from losia_fx._compat import fake_inputs, inner_compiler, keep_saved_tensors, on_joint_graph
from losia_fx.config import LosiaConfig
from losia_fx.errors import ConfigError, LosiaWarning
from losia_fx.ops.first_order import only_once
from losia_fx.passes import (
    GraphPass,
    LoosenViews,
    Observer,
    RemakeInputs,
    SinkGathers,
    Uses,
    copy_graph_module,
    default_pipeline,
    find_uses,
    graph_modules,
    placeholders,
    plan_subnets,
    region_of,
)
from losia_fx.plan import SubnetPlan, SubnetSlot
from losia_fx.registry import GRAPH_USES, RAN_WITHOUT_GRAD, GraphUses
from losia_fx.runtime.outside import compiled_region, eager_linear, eager_weight
from losia_fx.runtime.state import SubnetState, find, resolve

log = logging.getLogger("losia_fx")

Adopt = Callable[[Sequence[nn.Parameter]], None]
"""Gives subnets to weights that have none yet (backend="losia" alone)."""
Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
"""What torch.compile takes as a backend."""
Watch = Callable[[fx.GraphModule, Sequence[Any], SubnetPlan], Observer]
"""Is shown each graph as Dynamo gave it, its inputs and its plan; what it returns sees the graph after each pass."""


class LosiaBackend:
    """A torch.compile backend that trains the subnets of the weights it is handed.

    config: what the inner compiler is, and whether anything is profiled. adopt: see Adopt; None leaves weights without
    a subnet as they are. inner: another inner compiler than the config's; watch: see Watch.
    """

    def __init__(
        self,
        config: LosiaConfig,
        adopt: Adopt | None = None,
        inner: Compiler | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.config, self.adopt, self.inner, self.watch = config, adopt, inner, watch

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        _refuse_options(options)
        if not torch.is_grad_enabled():
            found = (resolve(value) for value in example_inputs if _is_weight(value))
            RAN_WITHOUT_GRAD.update(state for state in found if state is not None)
            return gm.forward  # nothing learns here: the plain graph, uncompiled
        names = [node.name for node in placeholders(gm)]
        parameters = {n: value for n, value in zip(names, example_inputs, strict=True) if _is_weight(value)}
        if not parameters:
            if self.watch is not None:
                self.watch(gm, example_inputs, SubnetPlan((), ()))
            return self._compile(gm, example_inputs)
        copy = copy_graph_module(gm)  # a body that several regions share is several there: the plan tells them apart
        uses = find_uses(copy, {name: value.dim() for name, value in parameters.items()})
        adoptable: list[int] = []
        if self.adopt is not None:
            adoptable = [names.index(name) for name, found in uses.items() if found.only_products]
            self.adopt([example_inputs[position] for position in adoptable])
        states = {name: state for name, weight in parameters.items() if (state := resolve(weight)) is not None}
        plan = plan_subnets(copy, {name: state.facts for name, state in states.items()})
        _note_uses(parameters, uses, plan)
        observe = None if self.watch is None else self.watch(gm, example_inputs, plan)
        if plan.slots:
            replace(default_pipeline(plan, self.config), observe=observe)(copy)
        weights = [names.index(name) for name in parameters]
        return CompiledGraph(self, gm, copy, example_inputs, plan, weights, adoptable)

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        inner = self.inner or inner_compiler(self.config.compiler)
        edits: list[GraphPass] = [SinkGathers(), RemakeInputs()]
        if self.config.compiler == "aot_eager":
            edits.append(LoosenViews())
        with ExitStack() as compiling:
            compiling.enter_context(keep_saved_tensors())
            for edit in edits:
                compiling.enter_context(on_joint_graph(edit))
            return inner(gm, list(inputs))


class CompiledGraph:
    """One compiled graph, for every weight that arrives in its slots."""

    def __init__(
        self,
        backend: LosiaBackend,
        gm: fx.GraphModule,
        rewritten: fx.GraphModule,
        example_inputs: Sequence[Any],
        plan: SubnetPlan,
        weights: Sequence[int],
        adoptable: Sequence[int],
    ) -> None:
        """gm: the graph as Dynamo gave it. weights: positions of all parameters among the inputs; adoptable: of those
        that may be given a subnet."""
        self._adopt = backend.adopt
        self._adoptable = adoptable
        self._gm = gm
        self._uncompiled: fx.GraphModule | None = None
        self._slots = plan.slots
        self._handles = backend.config.profiles
        self._eager = backend.inner is None and backend.config.compiler == "eager"
        slotted = {slot.position for slot in plan.slots}
        self._bare = [position for position in weights if position not in slotted]
        extra = self._state(example_inputs)
        assert extra is not None
        self._compiled = backend._compile(rewritten, [*example_inputs, *fake_inputs(extra)])

    def __call__(self, *inputs: Any) -> Any:
        with compiled_region():
            extra = self._state(inputs)
            if extra is None:
                return self._run_uncompiled(inputs)
            results = self._compiled(*inputs, *extra)
            if not self._eager:
                only_once(results)
            return results

    def _state(self, inputs: Sequence[Any]) -> list[Tensor] | None:
        """S, rows and cols of each slot's weight, then the handles; None where a weight does not fit its slot."""
        tensors: list[Tensor] = []
        handles: list[Tensor] = []
        if self._adopt is not None:
            arrived = [inputs[position] for position in self._adoptable]
            if any(find(weight) is None for weight in arrived):
                self._adopt(arrived)
        for slot in self._slots:
            state = resolve(inputs[slot.position])
            if state is None or not _fits(state, slot):
                return None
            state.ran = True
            tensors += state.inputs()
            handles.append(state.handle)
        if any(find(inputs[position]) is not None for position in self._bare):
            return None
        return tensors + handles if self._handles else tensors

    def _run_uncompiled(self, inputs: Sequence[Any]) -> Any:
        """The graph, node by node, each linear as its weight's own state says: exact for any mixture of roles."""
        if self._uncompiled is None:
            self._uncompiled = uncompiled_graph(self._gm)
            warnings.warn(
                "losia_fx: a compiled graph met a layer whose weights play other roles than those it was compiled for "
                "(a layer excluded by name shares its graph, say); that layer runs exact but uncompiled",
                LosiaWarning,
                stacklevel=2,
            )
        return self._uncompiled(*inputs)


def _fits(state: SubnetState, slot: SubnetSlot) -> bool:
    facts = slot.facts
    same_size = state.size == (facts.rows, facts.cols) and state.whole_cols == facts.whole_cols
    return same_size and state.weight.dim() == facts.dims


def uncompiled_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which every use of an input asks, when it runs, whether that is a weight with a subnet."""
    copy = copy_graph_module(gm)
    for module in graph_modules(copy):
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target is F.linear:
                node.target = eager_linear
        for holder in placeholders(module):
            others = [user for user in holder.users if not _sees_to_itself(module, user, holder)]
            if others:
                with module.graph.inserting_after(placeholders(module)[-1]):
                    weight = module.graph.call_function(eager_weight, (holder,))
                for user in others:
                    user.replace_input_with(holder, weight)
        module.recompile()
    return copy


def _sees_to_itself(module: fx.GraphModule, user: fx.Node, holder: fx.Node) -> bool:
    """Regions look at their own inputs, and eager_linear at its weight; what is handed out keeps its identity."""
    if user.target is eager_linear:
        given = {**dict(zip(("input", "weight", "bias"), user.args, strict=False)), **user.kwargs}
        return given["weight"] is holder and holder not in (given["input"], given.get("bias"))
    return user.op == "output" or region_of(module, user) is not None


def _is_weight(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.dim() >= 2


def _note_uses(parameters: Mapping[str, nn.Parameter], uses: Mapping[str, Uses], plan: SubnetPlan) -> None:
    """For the report."""
    for name, found in uses.items():
        GRAPH_USES.setdefault(parameters[name], GraphUses()).named |= found.names
    for whole in plan.whole:
        slot = plan.slots[whole.slot]
        GRAPH_USES[parameters[slot.weight]].whole.add(whole.use)
        log.info("%s: used by %s: trained by its full gradient", slot.facts.fqn, whole.use)


def _refuse_options(options: dict[str, Any]) -> None:
    """The keywords that torch.compile hands to a backend: mode, and options (which losia_backend has taken)."""
    mode = options.get("mode")
    if mode is not None:
        raise ConfigError(
            f"mode={mode!r}: backend 'losia' takes no mode: the CUDA graphs that modes turn on replay a step without "
            "what its localization nodes do on the host. Choose the inner compiler with options={'compiler': ...}"
        )


def losia_backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile(model, backend="losia", options={...})``: options are the fields of LosiaConfig.

    A linear weight that requires grad learns through its subnet, anything else that does in full. For one process and a
    plain loop; Trainer, accelerate and distributed training want ``losia_fx.transform``.
    """
    from .string_way import adopt_weights  # the controller and its hooks are needed by this way only

    config = LosiaConfig.of(None, options.pop("options", None) or {})
    return LosiaBackend(config, lambda weights: adopt_weights(weights, config))(gm, example_inputs, **options)
