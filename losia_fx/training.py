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


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    """Mean loss in nats a token over all blocks (n, length), in eval mode; the mode it found is put back."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for batch in torch.split(blocks, batch_size):
        ids = batch.to(device)
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(batch)
    model.train(training)
    return total / len(blocks)
