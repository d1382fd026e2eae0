"""One compiled graph, for every weight that arrives at its ports; and the same graph uncompiled, for any other.

A compiled graph may serve many layers and many models, so nothing of a subnet is closed over: which S, rows, cols and
handle go into a port is decided by the weight that arrives with the call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from losia_fx.errors import LosiaWarning
from losia_fx.ops.first_order import only_once
from losia_fx.passes import copy_graph_module, graph_modules, placeholders, region_of
from losia_fx.plan import SubnetPort
from losia_fx.runtime.entered import compiled_region
from losia_fx.runtime.outside import eager_linear, eager_weight
from losia_fx.runtime.quantised_weight import QuantisedWeight
from losia_fx.runtime.state import SubnetState, find, resolve

GiveSubnets = Callable[[Sequence[nn.Parameter]], None]
"""Gives subnets to weights that have none yet (backend="losia" alone)."""


@dataclass(frozen=True)
class StateInputs:
    """What a rewritten graph takes beside the inputs of the graph that it was."""

    ports: Sequence[SubnetPort]
    handles: bool
    """Whether the graph has localization nodes."""
    others: Sequence[int]
    """Positions, among the inputs, of the parameters without a port: none of them may have a subnet."""
    fresh: Sequence[int] = ()
    """Positions of the weights that get a subnet where they come without one."""
    give_subnets: GiveSubnets | None = None
    packed: Sequence[int] = ()
    """Slots whose weights enter the graph in 8 bits too."""
    stored: Mapping[int, bool] = field(default_factory=dict)
    """Positions of the weights that are kept in 8 bits alone, and whether the graph takes their values all the same."""

    def of(self, inputs: Sequence[Any]) -> list[Tensor] | None:
        """S, rows and cols of each port's weight, then the handles, then what is packed; None where a weight does not
        fit its port."""
        if self.give_subnets is not None:
            arrived = [inputs[position] for position in self.fresh]
            if any(find(weight) is None for weight in arrived):
                self.give_subnets(arrived)
        tensors: list[Tensor] = []
        handles: list[Tensor] = []
        packed: list[Tensor] = []
        for port in self.ports:
            state = resolve(inputs[port.position])
            if state is None or not _fits(state, port):
                return None
            state.ran = True
            tensors += state.inputs()
            handles.append(state.handle)
            if port.index in self.packed:
                packed += state.packed_inputs()
        if any(find(inputs[position]) is not None for position in self.others):
            return None
        return tensors + (handles if self.handles else []) + packed

    def plain(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs with no weight in 8 bits among them, so that no inner compiler meets one: it is dense where the
        graph takes its values, and elsewhere a tensor without memory."""
        found = list(inputs)
        for at, valued in self.stored.items():
            weight = inputs[at]
            if isinstance(weight, QuantisedWeight):
                found[at] = weight.dense() if valued else weight.stand_in()
        return found


def takes_values(gm: fx.GraphModule, holder: fx.Node) -> bool:
    """Whether an input of ``gm`` is used anywhere, in regions too."""
    for user in holder.users:
        region = region_of(gm, user)
        if region is None or any(takes_values(region.body, each) for each, outer in region.passed() if outer is holder):
            return True
    return False


def _fits(state: SubnetState, port: SubnetPort) -> bool:
    facts = port.facts
    same_size = state.size == (facts.rows, facts.cols) and state.whole_cols == facts.whole_cols
    return same_size and state.weight.dim() == facts.dims and state.products == facts.packed


@dataclass
class CompiledGraph:
    """What Dynamo runs in the place of a graph of its."""

    gm: fx.GraphModule
    """As Dynamo gave it."""
    compiled: Callable[..., Any]
    """Takes the graph's inputs, and their state behind them."""
    state_inputs: StateInputs
    first_order: bool
    """Whether AOTAutograd has made the backward, which has no derivative of its own."""
    _uncompiled: fx.GraphModule | None = field(default=None, init=False)

    def __call__(self, *inputs: Any) -> Any:
        with compiled_region():
            state = self.state_inputs.of(inputs)
            if state is None:
                return self._run_uncompiled(inputs)
            results = self.compiled(*self.state_inputs.plain(inputs), *state)
            if self.first_order:
                only_once(results)
            return results

    def _run_uncompiled(self, inputs: Sequence[Any]) -> Any:
        """The graph, node by node, each linear as its weight's own state says: exact for any mixture of roles."""
        if self._uncompiled is None:
            self._uncompiled = uncompiled_graph(self.gm)
            warnings.warn(
                "losia_fx: a compiled graph met a layer whose weights play other roles than those it was compiled for "
                "(a layer excluded by name shares its graph, say); that layer runs exact but uncompiled",
                LosiaWarning,
                stacklevel=2,
            )
        return self._uncompiled(*inputs)


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
