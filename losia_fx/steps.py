"""Which optimizer steps are under way: of optimizers inside optimizers, the outermost makes the step.

Lookahead, SAM and the like are optimizers that call another's step, once or several times; whatever they do to the
parameters until their own step ends is one step.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import FrameType

from torch.optim import Optimizer


@dataclass
class _Running:
    optimizer: Optimizer
    frame: FrameType | None
    """That runs the step, to tell one that has raised from one that goes on."""


class _Steps(threading.local):
    def __init__(self) -> None:
        self.running: list[_Running] = []


_steps = _Steps()


def enter(optimizer: Optimizer, caller: FrameType | None) -> bool:
    """A step begins, called from ``caller``; whether it is an outermost one. Steps that raised are forgotten here."""
    _forget_dead()
    _steps.running.append(_Running(optimizer, caller))
    return len(_steps.running) == 1


def leave(optimizer: Optimizer) -> bool:
    """The step of ``optimizer`` ends; whether it was an outermost one."""
    for at, each in enumerate(_steps.running):
        if each.optimizer is optimizer:
            del _steps.running[at:]  # with any step within it that has raised
            return at == 0
    return False


def under_way() -> bool:
    """Whether any step of this thread is being made."""
    if _steps.running:
        _forget_dead()
    return bool(_steps.running)


def _forget_dead() -> None:
    running = _steps.running
    if not running:
        return
    frame: FrameType | None = sys._getframe(1)
    alive: set[int] = set()
    while frame is not None:
        alive.add(id(frame))
        frame = frame.f_back
    for at, each in enumerate(running):
        if each.frame is not None and id(each.frame) not in alive:
            del running[at:]
            return
