"""Which optimizer steps are under way: of optimizers inside optimizers, the outermost makes the step.

Lookahead, SAM and the like are optimizers that call another's step, once or several times; whatever they do to the
parameters until their own step ends is one step. What the step of another model does in between is that model's.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from losia_fx import registry

from .state import SubnetState
from .train_state import TrainState


@dataclass
class Followed:
    """A step of one model: its subnets that have been begun, and the optimizers that step them, the outermost first."""

    within: bool
    """The gradients are made, or changed, within it: by a closure, or by hooks of the optimizer's own."""
    around: Any = None
    """Something that is no Optimizer, whose own step goes on after it with the same parameters (schedule-free's)."""
    states: list[SubnetState] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)


@dataclass
class Running:
    """A call of an optimizer's step."""

    optimizer: Optimizer
    frame: FrameType | None
    """That runs the step, to tell one that has raised from one that goes on."""
    made: dict[TrainState, Followed] = field(default_factory=dict)
    """The steps that this call makes, by model: it is their outermost one."""


@dataclass(eq=False)
class Thread:
    """The calls that are under way in one thread, the outermost first."""

    running: list[Running] = field(default_factory=list)


STEPPING: MutableMapping[int, Thread] = registry.STEPPING


class _Steps(threading.local):
    def __init__(self) -> None:
        self.thread = STEPPING[threading.get_ident()] = Thread()

    @property
    def running(self) -> list[Running]:
        return self.thread.running


_steps = _Steps()


def enter(optimizer: Optimizer) -> Running:
    """A step begins. Steps that raised are forgotten here."""
    _forget_dead()
    _steps.running.append(Running(optimizer, _caller()))
    return _steps.running[-1]


def step_of(train: TrainState) -> Followed | None:
    """The step of a model that is under way in this thread."""
    if _steps.running:
        _forget_dead()
    return next((each.made[train] for each in _steps.running if train in each.made), None)


def others() -> bool:
    """Whether there are other threads than this that have made steps."""
    return any(thread != threading.get_ident() for thread in list(STEPPING))


def elsewhere(train: TrainState) -> bool:
    """Whether another thread is making a step of the model: S and W are its affair until it has."""
    mine = threading.get_ident()
    for thread, steps in list(STEPPING.items()):
        made = [each for each in list(steps.running) if train in each.made]
        if thread != mine and made:
            alive = _frames(sys._current_frames().get(thread))
            if any(each.frame is None or id(each.frame) in alive for each in made):
                return True
    return False


def under_way(train: TrainState) -> bool:
    """Whether a step of the model is being made."""
    return step_of(train) is not None or elsewhere(train)


def caller_of(running: Running) -> Any:
    """What stands around an optimizer and calls its step from one of its own, which has no hooks as it is no Optimizer;
    None where nothing does."""
    frame = None if running.frame is None else running.frame.f_back
    while frame is not None:
        if frame.f_code.co_name == "step" and frame.f_code.co_varnames:
            found = frame.f_locals.get(frame.f_code.co_varnames[0])
            stranger = hasattr(found, "param_groups") and not isinstance(found, Optimizer)
            if stranger and any(each is running.optimizer for each in getattr(found, "__dict__", {}).values()):
                return found
        frame = frame.f_back
    return None


def made_by(optimizer: Optimizer) -> dict[TrainState, Followed]:
    """The steps that the step of ``optimizer``, which is about to end, has made, by model."""
    return next((each.made for each in reversed(_steps.running) if each.optimizer is optimizer), {})


def leave(optimizer: Optimizer) -> None:
    """The step of ``optimizer`` has ended."""
    running = _steps.running
    for at in reversed(range(len(running))):
        if running[at].optimizer is optimizer:
            del running[at:]  # with any step within it that has raised
            return


_OPTIMIZER = inspect.getfile(Optimizer)


def _caller() -> FrameType | None:
    """The frame of Optimizer.step's wrapper, which calls the hooks; it ends with the step, also where that raises."""
    frame: FrameType | None = sys._getframe(1)
    first = frame
    while frame is not None and frame.f_code.co_filename != _OPTIMIZER:
        frame = frame.f_back
    return frame or first


def _forget_dead() -> None:
    running = _steps.running
    if not running:
        return
    alive = _frames(sys._getframe(1))
    for at, each in enumerate(running):
        if each.frame is not None and id(each.frame) not in alive:
            del running[at:]
            return


def _frames(frame: FrameType | None) -> set[int]:
    """The ids of a frame and of those that wait for it."""
    found: set[int] = set()
    while frame is not None:
        found.add(id(frame))
        frame = frame.f_back
    return found
