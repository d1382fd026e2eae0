"""What losia_fx needs to know of torch.optim: the global step hooks, whose parameters are whose, state made anew."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .state import SubnetState

Hook = Callable[[Optimizer, Any, Any], None]
_followed: list[Any] = []


def follow_optimizers(before: Hook, after: Hook) -> None:
    """Has ``before`` and ``after`` called around every step of every optimizer of the process; once."""
    if not _followed:
        _followed.extend((register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)))


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def owned_states(optimizer: Optimizer, states: Sequence[SubnetState]) -> list[SubnetState]:
    """Those of ``states`` whose S the optimizer steps."""
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    return [state for state in states if id(state.values) in held]


def weights_without_subnet(optimizer: Optimizer, states: Sequence[SubnetState]) -> list[SubnetState]:
    """Those of ``states`` whose W the optimizer holds, but not S."""
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    return [state for state in states if id(state.weight) in held and id(state.values) not in held]


def found_inf(optimizer: Optimizer) -> bool:
    """Whether a GradScaler told a fused optimizer to leave this step out: its hooks run all the same."""
    flag = getattr(optimizer, "found_inf", None)
    return flag is not None and bool(flag)


def grad_scale(optimizer: Optimizer) -> float:
    """The scale that a fused optimizer takes off its gradients within the step; 1.0 where there is none."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def restart_state(optimizer: Optimizer, values: nn.Parameter) -> None:
    """Moments and step count of ``values`` start anew: the optimizer makes them again at its next step.

    Adagrad makes its state in its constructor only, so it is given what the constructor would give. Fused SGD takes
    momentum of all its parameters or of none: a momentum of zero, which (without dampening) steps as a fresh one.
    """
    state = optimizer.state.pop(values, None)
    if not state:
        return
    if isinstance(optimizer, torch.optim.Adagrad):
        start = optimizer.defaults["initial_accumulator_value"]
        optimizer.state[values] = {"step": torch.zeros_like(state["step"]), "sum": torch.full_like(state["sum"], start)}
    elif isinstance(optimizer, torch.optim.SGD) and state.get("momentum_buffer") is not None and _is_fused(optimizer):
        optimizer.state[values] = {"momentum_buffer": torch.zeros_like(state["momentum_buffer"])}


def _is_fused(optimizer: Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)


def has_stepped(optimizer: Optimizer, values: nn.Parameter) -> bool:
    """Whether the optimizer's state of ``values`` comes from a step. Adagrad has one before any: its count says 0."""
    state = optimizer.state.get(values) or {"step": 0}
    return float(state.get("step", 1)) > 0


def live_optimizers() -> list[Optimizer]:
    """Every optimizer of the process. issubclass of the type: isinstance would wake dead weak proxies.

    Not what stands around one (accelerate's): it shows the same groups and state, but its kind is not its own.
    """
    found = [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    return [each for each in found if not isinstance(each.__dict__.get("optimizer"), Optimizer)]


def adopt_subnets(optimizer: Optimizer, states: Sequence[SubnetState]) -> None:
    """S takes W's place in the optimizer's groups, with W's moments, where it is not there already."""
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    by_weight = {id(state.weight): state for state in states}
    for group in optimizer.param_groups:
        for index, parameter in reversed(list(enumerate(group["params"]))):
            state = by_weight.get(id(parameter))
            if state is None:
                continue
            if id(state.values) in held:
                del group["params"][index]
            else:
                group["params"][index] = state.values
            moments = optimizer.state.pop(parameter, None)
            if moments is not None and state.values not in optimizer.state:
                optimizer.state[state.values] = {key: _gathered(value, state) for key, value in moments.items()}


def _gathered(value: Any, state: SubnetState) -> Any:
    if isinstance(value, Tensor) and value.shape == state.weight.shape:
        return state.block_of(value).to(state.values.dtype)
    return value
