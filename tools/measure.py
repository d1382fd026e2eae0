"""The memory of a real step, by the parts of forecast.py: tensors are looked up and counted, not computed from shapes.

Activations are what autograd's saved_tensors_hooks see of a forward, each storage once, parameters and inputs aside.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import losia_fx
from losia_fx.config import LosiaConfig
from losia_fx.controller import Controller
from losia_fx.errors import LosiaWarning
from losia_fx.taps import tapped_bytes

from .capture import tensors_of
from .load_model import Example


def measure(model: nn.Module, example: Example, config: LosiaConfig, group: int) -> dict[str, int]:
    """Bytes by part, of two steps in the slot of ``group`` on a copy of ``model``, with AdamW.

    Two, so that I and U are there when G is: a period of one is measured as one of two.
    """
    twin = copy.deepcopy(model)
    memory = {"weights": _bytes([*twin.parameters(), *twin.buffers()])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LosiaWarning)
        losia_fx.transform(twin, replace(config, period=max(2, config.period)))
    controller = losia_fx.controller(twin)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.0)
    _step(twin, example)
    _open_slot(controller, group)
    for _ in range(2):
        optimizer.zero_grad()
        found = _step(twin, example)
        memory |= {**found, "profile": profile_bytes(controller)}
        memory["gradients"] = _bytes(p.grad for p in twin.parameters() if p.grad is not None)
        optimizer.step()
    memory["moments"] = _bytes(_state(optimizer.state))
    subnets = losia_fx.subnets(twin).values()
    memory["subnets"] = _bytes(subnet.values for subnet in subnets)
    memory["indices"] = _bytes(index for subnet in subnets for index in (subnet.rows, subnet.cols))
    return memory


def _open_slot(controller: Controller, group: int) -> None:
    """Has the next step be the first of the group's slot."""
    asynchronous = controller.config.schedule == "async"
    controller.step = group * controller.config.period if asynchronous else 0
    controller.set_groups(controller.states, controller.groups)


def _step(model: nn.Module, example: Example) -> dict[str, int]:
    known = {_memory(t) for t in (*model.parameters(), *model.buffers(), *_inputs(example))}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _memory(tensor) not in known:
            kept[_memory(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = [t for t in tensors_of(model(*example.args, **example.kwargs)) if t.requires_grad]
        found = {"activations": sum(kept.values()), "tapped": tapped_bytes()}
        torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])
    return found


def profile_bytes(controller: Controller) -> int:
    """I, U and G of all groups that are being profiled."""
    profiles = [state.profile for state in controller.states if state.profile is not None]
    parts = (part for profile in profiles for part in (profile.importance, profile.uncertainty, profile.grad))
    return _bytes(part for part in parts if part is not None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_memory(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _state(state: Mapping[Any, Mapping[str, Any]]) -> list[Tensor]:
    return [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]


def _inputs(example: Example) -> list[Tensor]:
    return [value for value in (*example.args, *example.kwargs.values()) if isinstance(value, Tensor)]


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage().data_ptr()
