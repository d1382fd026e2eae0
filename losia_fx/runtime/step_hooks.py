"""The two hooks around every optimizer step of the process: whose step it is, and whether it can be followed.

A controller hears of the steps that own its subnets and of no others, and never raises in anybody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from losia_fx.errors import OptimizerError, listed
from losia_fx.runtime import notices, steps

from .optimizers import Owned, adopt_subnets, follow_optimizers, owned
from .state import SubnetState

if TYPE_CHECKING:
    from .controller import Controller


def follow() -> None:
    """From now on the steps of this process are followed."""
    follow_optimizers(before_step, after_step)


@torch.compiler.disable
def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Global hook before every optimizer step of the process."""
    theirs = owned(optimizer)
    if theirs.bare:
        theirs = _with_subnets(optimizer)
    if theirs.orphans:
        raise OptimizerError(
            f"{listed(sorted(s.name for s in theirs.orphans))}: the module was copied out of a transformed model, and "
            "no controller follows the copy: its subnet would train without ever reaching the weight. Copy the whole "
            "model, or restore it first"
        )
    for controller in list(theirs.full):
        _keep_base(controller, optimizer, [])
    if not theirs.mine:
        return
    running = steps.enter(optimizer)
    _refuse_kinds(optimizer)
    for controller, states in list(theirs.mine.items()):
        step = steps.step_of(controller)
        if step is None:
            closure = any(callable(value) for value in (*args, *kwargs.values()))
            step = steps.Followed(closure, steps.caller_of(running))
        fresh = [state for state in states if state not in step.states] if step.states else states
        if not step.optimizers and controller.is_rehearsal(optimizer, fresh):
            continue
        step.optimizers.append(optimizer)
        if len(step.optimizers) == 1:
            running.made[controller] = step
        if fresh:
            _begin(controller, step, fresh)


def _begin(controller: Controller, step: steps.Followed, fresh: list[SubnetState]) -> None:
    notices.warn_outside(controller)
    if not step.closure:
        notices.warn_blind(fresh)
    controller.before(step.optimizers[0], fresh, step.closure)
    _keep_base(controller, step.optimizers[-1], fresh)  # after it, S and W agree
    step.states += fresh


def _keep_base(controller: Controller, optimizer: Optimizer, mine: list[SubnetState]) -> None:
    if controller.bases is not None:
        controller.bases.before_step(controller.root, optimizer, controller.states, mine)


@torch.compiler.disable
def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Global hook after every optimizer step of the process."""
    if not owned(optimizer).mine:
        return
    try:
        for controller, step in list(steps.made_by(optimizer).items()):
            if step.states:
                controller.after(step.optimizers, step.states, step.closure, step.around)
    finally:
        steps.leave(optimizer)


def under_way(controller: Controller) -> bool:
    """Whether a step of the controller's model is being made."""
    return steps.step_of(controller) is not None or steps.elsewhere(controller)


def _with_subnets(optimizer: Optimizer) -> Owned:
    """What an optimizer owns that was found to hold weights without their subnets, once those are in their place."""
    for controller, bare in list(owned(optimizer).bare.items()):
        if controller.by_string:
            adopt_subnets(optimizer, bare)
        else:
            raise OptimizerError(
                f"{type(optimizer).__name__} holds {bare[0].name} and {len(bare) - 1} more transformed weights, but "
                "not their subnets, so nothing of them would learn: it was made before losia_fx.transform. Make it "
                "afterwards, from model.parameters()"
            )
    return owned(optimizer)


def _refuse_kinds(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            "LBFGS moves the subnets several times within a step while the forward reads the dense weights: "
            "use an optimizer that updates once a step, such as AdamW"
        )
