"""Calls of modules whose weights have subnets, where no graph of ours holds them: step 1 of outside.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from losia_fx import registry
from losia_fx._compat import is_transformed, runs_uncompiled

from .entered import ENTERED
from .functional import subnets_in_place
from .look import follow_before_copy, holds_parameters, look_at
from .outside import EagerSubnets, ask_for_gradients, stop_asking
from .state import SubnetState, own_states, states_of
from .watch import Watch, refuse_shallow


def watch(owners: Iterable[nn.Module], around: Iterable[nn.Module]) -> list[Watch]:
    """Has modules see to their weights also where no graph does.

    owners: modules that hold a weight with a subnet; what they do with it goes through the subnet. around: the modules
    right around them, which may use their weights without calling them; there the weights ask for their gradient.
    """
    by_call = ((call_owner, owners), (call_around, around))
    return [Watch(module, call, follow_before_copy) for call, modules in by_call for module in modules]


@runs_uncompiled
def call_owner(watch: Watch, *args: Any, **kwargs: Any) -> Any:
    """Calls a module whose weights have subnets. Running at all means: no graph of ours holds this call."""
    return _after_a_look(_call_owner, watch, args, kwargs)


@runs_uncompiled
def call_around(watch: Watch, *args: Any, **kwargs: Any) -> Any:
    """Calls a module right around those, which may use their weights without calling them."""
    return _after_a_look(_call_around, watch, args, kwargs)


@runs_uncompiled
def _after_a_look(call: Callable[..., Any], watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """At all weights within, however the module uses them (nn.MultiheadAttention takes its out_proj's, the fast path of
    nn.TransformerEncoderLayer that of its child's child): unless a module around it, or the whole model, has done so.
    """
    before, within = ENTERED.looked, states_of(watch.module)
    if not ENTERED.calls:
        refuse_shallow(watch.module)
        fresh = [state for state in within if state not in before]
        for state in fresh:
            look_at(state)
        ENTERED.looked = before.union(fresh)
    try:
        if is_transformed() or not all(map(holds_parameters, within)):
            return _call_with_others(watch, within, args, kwargs)
        return call(watch, args, kwargs)
    finally:
        ENTERED.looked = before


@runs_uncompiled
def _call_with_others(
    watch: Watch, within: Sequence[SubnetState], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Under torch.func (vmap, grad, jvp), which knows none of our ops, and with tensors that were given in the
    parameters' place: W is an ordinary tensor made of S, or the one that was given."""
    if ENTERED.in_place:
        return watch.plain(*args, **kwargs)
    try:
        ENTERED.in_place = True
        with subnets_in_place(within):
            return watch.plain(*args, **kwargs)
    finally:
        ENTERED.in_place = False


@runs_uncompiled
def _call_owner(watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        if ENTERED.calls:
            registry.RAN_WITHOUT_GRAD.update(own_states(watch.module).values())
        return watch.plain(*args, **kwargs)
    if ENTERED.modes:  # a module around this one has seen to it
        return watch.plain(*args, **kwargs)
    ENTERED.modes += 1
    try:
        with EagerSubnets():
            return watch.plain(*args, **kwargs)
    finally:
        ENTERED.modes -= 1


@runs_uncompiled
def _call_around(watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        return watch.plain(*args, **kwargs)
    inside = [state for child in watch.module.children() for state in own_states(child).values()]
    asked: list[nn.Parameter] = []
    try:
        ask_for_gradients(inside, asked)
        return watch.plain(*args, **kwargs)
    finally:
        stop_asking(asked)
