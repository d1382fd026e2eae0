"""A TrainState as plain values and tensors, and back; checked to the last entry before anything changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeGuard

import torch
from torch import Tensor

from losia_fx.config import LosiaConfig
from losia_fx.errors import StateError, listed
from losia_fx.method.factored import Means
from losia_fx.method.schedule import profiled_groups
from losia_fx.method.sums import sums_shapes
from losia_fx.model.kinds import is_sharded

from .in_8_bits import is_asked_for, take_awaited_scales
from .optimizer_state import restart_states
from .profile import Profile
from .same import strays
from .shards import Shards
from .state import SubnetState
from .train_state import Event, TrainState

FORMAT = 1
PLAIN = ("format", "config", "groups", "step", "left_out", "history", "rewarm_from", "stepped")
GENERATOR = "generator"
SUBNET = ("values", "rows", "cols")
SCALES = "scales"
"""Of a W in 8 bits alone: with them its dense values say its numbers."""
PROFILE = ("importance", "uncertainty", "grad", "row_sums", "col_sums")
KEPT = ("label_counts", "row_stays", "col_stays", "row_means", "col_means", "row_visits", "col_visits")
PAIRS = (("importance", "uncertainty"), ("row_sums", "col_sums"), ("row_stays", "col_stays"), KEPT[3:])
"""Of which some are of no use without the others."""
# What decides how training goes on. The patterns show in the names of the subnets, and a state brings its generator.
BINDING = (
    "rank_factor", "output_rank_factor", "period", "profile_steps", "schedule", "importance", "beta1", "beta2",
    "rewarm", "rewarm_steps", "head_rows", "count_steps", "head_period", "carry_moments", "keep_dense",
)  # fmt: skip
AS_JSON = "losia_fx"
"""Of a state for torch.distributed.checkpoint: the values in PLAIN as one entry, JSON. That of a list or a table would
be taken apart there, and what has other entries than the file cannot be loaded."""
DEFAULTS = {name: getattr(LosiaConfig(), name) for name in (*BINDING, "frozen_products")}
"""Of a state that was written before an option came to be."""


def collect(train: TrainState) -> dict[str, Any]:
    """Plain values under the names in PLAIN, tensors under "<weight>:<part>"; the tensors are copies on the CPU.

    Of a sharded model they are whole, put together from all ranks, each of which has to be here.
    """
    state: dict[str, Any] = {**_plain(train), GENERATOR: train.progress.generator.get_state()}
    for name, tensor in _tensors(train, Shards.whole):
        state[name] = tensor.detach().to("cpu", copy=True)
    return state


def collect_cut(train: TrainState) -> dict[str, Any]:
    """As ``collect``, of a sharded model each rank's own part: what is cut over the ranks as DTensors, nothing copied.
    The plain values are one entry."""
    state: dict[str, Any] = {AS_JSON: json.dumps(_plain(train)), GENERATOR: train.progress.generator.get_state()}
    return {**state, **{name: tensor.detach() for name, tensor in _tensors(train, Shards.cut)}}


def empty(train: TrainState, names: Collection[str]) -> dict[str, Any]:
    """What a checkpoint of ``collect_cut``, which has entries of these ``names``, is read into."""
    state: dict[str, Any] = {AS_JSON: "", GENERATOR: train.progress.generator.get_state()}
    for subnet in train.states:
        for part in (*SUBNET, *PROFILE, *KEPT):
            if (name := f"{subnet.name}:{part}") in names:
                shape, dtype = _form(subnet, part)
                state[name] = (
                    torch.empty(shape, dtype=dtype, device=subnet.weight.device)
                    if subnet.shards is None
                    else subnet.shards.empty(part, shape, dtype)
                )
    return state


def spelt_out(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with the plain values of ``collect``."""
    if not isinstance(state, Mapping) or AS_JSON not in state:
        return state
    try:
        plain = dict(json.loads(state[AS_JSON]))
    except (TypeError, ValueError):
        raise StateError(f"{AS_JSON} holds no state: {state[AS_JSON]!r:.80}") from None
    return {**plain, **{name: entry for name, entry in state.items() if name != AS_JSON}}


