"""The Dynamo backend: copy the graph -> plan -> passes -> inner compiler -> a callable that finds state as it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn

from losia_fx._compat import backend_at_work, fake_inputs, inner_compiler, keep_saved_tensors, on_joint_graph
from losia_fx.config import LosiaConfig
from losia_fx.errors import ConfigError
from losia_fx.passes import (
    Observer,
    Uses,
    copy_graph_module,
    find_uses,
    forward_pipeline,
    joint_pipeline,
    makes_joint_graphs,
    placeholders,
    plan_subnets,
)
from losia_fx.plan import SubnetPlan
from losia_fx.registry import AT_ODDS, BACKENDS, GRAPH_USES, RAN_WITHOUT_GRAD, GraphUses
from losia_fx.runtime.quantised_weight import QuantisedWeight
from losia_fx.runtime.state import resolve

from .graph import CompiledGraph, GiveSubnets, StateInputs, takes_values

log = logging.getLogger("losia_fx")

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
"""What torch.compile takes as a backend."""
Watch = Callable[[fx.GraphModule, Sequence[Any], SubnetPlan], Observer]
"""Is shown each graph as Dynamo gave it, its inputs and its plan; what it returns sees every stage of that graph."""


class LosiaBackend:
    """A torch.compile backend that trains the subnets of the weights it is handed.

    config: what the inner compiler is, and whether anything is profiled. give_subnets: see GiveSubnets; None leaves
    weights without a subnet as they are. inner: another inner compiler than the config's; watch: see Watch.
    """

    def __init__(
        self,
        config: LosiaConfig,
        give_subnets: GiveSubnets | None = None,
        inner: Compiler | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.config, self.give_subnets, self.inner, self.watch = config, give_subnets, inner, watch
        BACKENDS[self] = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        _refuse_options(options)
        if (around := backend_at_work()) is not None:
            BACKENDS[around] = None  # a function of a user's that calls us
        if not torch.is_grad_enabled():
            found = (resolve(value) for value in example_inputs if _is_weight(value))
            RAN_WITHOUT_GRAD.update(state for state in found if state is not None)
            return gm.forward  # nothing learns here: the plain graph, uncompiled
        names = [node.name for node in placeholders(gm)]
        parameters = {n: value for n, value in zip(names, example_inputs, strict=True) if _is_weight(value)}
        if not parameters:
            return self._compile(gm, example_inputs, self._rewrite(gm, gm, example_inputs, SubnetPlan((), ())))
        copy = copy_graph_module(gm)  # a body that several regions share is several there: the plan tells them apart
        uses = find_uses(copy, {name: value.dim() for name, value in parameters.items()})
        fresh: list[int] = []
        if self.give_subnets is not None:
            fresh = [names.index(name) for name, found in uses.items() if found.only_products]
            self.give_subnets([example_inputs[position] for position in fresh])
        states = {name: state for name, weight in parameters.items() if (state := resolve(weight)) is not None}
        if self.give_subnets is not None:  # the user's requires_grad says what learns
            AT_ODDS.update(s for s in states.values() if s.values.requires_grad and not s.weight.requires_grad)
        plan = plan_subnets(copy, {name: state.facts for name, state in states.items()})
        _note_uses(parameters, uses, plan)
        observe = self._rewrite(gm, copy, example_inputs, plan)
        others = [names.index(name) for name in parameters if name not in {port.weight for port in plan.ports}]
        holders = zip(placeholders(copy), example_inputs, strict=False)  # those of the passes are behind them
        stored = {
            at: takes_values(copy, holder)
            for at, (holder, value) in enumerate(holders)
            if isinstance(value, QuantisedWeight)
        }
        state_inputs = StateInputs(
            plan.ports, self.config.profiles, others, fresh, self.give_subnets, plan.packed_ports, stored
        )
        extra = state_inputs.of(example_inputs)
        assert extra is not None
        compiled = self._compile(copy, [*_plain(state_inputs, example_inputs), *fake_inputs(extra)], observe)
        plain = self.inner is None and self.config.compiler == "eager"
        return CompiledGraph(gm, compiled, state_inputs, first_order=not plain)

    def _rewrite(
        self, gm: fx.GraphModule, copy: fx.GraphModule, inputs: Sequence[Any], plan: SubnetPlan
    ) -> Observer | None:
        """Runs the passes of the forward on the copy; returns who is to see those of the joint graph, too."""
        observe = None if self.watch is None else self.watch(gm, inputs, plan)
        forward_pipeline(plan, self.config, observe)(copy)
        return observe

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any], observe: Observer | None) -> Callable[..., Any]:
        inner = self.inner or inner_compiler(self.config.compiler)
        with ExitStack() as compiling:
            compiling.enter_context(keep_saved_tensors())
            if makes_joint_graphs(self.config):
                compiling.enter_context(on_joint_graph(joint_pipeline(self.config, observe)))
            return inner(gm, list(inputs))


def _is_weight(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.dim() >= 2


def _plain(state_inputs: StateInputs, inputs: Sequence[Any]) -> list[Any]:
    """``StateInputs.plain``: what it puts in the place of an input is unknown to Dynamo."""
    pairs = zip(inputs, state_inputs.plain(inputs), strict=True)
    return [value if value is given else fake_inputs([value])[0] for given, value in pairs]


def _note_uses(parameters: Mapping[str, nn.Parameter], uses: Mapping[str, Uses], plan: SubnetPlan) -> None:
    """For the report."""
    for name, found in uses.items():
        GRAPH_USES.setdefault(parameters[name], GraphUses()).named |= found.names
    for whole in plan.whole:
        port = plan.ports[whole.port]
        GRAPH_USES[parameters[port.weight]].whole.add(whole.use)
        log.info("%s: used by %s: trained by its full gradient", port.facts.fqn, whole.use)
    for site in plan.sites:
        port = plan.ports[site.port]
        if port.facts.packed is not None and not site.packed:
            GRAPH_USES[parameters[port.weight]].unpacked.add(site.use)


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
    from .string_way import give_subnets  # the controller and its hooks are needed by this way only

    config = LosiaConfig.of(None, options.pop("options", None) or {})
    return LosiaBackend(config, lambda weights: give_subnets(weights, config))(gm, example_inputs, **options)


BACKENDS[losia_backend] = None
