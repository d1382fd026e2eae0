"""carry_moments: an Adam-like optimizer's second moment of a subnet goes on from what is known of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from losia_fx.method.factored import Means, Place, filled, second_moment, take_in

from . import notices
from .optimizers import found_inf, grad_scale
from .sharding import seen_by
from .shards import local
from .state import SubnetState
from .train_state import TrainState

BETA2 = 0.99
"""Decay of the running means of rows and columns."""
NAMES = ("step", "exp_avg", "exp_avg_sq")
"""Of the entries of an optimizer's state by which it is known to be like Adam."""


@torch.no_grad()
def take_in_gradients(train: TrainState, states: Sequence[SubnetState], optimizers: Sequence[Optimizer]) -> None:
    """Takes S.grad, as the optimizers see it, into the running means. Not of a step that a GradScaler has left out."""
    if not train.config.carry_moments or any(found_inf(each) for each in optimizers):
        return
    scale = math.prod(grad_scale(each) for each in optimizers)
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[SubnetState, Tensor]]] = {}
    for state in states:
        if (whole := state.values.grad) is not None:
            grad = local(whole)
            alike.setdefault((grad.device, grad.dtype), []).append((state, grad))
    for found in alike.values():
        places = [Place(state.rows, state.cols) for state, _ in found]
        grads = [grad if scale == 1.0 else grad / scale for _, grad in found]
        seen = seen_by([state for state, _ in found], grads)
        take_in([_means(state) for state, _ in found], places, seen, BETA2)


def _means(state: SubnetState) -> Means:
    if state.means is None:
        state.means = Means.of(state.shape, state.values)
    return state.means


@torch.no_grad()
def carry_over(train: TrainState, optimizer: Optimizer, state: SubnetState) -> bool:
    """Makes the optimizer's state of a subnet that has moved anew in this way; False where it has to start anew.

    exp_avg_sq becomes v of the new place times 1 - beta2^step, the correction that Adam takes off again (beta2: of the
    optimizer's group), an index without a visit counting as the mean of the others. step stays, and whatever else is
    of S's size is zero. May be done again.
    """
    old, means = optimizer.state.get(state.values), state.means
    if not old or means is None:
        return False
    group = next((g for g in optimizer.param_groups if any(p is state.values for p in g["params"])), {})
    second = old.get("exp_avg_sq")
    fits = all(name in old for name in NAMES) and isinstance(second, Tensor) and second.shape == state.values.shape
    if not fits or "betas" not in group:
        notices.warn_not_carried(train, optimizer)
        return False
    beta2 = float(group["betas"][1])
    correction = 1 - beta2 ** torch.as_tensor(old["step"], dtype=torch.float64, device=second.device)
    v = second_moment(filled(means), Place(state.rows, state.cols), state.portion) * correction.to(means.rows)
    fresh = {key: torch.zeros_like(value) if _is_of_size(value, state) else value for key, value in old.items()}
    local(fresh["exp_avg_sq"]).copy_(v)
    if "max_exp_avg_sq" in fresh:  # amsgrad steps by the largest so far
        fresh["max_exp_avg_sq"] = fresh["exp_avg_sq"].clone()
    optimizer.state[state.values] = fresh
    return True


def _is_of_size(value: object, state: SubnetState) -> bool:
    return isinstance(value, Tensor) and value.shape == state.values.shape