def _plain(train: TrainState) -> dict[str, Any]:
    progress = train.progress
    return {
        "format": FORMAT,
        "config": _plain_config(train.config),
        "groups": [list(names) for names in train.groups],
        "step": progress.step,
        "left_out": progress.left_out,
        "history": [list(asdict(event).values()) for event in progress.history],
        "rewarm_from": {s.name: s.rewarm_from for s in train.states if s.rewarm_from is not None},
        "stepped": sorted(s.name for s in progress.stepped),
    }


Put = Callable[[Shards, str, Tensor], Tensor]
"""Makes of a part of a sharded subnet's state, as far as this rank has it, what a checkpoint is to hold."""


def _tensors(train: TrainState, put: Put) -> Iterator[tuple[str, Tensor]]:
    profiled = _profiled(train, train.progress.step)
    for subnet in train.states:
        for part, tensor in _parts(subnet, subnet.group in profiled):
            yield f"{subnet.name}:{part}", tensor if subnet.shards is None else put(subnet.shards, part, tensor)


def _plain_config(config: LosiaConfig) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def check(train: TrainState, state: Mapping[str, Any]) -> None:
    """Raises StateError, naming every entry that is unknown, missing or does not fit; changes nothing."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise StateError(f"no state of losia_fx that this version can read: its format is {found!r}, not {FORMAT}")
    problems: list[str] = []
    for look in (_options, _names, _plain_values, _tensors_fit):  # each may rely on what those before it found right
        problems = problems or [*look(train, state)]
    if problems:
        raise StateError(f"this state does not fit the model, so nothing was loaded: {listed(problems)}")


@torch.no_grad()
def apply(train: TrainState, state: Mapping[str, Any]) -> None:
    """Makes a checked state the model's own. Tensors that graphs and optimizers hold change in place."""
    profiled = _profiled(train, state["step"])
    profiles = {s: _profile(s, state) if s.group in profiled else None for s in train.states}
    elsewhere = [
        subnet
        for subnet in train.states
        if any(not torch.equal(held.cpu(), state[f"{subnet.name}:{part}"].cpu()) for part, held in _places(subnet))
    ]
    for subnet, profile in profiles.items():  # what could fail for want of memory is done
        subnet.rows.copy_(state[f"{subnet.name}:rows"])
        subnet.cols.copy_(state[f"{subnet.name}:cols"])
        subnet.values_here.copy_(_here(subnet, "values", state[f"{subnet.name}:values"]))
        subnet.rewarm_from = state["rewarm_from"].get(subnet.name)
        subnet.profile = profile
        _take_kept(subnet, state)
        if subnet.packed is not None and _scales(subnet):
            subnet.packed.awaited = state[f"{subnet.name}:{SCALES}"].clone()
            take_awaited_scales(subnet)
    progress = train.progress
    progress.generator.set_state(state[GENERATOR].cpu())
    progress.step, progress.left_out = state["step"], state["left_out"]
    progress.events, progress.unread = [Event(*event) for event in state["history"]], []
    progress.stepped = {subnet for subnet in profiles if subnet.name in state["stepped"]}
    progress.selecting = []
    train.pending.forget_step()
    train.pending.labels = None
    train.pending.open.clear()
    train.agreement.waiting = set(strays(train.states))
    train.agreement.remember(places=True)
    train.resumed = train.put_back = True
    train.left.forget()
    # Moments of other places go, but for what an optimizer has loaded since it stepped: that is of this state.
    then = train.optimizers.states
    kept = [each for each in train.optimizers.known if each in then and then[each] is vars(each).get("state")]
    restart_states(kept, elsewhere)


def _places(subnet: SubnetState) -> tuple[tuple[str, Tensor], ...]:
    return ("rows", subnet.rows), ("cols", subnet.cols)


