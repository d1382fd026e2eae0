"""An optimizer's state of a subnet: made anew where the subnet moves, and taken over from the whole weight's."""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losia_fx import registry

from .evidence import points_alike
from .moves import KeepsOverMoves
from .optimizers import inner_optimizers, parameters_of
from .state import SubnetState


@dataclass(frozen=True)
class Entry:
    """An entry of an optimizer's state of one parameter that its constructor makes."""

    value: Any
    """None where it is a copy of the parameter."""

    def make(self, values: Tensor) -> Any:
        return values.detach().clone() if self.value is None else copy.deepcopy(self.value)


CONSTRUCTED: MutableMapping[Optimizer, MutableMapping[SubnetState, dict[str, Entry]]] = registry.CONSTRUCTED


def restart_states(
    optimizers: Iterable[Optimizer],
    states: Sequence[SubnetState],
    carry_over: Callable[[Optimizer, SubnetState], bool] | None = None,
    apart: Iterable[Apart] | None = None,
) -> None:
    """As _restart for each subnet and optimizer; of those that share a state, a wrapper and what it stands around,
    for the inner. carry_over: may make the state of a subnet in another way, and says whether it has. apart: what they
    keep elsewhere, as it was before the subnets moved."""
    inner = [each for optimizer in optimizers for each in inner_optimizers(optimizer)]
    ordered = dict.fromkeys((*reversed(inner), *optimizers))
    apart = kept_apart(ordered, states, moved=True)[0] if apart is None else apart
    done: set[int] = set()
    for optimizer in ordered:
        if id(optimizer.state) not in done:
            done.add(id(optimizer.state))
            keeps = optimizer if isinstance(optimizer, KeepsOverMoves) else None  # asked once: it costs as a move does
            for state in states:
                if keeps is not None:
                    keeps.after_subnet_move(state.values)
                elif carry_over is None or not carry_over(optimizer, state):
                    _restart(optimizer, state)
    for each in apart:
        each.renew()


def _restart(optimizer: Optimizer, state: SubnetState) -> None:
    """Moments and step count of a subnet that has moved start anew: the optimizer makes them again at its next step.

    What it makes in its constructor only (Adagrad's sum, a seed for each parameter, Lookahead's slow copy) is put back
    as the constructor would make it. Fused SGD takes momentum of all its parameters or of none: a momentum of zero,
    which (without dampening) steps as a fresh one. So does Adam from zeros; of a sharded model they stay, as
    torch.distributed.checkpoint refuses to load an optimizer of which a parameter has no state.
    """
    values = state.values
    old = optimizer.state.pop(values, None)
    made = {key: entry.make(values) for key, entry in _constructed(optimizer).get(state, {}).items()}
    made |= {key: entry for key, entry in (old or {}).items() if _is_a_group(optimizer, entry)}
    if old and made:
        optimizer.state[values] = made
    elif old and state.shards is not None and type(optimizer) in _FROM_ZEROS:
        optimizer.state[values] = {key: torch.zeros_like(entry) for key, entry in old.items()}
    elif old and _is_fused_sgd(optimizer) and old.get("momentum_buffer") is not None:
        optimizer.state[values] = {"momentum_buffer": torch.zeros_like(old["momentum_buffer"])}


def _is_a_group(optimizer: Optimizer, entry: Any) -> bool:
    """Where a parameter knows the group that it is of: optimi's, which are asked to step one at a time."""
    return any(entry is group for group in optimizer.param_groups)


_FROM_ZEROS = (torch.optim.Adam, torch.optim.AdamW)


