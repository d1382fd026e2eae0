"""Steps of several sharded subnets together: what they send goes in one collective where it can.

Every rank calls these with the same subnets; a set of them has another order in every process, so they are put in
order here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from losia_fx.method.factored import Seen, seen_in
from losia_fx.method.fit import LARGEST
from losia_fx.method.shards import Portion, joined, summed
from losia_fx.model.kinds import is_sharded

from .profile import Profile
from .shards import Shards, local
from .state import SubnetState

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # not in every build of torch

T = TypeVar("T")


def in_order(states: Iterable[SubnetState]) -> list[SubnetState]:
    """As they were made, which is the same order on every rank."""
    return sorted(states, key=lambda state: state.number)


def shards_of(state: SubnetState) -> Shards:
    assert state.shards is not None
    return state.shards


def _portions(states: Iterable[SubnetState]) -> list[Portion]:
    return [shards_of(state).values_portion for state in states]


def joined_values(states: Sequence[SubnetState], parts: Sequence[Tensor]) -> list[Tensor]:
    """Whole tensors of S's shape, of which this rank has ``parts``: an all-gather for each dtype among them."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(part.dtype for part in parts):
        at = [number for number, part in enumerate(parts) if part.dtype == dtype]
        whole = joined([parts[number] for number in at], _portions(states[number] for number in at))
        found |= dict(zip(at, whole, strict=True))
    return [found[number] for number in range(len(parts))]


@torch.no_grad()
def write_back(states: Iterable[SubnetState], values: Sequence[Tensor] | None = None) -> None:
    """W[rows, cols] = S, in W's dtype, a block at a time: one all-gather of its S, and each rank writes its own rows.

    values: this rank's portions of others than S, in the order of ``states``.
    """
    ordered = in_order(states) if values is None else list(states)
    parts = [state.values_here for state in ordered] if values is None else values
    narrow = [part.to(state.weight_here.dtype) for state, part in zip(ordered, parts, strict=True)]
    for _, block in itertools.groupby(zip(ordered, narrow, strict=True), key=lambda pair: _block(pair[0])):
        mine, own = zip(*block, strict=True)
        whole = own if shards_of(mine[0]).coincides else joined_values(mine, own)
        for state, each in zip(mine, whole, strict=True):
            shards_of(state).write(each)
    reshard(ordered)


def _block(state: SubnetState) -> tuple[int, bool]:
    return state.group, shards_of(state).coincides


def reshard(states: Iterable[SubnetState]) -> None:
    """What is unsharded still (the root's parameters after an evaluation) would not see what was written."""
    for module in dict.fromkeys(shards_of(state).module for state in states if shards_of(state).is_unsharded):
        module.reshard()


@torch.no_grad()
def same_values(states: Sequence[SubnetState]) -> list[bool]:
    """Whether W[rows, cols] is S as W can hold it, of each, on all ranks."""
    if not states:
        return []
    ordered, differ = in_order(states), []
    for state, block in zip(ordered, blocks(ordered), strict=True):
        mine, values = state.here(block), state.values_here.to(block.dtype)
        differ.append(((mine != values) & ~(mine.isnan() & values.isnan())).any().float())
    (counted,) = summed([torch.stack(differ)], shards_of(ordered[0]).portion.group)
    known = dict(zip(ordered, counted.tolist(), strict=True))
    return [not known[state] for state in states]


def blocks(states: Sequence[SubnetState]) -> list[Tensor]:
    """W[rows][:, cols] of each, whole: an all-reduce for each dtype among them."""
    found: dict[SubnetState, Tensor] = {}
    for dtype in dict.fromkeys(state.weight_here.dtype for state in states):
        alike = [state for state in states if state.weight_here.dtype == dtype]
        parts = [shards_of(state).own_block(state.weight_here) for state in alike]
        found |= dict(zip(alike, summed(parts, shards_of(alike[0]).portion.group), strict=True))
    return [found[state] for state in states]