def _parts(subnet: SubnetState, profiled: bool) -> Iterator[tuple[str, Tensor]]:
    """profiled: not so where a slot has ended, and its selection was cut short."""
    yield from zip(SUBNET, (subnet.values_here, subnet.rows, subnet.cols), strict=True)
    if (stored := subnet.stored) is not None:
        yield SCALES, stored.scales.view(-1)
    for part in PROFILE if profiled and subnet.profile is not None else ():
        tensor = getattr(subnet.profile, part)
        if tensor is not None:
            yield part, tensor
    found = (subnet.label_counts, *(subnet.visits or (None, None)), *(subnet.means or [None] * 4))
    yield from ((part, tensor) for part, tensor in zip(KEPT, found, strict=True) if tensor is not None)


def _here(subnet: SubnetState, part: str, entry: Tensor) -> Tensor:
    """What this process has of it."""
    return entry if subnet.shards is None else subnet.shards.here(part, entry)


def _take_kept(subnet: SubnetState, state: Mapping[str, Any]) -> None:
    device = subnet.weight.device
    entries = {part: state.get(f"{subnet.name}:{part}") for part in KEPT}
    found = {part: entry.to(device, copy=True) for part, entry in entries.items() if entry is not None}
    subnet.label_counts = found.get(KEPT[0])
    subnet.visits = (found[KEPT[1]], found[KEPT[2]]) if KEPT[1] in found else None
    subnet.means = Means(*(found[part] for part in KEPT[3:])) if KEPT[3] in found else None


def _scales(subnet: SubnetState) -> tuple[str, ...]:
    return (SCALES,) if is_asked_for(subnet) else ()


def _profiled(train: TrainState, step: int) -> tuple[int, ...]:
    """The groups that are being profiled after ``step`` steps."""
    return profiled_groups(train.config, len(train.groups), step, train.head)


def _profile(subnet: SubnetState, state: Mapping[str, Any]) -> Profile:
    device = subnet.weight.device
    entries = {part: state.get(f"{subnet.name}:{part}") for part in PROFILE}
    profile = Profile()
    for part, entry in entries.items():
        setattr(profile, part, None if entry is None else _here(subnet, part, entry).to(device, copy=True))
    return profile


# -- the checks, each yielding what is wrong --------------------------------------------------------------------------


def _options(train: TrainState, state: Mapping[str, Any]) -> Iterator[str]:
    missing = [name for name in (*PLAIN, GENERATOR) if name not in state]
    yield from (f"{name} is missing" for name in missing)
    own, config = _plain_config(train.config), state.get("config")
    if isinstance(config, Mapping):
        # What W is kept in counts where it is kept in nothing else.
        names = BINDING if train.config.keep_dense else (*BINDING, "frozen_products")
        was = {name: config.get(name, DEFAULTS[name]) for name in names}
        yield from (f"{name} was {was[name]!r} and is {own[name]!r}" for name in names if was[name] != own[name])
    elif "config" in state:
        yield "config is no table of options"
    if not missing and state["groups"] != [list(names) for names in train.groups]:
        yield f"groups are not those of this model: {state['groups']!r:.200}"
    yield from (f"{name} is {state[name]!r}" for name in ("step", "left_out") if not _is_count(state.get(name, 0)))


def _names(train: TrainState, state: Mapping[str, Any]) -> Iterator[str]:
    profiled = _profiled(train, state["step"])
    expected: set[str] = {*PLAIN, GENERATOR}
    optional: set[str] = set()
    for subnet in train.states:
        expected.update(f"{subnet.name}:{part}" for part in (*SUBNET, *_scales(subnet)))
        parts = (*(PROFILE if subnet.group in profiled else ()), *_kept_by(train.config, subnet))
        optional.update(f"{subnet.name}:{part}" for part in parts)
        for pair in PAIRS:
            names = {f"{subnet.name}:{part}" for part in pair}
            if names & state.keys() & optional:
                expected |= names
    yield from (f"{name} is missing" for name in sorted(expected - state.keys()))
    yield from sorted(f"{name} is unknown" for name in state.keys() - expected - optional)