def _is_fused_sgd(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and any(group.get("fused") for group in optimizer.param_groups)


def _constructed(optimizer: Optimizer) -> Mapping[SubnetState, dict[str, Entry]]:
    """Of one that hands out the state of another within it (accelerate's), what that other makes."""
    inner = (each for each in inner_optimizers(optimizer) if each.state is optimizer.state)
    return CONSTRUCTED.get(next(inner, optimizer), {})


def note_constructed(optimizer: Optimizer, states: Sequence[SubnetState], fresh: bool) -> None:
    """Before the first step that is seen of an optimizer: which entries of its state does its constructor make?

    State that is there already may also have been loaded, so another optimizer of the kind is asked; where none can be
    made, copies of the parameters and zeros are recognised.
    """
    if optimizer in CONSTRUCTED or isinstance(optimizer, KeepsOverMoves):
        return
    _note_apart(optimizer, states, fresh)
    there = [state for state in states if optimizer.state.get(state.values)]
    twin = _twin(optimizer) if there else None
    made: MutableMapping[SubnetState, dict[str, Entry]] = weakref.WeakKeyDictionary()
    CONSTRUCTED[optimizer] = made
    for state in there:
        entries = optimizer.state[state.values] if twin is None else twin.state.get(state.values, {})
        kept = {
            key: entry for key, value in entries.items() if (entry := _entry(value, state, twin is None)) is not None
        }
        if kept:
            made[state] = kept


def _entry(value: Any, state: SubnetState, untold: bool) -> Entry | None:
    """untold: the value may also come from a step or a file; one that is a copy of S, or zero, need not."""
    if isinstance(value, Tensor) and value.shape == state.values.shape and torch.equal(value, state.values.detach()):
        return Entry(None)
    if untold and not (isinstance(value, Tensor) and not value.any()):
        return None
    return Entry(copy.deepcopy(value))


def _twin(optimizer: Optimizer) -> Optimizer | None:
    """A new optimizer of the kind, over the same groups; None where its constructor wants more than that."""
    kind: Any = type(optimizer)
    inner = inner_optimizers(optimizer)
    if inner:
        return _twin_around(optimizer, inner[0]) if len(inner) == 1 else None
    try:
        wanted = _wanted(kind)[1:]
        if any(p.default is p.empty for p in wanted):
            return None
        given = {p.name: optimizer.defaults[p.name] for p in wanted if p.name in optimizer.defaults}
        groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        made: Optimizer = kind(groups, **given)
        return made
    except (TypeError, ValueError, KeyError, RuntimeError):
        return None


def _twin_around(optimizer: Optimizer, inner: Optimizer) -> Optimizer | None:
    """The same of a wrapper with a state of its own, whose constructor takes an optimizer first, and then what it keeps
    under the same names."""
    kind: Any = type(optimizer)
    if optimizer.state is inner.state:
        return None
    within, kept = _twin(inner), optimizer.__dict__
    try:
        wanted = _wanted(kind)[1:]
        if within is None or any(p.default is p.empty and p.name not in kept for p in wanted):
            return None
        made: Optimizer = kind(within, **{p.name: kept[p.name] for p in wanted if p.name in kept})
        return made
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError):
        return None


def _wanted(kind: Any) -> list[inspect.Parameter]:
    parameters = inspect.signature(kind).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


@dataclass(frozen=True)
class Apart:
    """What an optimizer keeps of S elsewhere than in its state of that parameter."""

    tensor: Tensor
    values: Tensor
    entry: Entry

    def renew(self) -> None:
        self.tensor.copy_(self.entry.make(self.values))


def kept_apart(
    optimizers: Iterable[Optimizer], states: Sequence[SubnetState], moved: bool = False
) -> tuple[list[Apart], list[Optimizer]]:
    """What they keep in a list of their own, in the order of their groups, in a dict of their own, or in one entry of
    their state by parameter (TRAC's references), to be made again as their constructor made it; and those of which that
    is not known: what came later and is like S is a copy of it, anything else stays as it is.

    moved: some of the S hold the numbers of their new places, by which nothing can be told.
    """
    moving = {id(state.values): state.values for state in states}
    inner = [each for optimizer in optimizers for each in inner_optimizers(optimizer)]
    found, unclear = list[Apart](), list[Optimizer]()
    for optimizer in dict.fromkeys((*inner, *optimizers)):
        made = registry.APART.get(optimizer, {})
        for path, one, values in _pairs(optimizer, moving):
            entry = made.get((path, id(values)))
            if entry is None and not moved and _is_like(one, values):
                entry = Entry(None)
            if entry is None:
                unclear.append(optimizer)
            else:
                found.append(Apart(one, values, entry))
    return found, unclear


def _note_apart(optimizer: Optimizer, states: Sequence[SubnetState], fresh: bool) -> None:
    """fresh: what is neither zero nor a copy of S (a mask, sizes of steps) comes from the constructor, and from no step
    that it has made elsewhere."""
    for each in (optimizer, *inner_optimizers(optimizer)):
        made: dict[Any, Entry] = {}
        for path, one, values in _pairs(each, {id(state.values): state.values for state in states}):
            if torch.equal(one, values.detach()):
                made[path, id(values)] = Entry(None)
            elif not one.any():
                made[path, id(values)] = Entry(torch.zeros((), dtype=one.dtype, device=one.device))
            elif fresh:
                made[path, id(values)] = Entry(one.detach().clone())
        registry.APART.setdefault(each, {}).update(made)


Kept = tuple[tuple[Any, Any], Tensor, Tensor]
"""Where something is kept, what it is, and the S that it is kept for."""


