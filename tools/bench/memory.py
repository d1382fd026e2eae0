"""The memory of one step: its peak, what is kept for the backward, and the optimizer's state.

On a CPU the allocator's events, as torch.profiler writes them down, are summed up on top of what the method holds when
the step begins; on a GPU the allocator keeps the peak itself.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from losia_fx.runtime.controller import find_controller

from ..forecast import measure
from .methods import Trial

CPU_TRACKER = "allocator events of torch.profiler"
CUDA_TRACKER = "torch.cuda.max_memory_allocated"


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    held: int
    """Weights in full, whatever the method adds to them, and the optimizer's state."""
    peak: int
    """The most during a step, with what is held."""
    saved: int
    """Kept by the forward for the backward, weights and inputs aside."""
    optimizer: int


def measure_memory(trial: Trial) -> Memory:
    """Of a step that is warm."""
    trial.prepare()
    own = held_tensors(trial)
    held = measure.unique_bytes(own)
    rise = _cuda_rise(trial) if own[0].is_cuda else allocated_peak(trial.step)
    return Memory(held, held + rise, _saved(trial), measure.unique_bytes(_state(trial)))


def held_tensors(trial: Trial) -> list[Tensor]:
    """Everything of a method that outlives a step. Gradients do not: they are None between steps."""
    controller = find_controller(trial.model)
    found = [] if controller is None else [*measure.profile_tensors(controller), *measure.packed_tensors(controller)]
    return [*trial.model.parameters(), *trial.model.buffers(), *_state(trial), *found]


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes on the CPU that ``run`` has allocated and not freed yet.

    The profiler does not see memory from before that is freed, so replacing it counts as more.
    """
    return max(accumulate(_allocations(run), initial=0))


def _allocations(run: Callable[[], object]) -> Iterator[int]:
    """Bytes of each allocation, negative where memory was freed, in the order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines a step to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    memory.sort(key=lambda event: event["args"]["Ev Idx"])
    return (event["args"]["Bytes"] for event in memory)


def _cuda_rise(trial: Trial) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trial.step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _saved(trial: Trial) -> int:
    trial.prepare()
    loss, saved = measure.kept_by(trial.forward, [*held_tensors(trial), *trial.batch.values()])
    trial.backward(loss)
    trial.optimize()
    return saved


def _state(trial: Trial) -> list[Tensor]:
    return [] if trial.optimizer is None else measure.optimizer_tensors(trial.optimizer)
