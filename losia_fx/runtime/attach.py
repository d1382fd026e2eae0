"""Puts a subnet onto the module that owns a weight, and keeps it right there: in checkpoints and through .to().

All hooks are module-level functions: a closure would keep the model from being pickled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.hooks import RemovableHandle

from losia_fx import registry
from losia_fx.errors import StateError, listed
from losia_fx.method.factored import Means
from losia_fx.model.kinds import is_sharded

from . import notices
from .in_8_bits import exchanged_apart, follow_a_load, make_dense
from .look import agreement_of, look_at, mend, train_state_of
from .quantised_weight import QuantisedWeight
from .state import ATTRIBUTE, SubnetState, own_states
from .take_in_shards import loaded_shards


def attach(state: SubnetState, rows: Tensor, cols: Tensor) -> None:
    """Registers S, rows and cols on the owner, and what keeps them out of checkpoints and in step with W."""
    owner = state.owner
    if ATTRIBUTE not in owner.__dict__:
        # Shadows the method on this object alone; recursion of .to() through parents finds it there.
        owner._apply = functools.partial(_apply_keeping_subnets, owner)  # type: ignore[method-assign]
    state.register(rows, cols)
    registrations: tuple[tuple[Callable[..., RemovableHandle], Callable[..., None]], ...] = (
        (owner.register_state_dict_pre_hook, _before_state_dict),
        (owner.register_state_dict_post_hook, _hide_subnets),
        (owner.register_load_state_dict_pre_hook, _before_load),
        (owner.register_load_state_dict_post_hook, _after_load),
    )
    for register, hook in registrations:
        state.hooks.append(register(hook))


def detach(state: SubnetState) -> None:
    """Takes everything off again; W stays as trained, and is dense."""
    make_dense(state)
    weight = state.owner._parameters.get(state.parameter)
    if weight is not None and (hook := registry.GRADIENT_HOOKS.pop(weight, None)) is not None:
        hook[1].remove()
    state.unregister()
    if ATTRIBUTE not in state.owner.__dict__:
        state.owner.__dict__.pop("_apply", None)


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    for state in own_states(module).values():
        if (train := train_state_of(state)) is not None:
            mend(train)
        look_at(state, values=True, shown=True)


def _hide_subnets(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for state in own_states(module).values():
        state_dict.pop(prefix + state.values_name, None)
        entry = state_dict.get(prefix + state.parameter)
        if isinstance(entry, QuantisedWeight) and not isinstance(entry, nn.Parameter):  # with keep_vars it is W itself
            state_dict[prefix + state.parameter] = entry.dense()


def _before_load(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Of what trains alone, as adapters are saved: its numbers are of a place, which nothing there tells."""
    for state in own_states(module).values():
        if prefix + state.values_name not in state_dict or prefix + state.parameter in state_dict:
            continue
        train = train_state_of(state)
        if train is not None and train.config.schedule != "static":
            notices.warn_by_place(train)


def _after_load(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    states = own_states(module)
    hidden = {state.values_name for state in states.values()}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key.rpartition(".")[2] not in hidden]
    for state in states.values():
        if is_sharded(state.weight):
            loaded_shards(state)
            continue
        agreement = agreement_of(state)
        if agreement is not None and not agreement.moved(state)[0]:
            look_at(state, values=True)  # what was loaded has no such weight: S may have been written before
            continue
        follow_a_load(state)
        state.reload()
        if agreement is not None:
            agreement.waiting.discard(state)
            agreement.remember([state], places=True)


def _apply_keeping_subnets(owner: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, but S is moved and never narrowed: .bfloat16() would round its small updates away.

    rows and cols keep what they say whatever becomes of the weights (to_empty()), and what a slot has gathered so far
    goes where its weight goes.
    """
    states = list(own_states(owner).values())
    for state in states:
        look_at(state, values=True)  # afterwards both have moved, and nobody could tell which was newer
    kept = [tensor for state in states for tensor in (state.values, state.values.grad)]
    indices = [index for state in states for index in (state.rows, state.cols)]

    def guarded(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if any(tensor is index for index in indices):
            if tensor.is_meta and not moved.is_meta:
                raise StateError(
                    f"{listed([state.name for state in states])}: where the subnets lie was lost on the meta device: "
                    "call losia_fx.transform once the weights are on a real one"
                )
            return tensor.to(moved.device)
        if moved.dtype == tensor.dtype or not any(tensor is subnet for subnet in kept):
            return moved
        return tensor.to(moved.device, torch.promote_types(tensor.dtype, moved.dtype))

    applied = exchanged_apart(states, lambda: type(owner)._apply(owner, guarded, recurse), fn)
    for state in states:
        _follow_device(state)
        if (agreement := agreement_of(state)) is not None:
            agreement.remember([state], places=True)
    return applied


def _follow_device(state: SubnetState) -> None:
    """W has been moved to another device: so is what is kept of it."""
    device = state.weight.device
    if state.packed is not None:
        state.packed.forget()
    if state.profile is not None:
        state.profile.to(device)
    if state.visits is not None:
        state.visits = state.visits[0].to(device), state.visits[1].to(device)
    if state.means is not None:
        state.means = Means(*(tensor.to(device) for tensor in state.means))
    if state.label_counts is not None:
        state.label_counts = state.label_counts.to(device)
