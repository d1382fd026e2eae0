"""DistributedDataParallel and FSDP1, as far as they must be known."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch


def ddp_group() -> ProcessGroup | None:
    """The processes of the DistributedDataParallel whose forward is under way; None outside of one."""
    ddp = active_ddp()
    return None if ddp is None else ddp.process_group


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is under way; None outside of one."""
    found: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return found


def joins(ddp: DistributedDataParallel) -> bool:
    """Whether torch.distributed.algorithms.join.Join lets ranks with fewer batches go ahead of the others: such a rank
    answers what DistributedDataParallel sends round, and nothing else."""
    return bool(ddp._join_config.enable and not ddp._join_config.throw_on_early_termination)


def ddp_ignores(module: nn.Module, add: Collection[str] = (), remove: Collection[str] = ()) -> None:
    """Parameters and buffers, by name, that a DistributedDataParallel made around ``module`` later leaves alone.

    Documented in DistributedDataParallel, but experimental: the names are an attribute of the module.
    """
    names = set(getattr(module, _DDP_IGNORES, ()))
    names = (names | set(add)) - set(remove)
    if names:
        setattr(module, _DDP_IGNORES, sorted(names))
    elif hasattr(module, _DDP_IGNORES):
        delattr(module, _DDP_IGNORES)


_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def whole_graphs(under_ddp: bool) -> AbstractContextManager[Any]:
    """Context in which Dynamo cuts no graph up for DistributedDataParallel's buckets.

    The pieces are compiled with stand-ins for the parameters, in which no subnet can be found; and what is reduced is
    the subnets' gradients, which are small.
    """
    return torch._dynamo.config.patch(optimize_ddp=False) if under_ddp else nullcontext()


def all_gather(whole: torch.Tensor, part: torch.Tensor, group: ProcessGroup) -> None:
    """``whole`` (n * len,) = the ``part`` (len,) of every rank, one after the other.

    torch 2.13 gave it another name, and warns of the old one.
    """
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(whole, part, group=group)


def is_flattened(parameter: nn.Parameter) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) keeps it flattened: as a part of others, or made of others.

    Where it keeps the original parameters nothing else tells them from any other.
    """
    return bool(getattr(parameter, "_fsdp_flattened", False))
