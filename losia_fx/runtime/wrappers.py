"""What people put around a model, or do to its parameters, that cannot train its subnets: refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from losia_fx._compat import active_ddp, joins
from losia_fx.config import LosiaConfig
from losia_fx.errors import TransformError

from .living import living
from .state import states_of


def refuse_wrappers(root: nn.Module) -> None:
    """Raises TransformError where something is around ``root``, in it or beside it that cuts up, copies or takes over
    its parameters. One look at the objects of the process, before the first forward with gradients."""
    kinds = {kind: name for name, find in _KINDS.items() if (kind := find()) is not None}
    if not kinds:
        return
    inside = set(root.modules())
    for found in living(*kinds):
        name = next(kinds[kind] for kind in type(found).__mro__ if kind in kinds)
        if found in inside or _CONCERNS[name](found, root):
            raise TransformError(f"{name} and a transformed model: {_REASONS[name]}")


def refuse_join(config: LosiaConfig) -> None:
    """Raises TransformError where ranks with fewer batches are to go ahead of the others, while subnets move."""
    ddp = active_ddp()
    if ddp is not None and joins(ddp) and config.schedule != "static":
        raise TransformError(
            "torch.distributed.algorithms.join.Join and a transformed model: a rank that has no more batches neither "
            "moves its subnets nor takes part in what the others measure, which would wait for it. Give every rank as "
            "many batches (DistributedSampler does), use Join with throw_on_early_termination=True, or "
            'losia_fx.transform(model, schedule="static")'
        )


def _stands_around(wrapper: nn.Module, root: nn.Module) -> bool:
    return any(module is root for module in wrapper.modules())


def _replicates(wrapper: nn.DataParallel[nn.Module], root: nn.Module) -> bool:
    return len(wrapper.device_ids) > 1 and _stands_around(wrapper, root)


def _pairs_by_position(callback: Any, root: nn.Module) -> bool:
    """Whether the callback keeps a reference of the same model, which has no subnets, in step with ``root``."""
    reference = callback.ref_model
    if not isinstance(reference, nn.Module) or states_of(reference):
        return False
    hidden = {id(state.values) for state in states_of(root)}
    mine = [tuple(p.shape) for p in root.parameters() if id(p) not in hidden]
    return mine == [tuple(p.shape) for p in reference.parameters()]


def _loaded(module: str, name: str) -> Callable[[], Any]:
    """The class, if somebody has imported it: who has not uses none of its kind."""
    return lambda: getattr(sys.modules.get(module), name, None)


_KINDS: dict[str, Callable[[], Any]] = {
    "DataParallel": lambda: nn.DataParallel if torch.cuda.device_count() > 1 else None,
    "FullyShardedDataParallel": _loaded("torch.distributed.fsdp", "FullyShardedDataParallel"),
    "DeepSpeed": _loaded("deepspeed.runtime.engine", "DeepSpeedEngine"),
    "TRL's sync_ref_model": _loaded("trl.trainer.callbacks", "SyncRefModelCallback"),
}

_CONCERNS: dict[str, Callable[[Any, nn.Module], bool]] = {
    "DataParallel": _replicates,
    "FullyShardedDataParallel": _stands_around,
    "DeepSpeed": _stands_around,
    "TRL's sync_ref_model": _pairs_by_position,
}

_REASONS = {
    "DataParallel": "its replicas have no subnets of their own. Use DistributedDataParallel, a process a device",
    "FullyShardedDataParallel": "it flattens parameters, so that rows and columns are no longer to be had. Shard "
    "losia_fx.transform(model) with fully_shard (FSDP2), or put DistributedDataParallel around it",
    "DeepSpeed": "its optimizers step flat or master copies of the parameters, so that no subnet could be moved to "
    "another place. Shard losia_fx.transform(model) with fully_shard (FSDP2), or put DistributedDataParallel around "
    "it: the subnets' moments are an eighth of an eighth of the full ones",
    "TRL's sync_ref_model": "it pairs the parameters of the two by position, and the reference has no subnets among "
    "its own. Give the trainer ref_model=copy.deepcopy(model), made of the transformed model",
}
