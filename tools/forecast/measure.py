"""The memory of a real step, by the parts of forecast.py: tensors are looked up and counted, not computed from shapes.

Activations are what autograd's saved_tensors_hooks see of a forward, each storage once, parameters and inputs aside.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import losia_fx
from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaWarning
from losia_fx.ops.localization import tapped_bytes
from losia_fx.runtime.controller import Controller
from losia_fx.runtime.quantised_weight import QuantisedWeight

from ..graphs.capture import tensors_of
from ..load_model import Example
from .slots import open_slot

Result = TypeVar("Result")


def measure(model: nn.Module, example: Example, config: LosiaConfig, group: int) -> dict[str, int]:
    """Bytes by part, of two steps in the slot of ``group`` on a copy of ``model``, with AdamW.

    Two, so that I and U are there when G is. All steps of a slot are profiled here, the head's is as all others, and
    it has three steps at least: nothing moves, and so no moments start anew.
    """
    twin = copy.deepcopy(model)
    slots = replace(config, period=max(3, config.period), head_period=None, profile_steps=None)
    memory = {"weights": unique_bytes([*twin.parameters(), *twin.buffers()])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LosiaWarning)
        losia_fx.transform(twin, slots)
    controller = losia_fx.controller(twin)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.0)
    _step(twin, example)
    open_slot(controller, group)
    packed = list(packed_tensors(controller))
    memory["packed"] = unique_bytes(packed)
    memory["weights"] -= sum(w.numel() * w.itemsize for w in twin.parameters() if isinstance(w, QuantisedWeight))
    for _ in range(2):
        optimizer.zero_grad()
        found = _step(twin, example, packed)
        memory |= {**found, "profile": profile_bytes(controller)}
        memory["gradients"] = unique_bytes(p.grad for p in twin.parameters() if p.grad is not None)
        optimizer.step()
    memory["moments"] = unique_bytes(optimizer_tensors(optimizer))
    subnets = losia_fx.subnets(twin).values()
    memory["subnets"] = unique_bytes(subnet.values for subnet in subnets)
    memory["indices"] = unique_bytes(index for subnet in subnets for index in (subnet.rows, subnet.cols))
    return memory


def _step(model: nn.Module, example: Example, packed: Sequence[Tensor] = ()) -> dict[str, int]:
    def forward() -> list[Tensor]:
        return [t for t in tensors_of(model(*example.args, **example.kwargs)) if t.requires_grad]

    with torch.enable_grad():
        losses, kept = kept_by(forward, (*model.parameters(), *model.buffers(), *packed, *_inputs(example)))
        found = {"activations": kept, "tapped": tapped_bytes()}
        torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])
    return found


def kept_by(forward: Callable[[], Result], known: Iterable[Tensor]) -> tuple[Result, int]:
    """What ``forward`` returns, and the bytes that it keeps for the backward, the memory of ``known`` tensors aside."""
    aside = {_memory(part) for tensor in known for part in _parts(tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        parts = _parts(tensor)
        kept.update({_memory(part): part.untyped_storage().nbytes() for part in parts if _memory(part) not in aside})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return result, sum(kept.values())


def profile_bytes(controller: Controller) -> int:
    """I, U and G of all groups that are being profiled."""
    return unique_bytes(profile_tensors(controller))


def profile_tensors(controller: Controller) -> Iterator[Tensor]:
    """I, U and G of all groups that are being profiled."""
    profiles = [state.profile for state in controller.states if state.profile is not None]
    parts = (part for profile in profiles for part in (profile.importance, profile.uncertainty, profile.grad))
    return (part for part in parts if part is not None)


def packed_tensors(controller: Controller) -> Iterator[Tensor]:
    """The weights in 8 bits, with their scales."""
    return (tensor for state in controller.states if state.packed is not None for tensor in state.packed_inputs())


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """The memory behind ``tensors``, each storage once."""
    parts = (part for tensor in tensors for part in _parts(tensor))
    return sum({_memory(part): part.untyped_storage().nbytes() for part in parts}.values())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What has the memory of a tensor."""
    if isinstance(tensor, QuantisedWeight):
        return tensor.numbers, tensor.scales
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


def optimizer_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Moments, step counts and the like."""
    return [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]


def _inputs(example: Example) -> list[Tensor]:
    return [value for value in (*example.args, *example.kwargs.values()) if isinstance(value, Tensor)]


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage().data_ptr()
