"""backend="losia" alone: weights get subnets when the backend first sees them, in a model nobody named to us."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from losia_fx._compat import OptimizedModule, compiled_call, ddp_group
from losia_fx.config import LosiaConfig
from losia_fx.errors import TransformError
from losia_fx.model.blocks import find_blocks, group_names
from losia_fx.model.refusals import refuse_hooked
from losia_fx.model.roles import judge_weights, refuse_float8
from losia_fx.registry import DENSE, TRAINED
from losia_fx.runtime.attach import attach
from losia_fx.runtime.choose import random_selection
from losia_fx.runtime.controller import Controller, controller_of
from losia_fx.runtime.expected import say_expected
from losia_fx.runtime.living import living
from losia_fx.runtime.optimizer_state import adopt_subnets
from losia_fx.runtime.optimizers import live_optimizers
from losia_fx.runtime.outside import ask_for_gradients
from losia_fx.runtime.state import SubnetState, resolve
from losia_fx.runtime.watch import Watch


def give_subnets(weights: Sequence[nn.Parameter], config: LosiaConfig) -> None:
    """Gives a subnet to each weight that requires grad and has none, and to the optimizers that hold it.

    All linears of a compiled module get theirs with the first of them, also those that Dynamo then leaves in eager.
    Raises TransformError where more than one process trains: each would choose and train its own subnets; ConfigError
    for patterns that match nothing.
    """
    if ddp_group() is not None or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        _refuse_ddp()
    fresh = [weight for weight in weights if weight.requires_grad and not _is_known(weight)]
    if not fresh:
        return
    for root, mine in _by_root(fresh):
        _give_subnets_in(root, mine, config)
    DENSE.update({id(weight): weight for weight in fresh if resolve(weight) is None})


def _is_known(weight: nn.Parameter) -> bool:
    return DENSE.get(id(weight)) is weight or resolve(weight) is not None


def _refuse_ddp() -> None:
    raise TransformError(
        "backend='losia' by itself is for one process: under DistributedDataParallel the ranks would train apart. "
        "Call losia_fx.transform(model) before wrapping the model, and drop the backend string"
    )


def _give_subnets_in(root: nn.Module, weights: set[int], config: LosiaConfig) -> None:
    plans = judge_weights(root, config, everywhere=True)
    mine = [plan for plan in plans if plan.parameter.requires_grad and id(plan.parameter) in weights]
    refuse_float8(mine)
    refuse_hooked(mine)
    if not config.keep_dense:
        raise TransformError(
            'keep_dense=False puts other parameters in the place of weights, which backend="losia" by itself does not: '
            "call losia_fx.transform(model), or drop keep_dense"
        )
    if config.head_rows == "frequent" and any(plan.whole_cols and id(plan.parameter) in weights for plan in plans):
        raise TransformError(
            'head_rows="frequent" counts the labels that a model is called with, which backend="losia" by itself does '
            "not see: call losia_fx.transform(model), or take another head_rows"
        )
    controller = controller_of(root) or Controller(root, config, by_string=True)
    states = {state.name: state for state in controller.states}
    for plan in plans:
        learns = plan.trained == "subnet" and plan.parameter.requires_grad and plan.name not in states
        if learns and id(plan.parameter) in weights:
            _, owner, key = plan.owners[0]
            state = SubnetState(owner, key, plan.name, config, plan.whole_cols)
            first = random_selection(state, controller.train.progress.generator)
            attach(state, first.rows, first.cols)
            ask_for_gradients([state], [])
            controller.watch([name for name, _, _ in plan.owners])
            states[plan.name] = state
    if config.frozen_products is not None and any(state.packed is not None for state in states.values()):
        say_expected(list(states.values()), config.frozen_products)
    ordered = [states[plan.name] for plan in plans if plan.name in states]
    heads = [state.name for state in ordered if state.whole_cols]
    controller.set_groups(ordered, group_names([state.name for state in ordered], heads, find_blocks(root)))
    for optimizer in live_optimizers():
        adopt_subnets(optimizer, ordered)


def _by_root(weights: Sequence[nn.Parameter]) -> list[tuple[nn.Module, set[int]]]:
    """The outermost modules around the weights, each with the ids of the parameters that are to get subnets."""
    found: list[tuple[nn.Module, set[int]]] = []
    missing = {id(weight) for weight in weights}
    for train in list(TRAINED):
        known = missing & {id(parameter) for parameter in train.root.parameters()}
        if known:
            found.append((train.root, _whole_modules(train.root, known)))
            missing -= known
    return found + (_ModuleTree().by_root(missing) if missing else [])


def _whole_modules(root: nn.Module, seen: set[int]) -> set[int]:
    """``seen``, and the parameters of every module compiled in place that holds one of them."""
    wanted = set(seen)
    for module in root.modules():
        if _is_compiled(module):
            inside = {id(parameter) for parameter in module.parameters()}
            if inside & seen:
                wanted |= inside
    return wanted


def _is_compiled(module: nn.Module) -> bool:
    """By Module.compile(), or by torch.compile(module) around it."""
    call = compiled_call(module)
    in_place = call is not None and (not isinstance(call, Watch) or call.before is not None)
    return in_place or isinstance(module, OptimizedModule)


class _ModuleTree:
    """Every module of the process with its parents: what is compiled may be a part (block compile), and groups need
    the whole. One pass over gc's objects, at the first sight of a model."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = living(nn.Module)
        self._parents: dict[int, list[nn.Module]] = {}
        for module in self._modules:
            for child in module.__dict__.get("_modules", {}).values():
                if child is not None:
                    self._parents.setdefault(id(child), []).append(module)

    def by_root(self, weights: set[int]) -> list[tuple[nn.Module, set[int]]]:
        """As _by_root, for parameters given by id. A bare Parameter outside of any module is the user's own affair."""
        roots: dict[int, tuple[nn.Module, set[int]]] = {}
        for module in self._modules:
            held = {id(p) for p in module.__dict__.get("_parameters", {}).values() if p is not None} & weights
            if held:
                root = self._root(module)
                roots.setdefault(id(root), (root, set()))[1].update(held)
        return [(root, self._wanted(root, seen)) for root, seen in roots.values()]

    def _wanted(self, root: nn.Module, seen: set[int]) -> set[int]:
        wrapped = any(isinstance(parent, OptimizedModule) for parent in self._parents.get(id(root), []))
        return {id(parameter) for parameter in root.parameters()} if wrapped else _whole_modules(root, seen)

    def _root(self, module: nn.Module) -> nn.Module:
        reached, front = [module], [module]
        while front:
            front = [parent for child in front for parent in self._parents.get(id(child), [])]
            front = [parent for parent in front if not any(parent is known for known in reached)]
            reached += front
        if any(isinstance(parent, DistributedDataParallel) for parent in reached):
            _refuse_ddp()
        named = [parent for parent in reached if not isinstance(parent, OptimizedModule)]
        return max(named, key=lambda parent: sum(1 for _ in parent.modules()))
