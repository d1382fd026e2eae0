"""What losia_fx needs to know of torch.optim: the global step hooks, and what is to be read off an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from losia_fx import registry

from .living import living

Hook = Callable[[Optimizer, Any, Any], None]
_followed: list[Any] = []


def follow_optimizers(before: Hook, after: Hook) -> None:
    """Has ``before`` and ``after`` called around every step of every optimizer of the process; once."""
    if not _followed:
        _followed.extend((register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)))


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def signature(optimizer: Optimizer) -> tuple[Any, ...]:
    """Another whenever the optimizer's groups, or the subnets of the process, are others than before."""
    return (registry.generation(), *(tuple(map(id, group["params"])) for group in optimizer.param_groups))


def live_optimizers() -> list[Optimizer]:
    """Every optimizer of the process."""
    return living(Optimizer)


def inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Optimizers that stand inside this one (accelerate's, Lookahead, SAM): they step the same parameters for it."""
    return [each for each in optimizer.__dict__.values() if issubclass(type(each), Optimizer)]


def found_inf(optimizer: Optimizer) -> bool:
    """Whether a GradScaler told a fused optimizer to leave this step out: its hooks run all the same."""
    flag = getattr(optimizer, "found_inf", None)
    return flag is not None and bool(flag)


def grad_scale(optimizer: Optimizer) -> float:
    """The scale that a fused optimizer takes off its gradients within the step; 1.0 where there is none."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
