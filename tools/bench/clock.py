"""The parts of a step on a clock: CPU time of this process with one thread, or CUDA events."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .methods import Trial

CPU_CLOCK = "CPU time of the process"
CUDA_CLOCK = "CUDA events"


@dataclass(frozen=True)
class StepTime:
    """Milliseconds."""

    forward_ms: float
    backward_ms: float
    optimizer_ms: float

    @property
    def step_ms(self) -> float:
        return self.forward_ms + self.backward_ms + self.optimizer_ms


Clock = Callable[[Trial], StepTime]
"""Runs a step of a trial and says how long its parts took."""


def clock_of(device: torch.device) -> Clock:
    return _cuda_step if device.type == "cuda" else _cpu_step


def _cpu_step(trial: Trial) -> StepTime:
    trial.prepare()
    start = time.process_time()
    loss = trial.forward()
    forward = time.process_time()
    trial.backward(loss)
    backward = time.process_time()
    trial.optimize()
    end = time.process_time()
    return StepTime(1e3 * (forward - start), 1e3 * (backward - forward), 1e3 * (end - backward))


def _cuda_step(trial: Trial) -> StepTime:
    trial.prepare()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    marks[0].record()
    loss = trial.forward()
    marks[1].record()
    trial.backward(loss)
    marks[2].record()
    trial.optimize()
    marks[3].record()
    torch.cuda.synchronize()
    return StepTime(*(first.elapsed_time(second) for first, second in itertools.pairwise(marks)))


def elapsed_ms(device: torch.device, work: Callable[[], None]) -> float:
    """Milliseconds of ``work``, on the clock of the steps."""
    if device.type != "cuda":
        before = time.process_time()
        work()
        return 1e3 * (time.process_time() - before)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


@contextmanager
def no_collection() -> Iterator[None]:
    """The collector does not run inside. Not gc.freeze: losia_fx finds optimizers among the objects that gc knows."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def compile_time(step: Callable[[], None]) -> float:
    """Wall seconds that the first step takes longer than the second, which is run too."""
    first, second = _wall(step), _wall(step)
    return first - second


def _wall(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