def _pairs(optimizer: Optimizer, moving: Mapping[int, Tensor]) -> Iterator[Kept]:
    """What an optimizer keeps by parameter outside of its state of each; moving: S by its id."""
    if isinstance(optimizer, KeepsOverMoves):
        return
    groups = [group["params"] for group in optimizer.param_groups]
    flat = [parameter for group in groups for parameter in group]
    known = {id(each.state) for each in (optimizer, *inner_optimizers(optimizer))}  # under whatever name
    own = [(name, kept) for name, kept in vars(optimizer).items() if name != "param_groups" and id(kept) not in known]
    for name, kept in (*own, *(entry for entry in list(optimizer.state.items()) if not isinstance(entry[0], Tensor))):
        if isinstance(kept, (list, tuple)):
            nested = len(kept) == len(groups) and all(isinstance(part, (list, tuple)) for part in kept)
            each = [entry for part in kept for entry in part] if nested else kept
            if len(each) == len(flat):
                yield from _of_subnets(name, zip(map(id, flat), each, strict=True), moving)
        elif isinstance(kept, Mapping):
            keys = ((id(key) if isinstance(key, Tensor) else key, entry) for key, entry in list(kept.items()))
            yield from _of_subnets(name, keys, moving)


def _of_subnets(where: Any, entries: Iterable[tuple[Any, Any]], moving: Mapping[int, Tensor]) -> Iterator[Kept]:
    for key, entry in entries:
        if key not in moving:
            continue
        named = entry.items() if isinstance(entry, Mapping) else [(None, entry)]
        for name, one in named:
            if _is_copy(one, moving[key]) and one.is_floating_point() and not _is_of_a_model(one):
                yield (where, name), one, moving[key]


def _is_of_a_model(one: Tensor) -> bool:
    """A parameter, or the numbers of another subnet: of a reference or a teacher, which is not the optimizer's."""
    if one.requires_grad or isinstance(one, nn.Parameter):
        return True
    known = list(registry.BY_HANDLE.values())  # some of a copy that another thread is making
    subnets = (getattr(state.owner, "_parameters", {}).get(state.values_name) for state in known)
    return any(each is not None and each.data_ptr() == one.data_ptr() for each in subnets)


def _is_like(one: Tensor, values: Tensor) -> bool:
    """Whether it may be weights of the same place: slow ones, or those of the beginning."""
    small, large = sorted((float(one.norm()), float(values.detach().norm())))
    return points_alike(one, values) and small > large / 4


def _is_copy(one: Any, parameter: Tensor) -> bool:
    return isinstance(one, Tensor) and one is not parameter and one.shape == parameter.shape


def corrects_averages(optimizer: Optimizer, states: Iterable[SubnetState]) -> bool:
    """Whether the optimizer has an ``eval`` that puts averages of the parameters in their place, which began at zero
    and are corrected by a count of all steps (SPlus): of what is made anew in mid-run too little is there for that.
    The host waits to see it, of one subnet: what is true of one is of all."""
    if not callable(getattr(optimizer, "eval", None)):
        return False
    known = (state for state in states if state.values.numel() >= 64 and optimizer.state.get(state.values))
    entries = (
        (value, state.values.detach())
        for state in itertools.islice(known, 1)
        for value in optimizer.state[state.values].values()
        if _is_copy(value, state.values)
    )
    return any(points_alike(one, values) and one.norm() < 0.95 * values.norm() for one, values in entries)


def has_stepped(optimizer: Optimizer, state: SubnetState) -> bool:
    """Whether the optimizer's state of a subnet comes from a step, and not from its constructor, or from a step that
    was only to make it and has left every moment at zero."""
    there = optimizer.state.get(state.values) or {}
    made = _constructed(optimizer).get(state, {})
    moments = [
        value for key, value in there.items() if key != "step" and key not in made and not _is_a_group(optimizer, value)
    ]
    if "step" not in there:
        return bool(moments)
    moved = not moments or any(not isinstance(value, Tensor) or bool(value.any()) for value in moments)
    return moved and float(there["step"]) > 0


def adopt_subnets(optimizer: Optimizer, states: Sequence[SubnetState]) -> None:
    """S takes W's place in the optimizer's groups, with W's moments, where it is not there already."""
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    by_weight = {id(state.weight): state for state in states}
    for group in optimizer.param_groups:
        for index, parameter in reversed(list(enumerate(group["params"]))):
            state = by_weight.get(id(parameter))
            if state is None:
                continue
            registry.changed()
            if id(state.values) in held:
                del group["params"][index]
            else:
                group["params"][index] = state.values
            moments = optimizer.state.pop(parameter, None)
            if moments is not None and state.values not in optimizer.state:
                optimizer.state[state.values] = {key: _gathered(value, state) for key, value in moments.items()}


def _gathered(value: Any, state: SubnetState) -> Any:
    if isinstance(value, Tensor) and value.shape == state.weight.shape:
        return state.block_of(value).to(state.values.dtype)
    return value