def _kept_by(config: LosiaConfig, subnet: SubnetState) -> Iterator[str]:
    """The parts in KEPT that these options make use of."""
    if config.head_rows == "frequent" and subnet.whole_cols:
        yield KEPT[0]
    if config.importance == "visits":
        yield from KEPT[1:3]
    if config.carry_moments:
        yield from KEPT[3:]


def _plain_values(train: TrainState, state: Mapping[str, Any]) -> Iterator[str]:
    step = state["step"]
    names, rewarm, stepped = {s.name for s in train.states}, state["rewarm_from"], state["stepped"]
    known = isinstance(rewarm, Mapping) and rewarm.keys() <= names
    if not known or not all(_is_count(at) and at <= step for at in rewarm.values()):
        yield "rewarm_from does not name weights and steps"
    if not isinstance(stepped, list) or not all(isinstance(name, str) and name in names for name in stepped):
        yield "stepped does not name weights"
    events = state["history"]
    if not isinstance(events, list) or not all(_is_event(event, step, len(train.groups)) for event in events):
        yield "history is no list of re-selections"


def _tensors_fit(train: TrainState, state: Mapping[str, Any]) -> Iterator[str]:
    for subnet in train.states:
        for part in (*SUBNET, *_scales(subnet), *PROFILE, *KEPT):
            name = f"{subnet.name}:{part}"
            if name in state and (misfit := _misfit(subnet, part, state[name])):
                yield f"{name} {misfit}"
    if not _is_generator(state[GENERATOR]):
        yield f"{GENERATOR} is no state of a torch.Generator of the CPU"


def _misfit(subnet: SubnetState, part: str, entry: Any) -> str | None:
    """What is wrong with a tensor, or None."""
    if not isinstance(entry, Tensor) or entry.layout is not torch.strided or entry.is_meta:
        return "is no ordinary tensor"
    weight = subnet.weight
    shape, dtype = _form(subnet, part)
    if entry.shape != shape or entry.dtype != dtype:
        return f"is {tuple(entry.shape)} {entry.dtype}, not {tuple(shape)} {dtype}"
    if is_sharded(entry) if subnet.shards is None else not subnet.shards.takes(part, entry):
        return "is sharded in another way than the model"
    if part not in ("rows", "cols"):
        return None
    size = weight.shape[-2 if part == "rows" else -1]  # of W (out, in), or of experts' (E, out, in)
    if not (entry.numel() and 0 <= int(entry.min()) and int(entry.max()) < size):
        return f"holds an index outside of 0 to {size - 1}"
    return None if bool((entry[..., 1:] > entry[..., :-1]).all()) else "is not sorted, or names an index twice"


def _form(subnet: SubnetState, part: str) -> tuple[torch.Size, torch.dtype]:
    """What a part has to be like."""
    if part in SUBNET:
        like: Tensor = getattr(subnet, part)
        return like.shape, like.dtype
    if part == SCALES:
        return subnet.weight.shape[:1], torch.float32
    if part in PROFILE[:3]:
        return subnet.weight.shape, torch.float32
    rows, cols = sums_shapes(subnet.weight)
    counted = part in KEPT[:3]
    dtype = torch.int64 if counted else torch.float32 if part in PROFILE else subnet.values.dtype
    return cols if part.startswith("col_") else rows, dtype


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_event(event: Any, last: int, groups: int) -> bool:
    if not isinstance(event, list) or len(event) != 4:
        return False
    step, group, moved, captured = event
    known = _is_count(step) and step <= last and (group is None or (_is_count(group) and group < groups))
    return known and _is_share(moved) and (captured is None or _is_share(captured))


def _is_generator(entry: Any) -> bool:
    if not isinstance(entry, Tensor) or entry.dtype != torch.uint8 or entry.dim() != 1:
        return False
    try:
        torch.Generator().set_state(entry.cpu())
    except (RuntimeError, TypeError):
        return False
    return True
