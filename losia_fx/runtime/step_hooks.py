"""The two hooks around every optimizer step of the process: whose step it is, and whether it can be followed.

A model hears of the steps of optimizers that hold its subnets and of no others, and never raises in anybody else's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from losia_fx import registry
from losia_fx._compat import has_step_hooks
from losia_fx.errors import OptimizerError, listed

from . import notices, step, steps
from .optimizer_state import adopt_subnets
from .optimizers import follow_optimizers, inner_optimizers, parameters_of
from .owners import Owned, found_before, notice_beside, owned
from .state import SubnetState
from .take_in_shards import refuse_unsharded
from .train_state import TrainState


def follow() -> None:
    """From now on the steps of this process are followed."""
    follow_optimizers(before_step, after_step)


@torch.compiler.disable
def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Global hook before every optimizer step of the process."""
    theirs = owned(optimizer)
    if theirs.bare:
        theirs = _with_subnets(optimizer)
    _refuse_others(optimizer, theirs)
    for train in list(theirs.full):
        train.remember_base(optimizer, [])
        if train not in theirs.mine:
            notice_beside(train)
    if not theirs.mine:
        return
    running = steps.enter(optimizer)
    _refuse_kinds(optimizer)
    for train, states in _asked_for(theirs, (*args, *kwargs.values())):
        followed = steps.step_of(train)
        if followed is None:
            closure = any(callable(value) for value in (*args, *kwargs.values()))
            hooked = any(map(has_step_hooks, (optimizer, *inner_optimizers(optimizer))))  # they run after this one
            followed = steps.Followed(closure or hooked, steps.caller_of(running))
        fresh = [state for state in states if state not in followed.states] if followed.states else states
        if not followed.optimizers and step.is_rehearsal(optimizer, fresh):
            continue
        followed.optimizers.append(optimizer)
        if len(followed.optimizers) == 1:
            running.made[train] = followed
        if fresh:
            _begin(train, followed, fresh)


def _asked_for(theirs: Owned, given: tuple[Any, ...]) -> list[tuple[TrainState, list[SubnetState]]]:
    """By model, all that an optimizer steps, or those that it is to step alone, as step(param=S) in a hook of S's
    gradient: the step() that loops call after those is none."""
    named = {id(value) for value in given if isinstance(value, nn.Parameter)}
    theirs.one_by_one = theirs.one_by_one or bool(named)
    held = list(theirs.mine.items())
    if not theirs.one_by_one:
        return held
    asked = (
        [s for s in states if (id(s.held(s.values_name)) in named if named else s.values.grad is not None)]
        for _, states in held
    )
    return [(train, states) for (train, _), states in zip(held, asked, strict=True) if states]


def _refuse_others(optimizer: Optimizer, theirs: Owned) -> None:
    """What an optimizer may not hold: subnets that nobody follows."""
    if theirs.orphans:
        raise OptimizerError(
            f"{listed(sorted(s.name for s in theirs.orphans))}: the module was copied out of a transformed model, and "
            "no controller follows the copy: its subnet would train without ever reaching the weight. Copy the whole "
            "model, or restore it first"
        )
    if theirs.retired and not theirs.mine:
        _refuse_retired(optimizer, theirs)
    trained: list[TrainState] = list(registry.TRAINED)
    for train in trained:
        refuse_unsharded(train, theirs.mine.get(train, ()), parameters_of(optimizer))


def _refuse_retired(optimizer: Optimizer, theirs: Owned) -> None:
    """Of a model that was transformed again the optimizer steps none of the subnets that are; of one that was not, the
    rest of what it holds may learn."""
    kind, count = type(optimizer).__name__, len(theirs.retired)
    models = {id(of()) for of in theirs.retired}
    if any(id(train.root) in models for train in list(registry.TRAINED)):
        raise OptimizerError(
            f"{kind} holds {count} subnets that losia_fx.restore took off the model, and none of those that it has "
            "now, so nothing of them would learn: it was made before the last losia_fx.transform. Make it afterwards, "
            "from model.parameters(); a Trainer keeps its own: make a new Trainer"
        )
    if not theirs.told:
        theirs.told = True
        notices.warn_retired(kind, count)


def _begin(train: TrainState, followed: steps.Followed, fresh: list[SubnetState]) -> None:
    notices.warn_outside(train)
    if not followed.within:
        notices.warn_without_grad(fresh)
    step.before(train, followed.optimizers[0], fresh, followed.within)
    train.remember_base(followed.optimizers[-1], fresh)  # after it, S and W agree
    followed.states += fresh


@torch.compiler.disable
def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Global hook after every optimizer step of the process."""
    if not found_before(optimizer).mine:
        return
    try:
        for train, followed in list(steps.made_by(optimizer).items()):
            if followed.states:
                step.after(train, followed)
    finally:
        steps.leave(optimizer)


def _with_subnets(optimizer: Optimizer) -> Owned:
    """What an optimizer owns that was found to hold weights without their subnets, once those are in their place."""
    for train, bare in list(owned(optimizer).bare.items()):
        if train.by_string:
            adopt_subnets(optimizer, bare)
        else:
            raise OptimizerError(
                f"{type(optimizer).__name__} holds {bare[0].name} and {len(bare) - 1} more transformed weights, but "
                "not their subnets, so nothing of them would learn: it was made before losia_fx.transform, or from "
                "chosen weights. Make it afterwards, from model.parameters() or losia_fx.subnets(model)[name].values"
            )
    return owned(optimizer)


def _refuse_kinds(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            "LBFGS moves the subnets several times within a step while the forward reads the dense weights: "
            "use an optimizer that updates once a step, such as AdamW"
        )