def once(states: Sequence[SubnetState], write: Callable[[], None]) -> None:
    """Under FSDP2 the first rank does it, and the others wait for it, and raise what it raises."""
    if not states or states[0].shards is None:
        write()
        return
    mesh = states[0].shards.mesh
    failure: list[Exception | None] = [None]
    if not any(mesh.get_coordinate() or ()):
        try:
            write()
        except Exception as error:
            failure = [error]
    for dim in range(mesh.ndim):
        dist.broadcast_object_list(failure, group=mesh.get_group(dim), group_src=0)
    if failure[0] is not None:
        raise failure[0]


def of_all_ranks(parameters: Iterable[Tensor], own: T) -> list[T]:
    """What each rank has, in one order on all of them, where some of these are sharded; else ``own`` alone."""
    mesh = next((cast("DTensor", each).device_mesh for each in parameters if is_sharded(each)), None)
    found = [own]
    if mesh is None:
        return found
    for dim in range(mesh.ndim):
        each: list[list[T]] = [[] for _ in range(mesh.size(dim))]
        dist.all_gather_object(each, found, group=mesh.get_group(dim))
        found = [other for some in each for other in some]
    return found


@torch.no_grad()
def gather_anew(states: Iterable[SubnetState]) -> None:
    for state in in_order(states):
        state.gather_anew()


# -- importance -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def seen_gradients(states: Sequence[SubnetState]) -> dict[SubnetState, tuple[Tensor, Tensor, Tensor]]:
    """S.grad and G[rows][:, cols], whole, and whether G is finite, 0-dim: the same on every rank.

    states: in one order on every rank, each with a gradient on S and a Profile.
    """
    if not states:
        return {}
    grads = [_grad_of(state) for state in states]
    group = shards_of(states[0]).portion.group
    seen = joined_values(states, [local(grad) for state in states if (grad := state.values.grad) is not None])
    blocks = summed([shards_of(s).own_block(g) for s, g in zip(states, grads, strict=True)], group)
    (broken,) = summed([torch.stack([(~torch.isfinite(grad)).any().float() for grad in grads])], group)
    finite = (broken == 0).unbind()
    return {state: (s, b, f) for state, s, b, f in zip(states, seen, blocks, finite, strict=True)}


@torch.no_grad()
def seen_by(states: Sequence[SubnetState], grads: Sequence[Tensor]) -> list[Seen]:
    """What method.factored keeps of S.grad, of which this process has ``grads``, all of one dtype and device; the same
    on every rank. Sends r + c numbers a subnet."""
    if not states or states[0].shards is None:
        return seen_in(grads)
    squares, portions = [grad.square() for grad in grads], _portions(states)
    rows = joined([square.mean(-1) for square in squares], portions)
    experts = [n for n, state in enumerate(states) if shards_of(state).coincides]  # each of which some rank has whole
    matrices = [n for n in range(len(states)) if n not in experts]
    means, sums = [squares[n].mean(-2) for n in experts], [squares[n].sum(-2) / portions[n].length for n in matrices]
    cols = dict(zip(experts, joined(means, [portions[n] for n in experts]), strict=True))
    cols |= dict(zip(matrices, summed(sums, portions[0].group), strict=True))
    return [Seen(row, cols[n]) for n, row in enumerate(rows)]


def _grad_of(state: SubnetState) -> Tensor:
    profile = state.profile
    assert isinstance(profile, Profile)
    if profile.grad is None:  # S.grad outlived its G
        profile.grad = torch.zeros_like(state.weight_here, dtype=torch.float32)
    elif profile.grad.device.type == "cuda":  # made in a stream of FSDP2's, and given back here
        profile.grad.record_stream(torch.cuda.current_stream(profile.grad.device))
    return profile.grad


@torch.no_grad()
def largest_of_all(largest: Tensor, states: Sequence[SubnetState]) -> Tensor:
    """The largest elements (n,) of all ranks' gradients, n <= LARGEST of each: (ranks * LARGEST,), zeros where a rank
    has less."""
    group = shards_of(states[0]).portion.group
    return joined([largest], [Portion.of(dist.get_world_size(group) * LARGEST, group)])[0]
