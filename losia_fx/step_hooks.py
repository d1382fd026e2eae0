"""The two hooks around every optimizer step of the process: whose step it is, and whether it can be followed.

A controller hears of the steps that own its subnets and of no others, and never raises in anybody else's.
"""

from __future__ import annotations

import inspect
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from . import notices, steps
from .base_history import remember_base
from .errors import OptimizerError, listed
from .optimizers import Owned, adopt_subnets, follow_optimizers, owned
from .state import SubnetState

if TYPE_CHECKING:
    from .controller import Controller


class _Step(threading.local):
    """The outermost step under way."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.begun: dict[Controller, list[SubnetState]] = {}
        self.optimizers: list[Optimizer] = []
        self.closure = False


_step = _Step()


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
        remember_base(controller, optimizer, [])
    if not theirs.mine:
        return
    if steps.enter(optimizer, _caller()):
        _step.forget()
        _step.closure = any(callable(value) for value in (*args, *kwargs.values()))
    _step.optimizers.append(optimizer)
    for controller, states in list(theirs.mine.items()):
        _refuse_kinds(optimizer)
        begun = _step.begun.setdefault(controller, [])
        fresh = [state for state in states if state not in begun] if begun else states
        if not fresh or controller.is_rehearsal(optimizer, fresh):
            continue
        notices.warn_outside(controller)
        if not _step.closure:
            notices.warn_blind(fresh)
        controller.before(_step.optimizers[0], fresh, _step.closure)
        remember_base(controller, optimizer, fresh)  # after it, S and W agree
        begun += fresh


@torch.compiler.disable
def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Global hook after every optimizer step of the process."""
    if not owned(optimizer).mine or not steps.leave(optimizer):
        return
    begun, optimizers, closure = _step.begun, _step.optimizers, _step.closure
    _step.forget()
    for controller, states in begun.items():
        if states:
            controller.after(optimizers, states, closure)


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


_OPTIMIZER = inspect.getfile(Optimizer)


def _caller() -> FrameType | None:
    """The frame of Optimizer.step's wrapper, which calls the hooks; it ends with the step, also where that raises."""
    frame: FrameType | None = sys._getframe(1)
    first = frame
    while frame is not None and frame.f_code.co_filename != _OPTIMIZER:
        frame = frame.f_back
    return frame or first
