"""A weight in 8 bits instead of as it is (LosiaConfig.keep_dense=False): comes, follows what is loaded, and goes again.

What such a tensor is stands in quantised_weight.py, how S is written to it in method/write_through.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from losia_fx import registry
from losia_fx.errors import StateError
from losia_fx.model.kinds import is_sharded

from .quantised_weight import QuantisedWeight
from .state import SubnetState


def is_asked_for(state: SubnetState) -> bool:
    return state.packed is not None and state.packed.instead


@torch.no_grad()
def keep_in_8_bits(state: SubnetState, loaded: bool = False) -> None:
    """Rounds W to 8 bits, where that is asked for, in the place of the dense one, of which nothing is kept but with
    ``loaded``, until W is used."""
    if state.packed is None or not is_asked_for(state) or state.stored is not None or is_sharded(state.weight):
        return
    dense = state.weight
    made = QuantisedWeight.of(dense, state.packed.kind)
    if loaded:
        made.note_source(dense)
    _exchange(state, made)


@torch.no_grad()
def make_dense(state: SubnetState) -> None:
    """The values that W has, as a plain parameter in its place."""
    if (stored := state.stored) is not None:
        _exchange(state, stored.dense())


def _exchange(state: SubnetState, made: Tensor) -> None:
    parameter = nn.Parameter(made, requires_grad=state.weight.requires_grad)
    state.owner._parameters[state.parameter] = parameter
    registry.place(parameter, state)


@torch.no_grad()
def follow_a_load(state: SubnetState) -> None:
    """W was loaded: into its place, or as another tensor; the scales of a state that was loaded before it count."""
    if is_asked_for(state):
        keep_in_8_bits(state, loaded=True)
        take_awaited_scales(state)


@torch.no_grad()
def take_awaited_scales(state: SubnetState) -> None:
    """Gives W the scales of the LoSiA state that was loaded last, once it holds the subnet of that."""
    packed, stored = state.packed, state.stored
    if packed is None or stored is None or packed.awaited is None or stored.is_meta:
        return
    if stored.give_scales(packed.awaited, state.rows, state.cols, state.values):
        packed.awaited = None


def refuse_lost_writes(state: SubnetState) -> None:
    stored = state.stored
    if stored is not None and stored.lost_writes():
        raise StateError(
            f"{state.name}: was written through a view of it, and is kept in 8 bits (keep_dense=False), of which there "
            "are none: what was written is lost. copy_ all of it, write to its subnet "
            "(losia_fx.subnets(model)[name].values), or transform with keep_dense=True"
        )


@torch.no_grad()
def leave_places(states: Sequence[SubnetState], generator: torch.Generator) -> None:
    """Of subnets that are about to move: what W holds of S, rounded up or down at random, so that its mean is S.

    Rounded to the nearest, an update of less than half the distance of two numbers would be lost with every move.
    ``generator``, of the CPU, seeds one of each device; nothing waits for that.
    """
    stored = [state for state in states if state.stored is not None]
    if not stored:
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device="cpu"))
    for device in dict.fromkeys(state.weight.device for state in stored):
        own = torch.Generator(device).manual_seed(seed)
        some = [state for state in stored if state.weight.device == device]
        noise = torch.rand(sum(state.values.numel() for state in some), generator=own, device=device)
        for state, part in zip(some, noise.split([state.values.numel() for state in some]), strict=True):
            assert state.stored is not None
            state.stored.write(state.rows, state.cols, state.values, part.view_as(state.values))


def exchanged_apart(
    states: Iterable[SubnetState], apply: Callable[[], nn.Module], fn: Callable[[Tensor], Tensor]
) -> nn.Module:
    """nn.Module._apply as ``apply`` runs it, but a W in 8 bits becomes a new parameter: torch would exchange it with
    what fn gives, and refuses to where somebody holds a weak reference to it."""
    apart = [(state, stored) for state in states if (stored := state.stored) is not None]
    try:
        for state, _ in apart:
            state.owner._parameters[state.parameter] = None
        applied = apply()
    finally:
        for state, stored in apart:
            state.owner._parameters[state.parameter] = stored  # type: ignore[assignment]
    for state, stored in apart:
        with torch.no_grad():
            moved = fn(stored)
        if moved is not stored:
            _exchange(state, moved)
            keep_in_8_bits(state)
    return applied
