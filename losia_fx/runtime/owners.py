"""Whose subnets an optimizer steps, and whose steps t waits for."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from losia_fx import registry
from losia_fx.method.schedule import checked_steps

from . import notices, steps
from .moves import KeepsOverMoves
from .optimizer_state import has_stepped, note_constructed
from .optimizers import inner_optimizers, live_optimizers, parameters_of, signature
from .state import SubnetState
from .train_state import TrainState


@dataclass
class Owned:
    """What an optimizer steps of ours; found once, and again when its groups or the subnets of the process change."""

    signature: tuple[Any, ...]
    mine: weakref.WeakKeyDictionary[TrainState, list[SubnetState]] = field(default_factory=weakref.WeakKeyDictionary)
    """By the model that they are of; one that is gone takes its own along."""
    bare: weakref.WeakKeyDictionary[TrainState, list[SubnetState]] = field(default_factory=weakref.WeakKeyDictionary)
    """Subnets whose W the optimizer holds, but not S."""
    full: weakref.WeakSet[TrainState] = field(default_factory=weakref.WeakSet)
    """Models of which the optimizer holds parameters beside subnets."""
    orphans: weakref.WeakSet[SubnetState] = field(default_factory=weakref.WeakSet)
    """Subnets of copies that no controller follows."""
    retired: list[weakref.ref[Any]] = field(default_factory=list)
    """Of each subnet that was taken off again, and that the optimizer steps all the same: the model that it was of."""
    told: bool = False
    """That was said."""
    one_by_one: bool = False
    """It has been asked to step single parameters."""


OWNED: MutableMapping[Optimizer, Owned] = registry.OWNED


def owned(optimizer: Optimizer) -> Owned:
    now = signature(optimizer)
    known = OWNED.get(optimizer)
    if known is None or known.signature != now:
        known = OWNED[optimizer] = Owned(now)
        held = {id(parameter) for parameter in parameters_of(optimizer)}
        trained: list[TrainState] = list(registry.TRAINED)
        for train in trained:
            mine, bare = _split(train.states, held)
            if any(id(parameter) in held for parameter in train.others()):
                known.full.add(train)
            if mine:
                known.mine[train] = mine
            if bare:
                known.bare[train] = bare
        known.orphans.update(_split(list(registry.COPIES), held)[0])
        if registry.RETIRED:
            known.retired = [of for p in parameters_of(optimizer) if (of := registry.RETIRED.get(p)) is not None]
    return known


def found_before(optimizer: Optimizer) -> Owned:
    """What ``owned`` found when the step began: of a step that ends, nothing is looked up anew."""
    return OWNED.get(optimizer) or owned(optimizer)


def _split(states: Sequence[SubnetState], held: set[int]) -> tuple[list[SubnetState], list[SubnetState]]:
    """Those whose S is held, and those of which W alone is."""
    mine, bare = [], []
    for state in states:
        if id(state.held(state.values_name)) in held:
            mine.append(state)
        elif id(state.held(state.parameter)) in held:
            bare.append(state)
    return mine, bare


def holders_of(parameter: Tensor) -> list[Optimizer]:
    """Every optimizer of the process that holds it."""
    return [each for each in live_optimizers() if any(p is parameter for p in parameters_of(each))]


def owned_states(optimizer: Optimizer, train: TrainState) -> list[SubnetState]:
    """The subnets of the model whose S the optimizer steps."""
    return owned(optimizer).mine.get(train, [])


def waited_for(train: TrainState) -> Iterable[SubnetState]:
    """The subnets that optimizers in use step: t counts once all of them have been."""
    used = train.optimizers
    found = (found_before(each) if each in used.of_this_step else owned(each) for each in used.waited_for)
    return itertools.chain.from_iterable(each.mine.get(train, []) for each in found)


def meet_all(train: TrainState) -> tuple[list[Optimizer], list[Optimizer]]:
    """Every optimizer of the process that holds subnets of the model, known from now on; and those that are new."""
    found = [each for each in live_optimizers() if owned_states(each, train)]
    fresh = [each for each in found if each not in train.optimizers.known]
    for each in fresh:
        if not hasattr(each, "state"):  # its constructor is not Optimizer's: torchao's CPUOffloadOptimizer
            each.state = defaultdict(dict)
        note_constructed(each, owned_states(each, train), fresh=train.progress.step == 0)
    return found, fresh


def meet(train: TrainState) -> None:
    """An optimizer steps for the first time: it and all others that hold subnets are looked at."""
    found, fresh = meet_all(train)
    resumed = train.resumed or train.progress.step > 0 or train.by_string  # by string, moments of W come along
    made = steps.step_of(train)
    if made is not None and made.around is not None:
        resumed = True  # what stands around the optimizer has kept state there before the step
    # What one around others keeps (slow copies, a gradient of SAM's first half) may come from before any step.
    steppers = [each for each in fresh if not inner_optimizers(each)]
    if not resumed and any(has_stepped(each, s) for each in steppers for s in owned_states(each, train)):
        notices.warn_resumed()
    if not train.optimizers.known:
        if train.by_string:
            notices.warn_lists(train.states)
        # Others may own subnets too and step after this one: t waits for all of them.
        train.optimizers.waited_for.update(found)
    train.optimizers.known.update(found)


UNOWNED = 20
"""Steps, at least, of other parameters of a model alone, after which it is said that nobody steps its subnets."""


def notice_beside(train: TrainState) -> None:
    """An optimizer steps parameters of the model and none of its subnets: in turn with one that does, or for good?"""
    train.optimizers.beside += 1
    steps = max(checked_steps(train.config), UNOWNED)
    if train.optimizers.beside == steps:
        notices.warn_unowned(train, [state for state in train.states if state.ran], steps)


def notice_loaded(train: TrainState, optimizer: Optimizer, mine: Sequence[SubnetState]) -> None:
    """Where an optimizer has loaded a state since its last step: are its moments of places where subnets were before?
    They are if they have seen more steps than there were since the last move; of one within another, whose steps may be
    several of that one's, this says nothing. Else they may be (of an earlier slot, of another model), unless the
    subnets were put back too: of one that has stepped here before, as one that is made anew may go on from another."""
    inner = inner_optimizers(optimizer)
    old, perhaps = [], dict[SubnetState, int]()
    for each in (optimizer, *inner):
        before, now = train.optimizers.states.get(each), each.__dict__.get("state")
        if before is now or now is None or (before is None and inner):
            continue
        for state in mine:
            last = _last_move(train, state)
            kept = each.state.get(state.values, {})
            if not last or not _is_of_a_place(each, kept, state):
                continue
            counted = None if train.config.carry_moments or inner else kept.get("step")  # starts anew at a move
            if counted is not None and float(counted) > train.progress.step - last:
                old.append(state)
            elif before is not None and not _same(kept, before.get(state.values, {})):
                perhaps[state] = last
    if old and not (train.put_back and train.optimizers.states.get(optimizer) is None):
        notices.warn_put_back(train, old)  # an optimizer of before, or made anew for what was put back
    elif perhaps and not train.put_back:
        notices.warn_perhaps_put_back(train, list(perhaps), max(perhaps.values()))


def _last_move(train: TrainState, state: SubnetState) -> int:
    """The step of it; 0 where the subnet has not moved."""
    own = (state.group, None)
    return max((event.step for event in train.progress.events if event.group in own and event.moved != 0), default=0)


def note_states(train: TrainState, optimizers: Iterable[Optimizer]) -> None:
    """At the end of a step: one that puts another state in the place of its own has loaded nothing."""
    for optimizer in optimizers:
        for each in (optimizer, *inner_optimizers(optimizer)):
            if (held := each.__dict__.get("state")) is not None:  # accelerate's hands out that of the one within it
                train.optimizers.states[each] = held


def _is_of_a_place(optimizer: Optimizer, kept: Mapping[str, Any], state: SubnetState) -> bool:
    """Whether an optimizer's state of a subnet holds something of the elements where it was. Of one that keeps what it
    knows of the whole weight, only what is of S's size does."""
    held = [value for key, value in kept.items() if key != "step" and isinstance(value, Tensor)]
    if isinstance(optimizer, KeepsOverMoves):
        held = [value for value in held if value.shape == state.values.shape]
    return bool(held)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states of a parameter hold the same tensors."""
    pairs = ((value, other.get(key)) for key, value in one.items() if isinstance(value, Tensor))
    return all(isinstance(was, Tensor) and value.equal(was.to(value)) for value, was in pairs)


def modes_of(train: TrainState) -> list[bool]:
    """Of optimizers that have one, the mode for training or evaluation (schedule-free): going from one into the other
    it is they that move S, as they should."""
    holders = [holder for each in train.optimizers.known for holder in (each.__dict__, *each.param_groups)]
    if train.pending.around is not None and (around := train.pending.around()) is not None:
        holders.append(vars(around))
    return [holder["train_mode"] for holder in holders if "train_mode" in holder]
