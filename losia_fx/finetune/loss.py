"""What pretraining and fine-tuning share: the learning-rate curve and the held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def cosine_schedule(steps: int, *, warm_up: int, floor: float) -> Callable[[int], float]:
    """Factor on the learning rate at each step: a linear warm-up to 1, then a cosine down to ``floor``."""

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def on_device(batch: Tensor, device: torch.device) -> Tensor:
    """``batch`` there. A GPU fetches it by itself, without the host waiting for what it has queued there before."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    """Mean loss in nats a token over all blocks (n, length), in eval mode; the mode it found is put back."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    batches, losses = torch.split(blocks, batch_size), []
    for batch in batches:
        ids = on_device(batch, device)
        losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
    model.train(training)
    found: list[float] = torch.stack(losses).tolist()  # the device is waited for once
    return sum(loss * len(batch) for loss, batch in zip(found, batches, strict=True)) / len(blocks)
