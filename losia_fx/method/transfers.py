"""What the host asks of the device around a step. Each call waits for the device, once for all that it is given.

A device works behind the host, which queues its work ahead of it; every value that the host asks for makes it wait
until the queue is empty. So whoever decides by values collects them on the device and asks here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU, each in memory of its own: one transfer for each device and dtype among them."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in kinds.values():
        flat = torch.cat([tensors[number].detach().reshape(-1) for number in numbers]).cpu()
        parts = flat.split([tensors[number].numel() for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            found[number] = part.view(tensors[number].shape).clone()
    return [found[number] for number in range(len(tensors))]


def numbers_of(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of 1-D tensors."""
    return [tensor.tolist() for tensor in copies(tensors)]
