"""The processes of a run: one by itself, or those that torchrun started, each with a share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among all: ``rank`` of ``size``; ``local`` counts on this machine alone, as its GPUs do."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """The part of a batch (size * n, ...) that is this process's: (n, ...)."""
        count = len(batch) // self.size
        return batch[self.rank * count : (self.rank + 1) * count]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What to call in training: gradients come out as the average over all processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def quiet(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: none but the last of a step needs its gradients averaged."""
        waits = isinstance(model, DistributedDataParallel) and not last
        return model.no_sync() if waits else nullcontext()  # type: ignore[operator]

    def mean(self, value: Tensor) -> float:
        """The mean over all processes of a 0-dim tensor."""
        if self.size > 1:
            dist.all_reduce(value)
        return float(value) / self.size

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set on any process: all of them hear the same, so all of them stop at the same step."""
        return flag if self.size == 1 else self.mean(torch.full((), float(flag), device=device)) > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def find_ranks() -> Ranks:
    """What torchrun says in the environment; one process where it says nothing."""
    number = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
    return Ranks(number["RANK"], number["WORLD_SIZE"], int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The processes know each other inside. After an error nobody waits: this process ends, and so do all others."""
    if ranks.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()
