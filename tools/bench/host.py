"""What losia_fx costs the host beside the arithmetic: a model of many weights so small that nothing else takes time."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import losia_fx
from losia_fx.console import make_table
from losia_fx.errors import LosiaWarning
from losia_fx.runtime.state import resolve

from .clock import no_collection

WEIGHTS, SIDE = 320, 8
REPEATS = 100
Work = Callable[[], Any]


@dataclass(frozen=True)
class HostTime:
    """Microseconds of this thread's CPU time."""

    what: str
    median_us: float
    least_us: float


@dataclass(frozen=True)
class Part:
    what: str
    work: Work
    before: Work = lambda: None
    """Done ahead of every repeat, outside of the clock."""


class Chain(nn.Module):
    """``WEIGHTS`` linears of SIDE x SIDE, a block each, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)) for _ in range(WEIGHTS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Idle(torch.optim.Optimizer):
    """Steps nothing: what a step of it takes is what goes on around it."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        """Runs no closure either."""


def transformed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LosiaWarning)
        return losia_fx.transform(Chain(), compiler="eager")


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def host_times(repeats: int = REPEATS) -> list[HostTime]:
    """Every measurement, those that are held against one another in turns."""
    with one_thread(), no_collection():
        x = torch.randn(2, SIDE)
        plain, model = Chain(), transformed()
        optimizer = Idle(trained(model))
        model(x).sum().backward()
        optimizer.step()
        ours = in_turns(
            [
                Part("no_grad forward of the plain model", without_gradients(plain, x)),
                Part("no_grad forward of the transformed model", without_gradients(model, x)),
                Part("step of an optimizer that does nothing", optimizer.step, lambda: _backward(model, x)),
            ],
            repeats,
        )
        losia_fx.restore(model)
        return ours + _others_times(repeats)


def _others_times(repeats: int) -> list[HostTime]:
    foreign = nn.Linear(SIDE, SIDE)
    others = torch.optim.SGD(foreign.parameters(), lr=0.0)
    foreign(torch.randn(2, SIDE)).sum().backward()
    alive: list[nn.Module] = []

    def alone() -> None:
        while alive:
            losia_fx.restore(alive.pop())

    def beside() -> None:
        if not alive:
            alive.append(transformed())

    found = in_turns(
        [
            Part("another's optimizer, no transformed model", others.step, alone),
            Part("another's optimizer beside a transformed model", others.step, beside),
            Part("resolve() of a weight without a subnet", lambda: resolve(foreign.weight), beside),
        ],
        repeats,
        each=10,
    )
    alone()
    return found


def _backward(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def without_gradients(model: nn.Module, x: Tensor) -> Work:
    def forward() -> None:
        with torch.no_grad():
            model(x)

    return forward


def in_turns(parts: Sequence[Part], repeats: int, each: int = 1) -> list[HostTime]:
    """``each`` repeats of every part, then again: a machine whose clock goes up and down does so for all of them."""
    times: list[list[float]] = [[] for _ in parts]
    for turn in range(math.ceil(repeats / each) + 1):
        for part, found in zip(parts, times, strict=True):
            took = [_timed(part) for _ in range(each + 2)]
            if turn > 0:
                found += took[2:]  # the first two of a turn, and the first turn, warm up
    return [HostTime(part.what, statistics.median(found), min(found)) for part, found in zip(parts, times, strict=True)]


def _timed(part: Part) -> float:
    part.before()
    start = time.thread_time_ns()
    part.work()
    return (time.thread_time_ns() - start) / 1e3


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def print_host(console: Console, times: Iterable[HostTime]) -> None:
    numbers = ("median us", "least us")
    shown = make_table(f"the host, {WEIGHTS} weights of {SIDE} x {SIDE}", "what", *numbers)
    for each in times:
        shown.add_row(each.what, f"{each.median_us:.1f}", f"{each.least_us:.1f}")
    console.print(shown)
