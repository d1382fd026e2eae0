"""One run: a base, a text, a method, a learning rate and a seed -> what was learnt and what was forgotten."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .bases import Base
from .methods import Method
from .text import Corpus, token_blocks, windows

BATCH = 8
WARM_UP, FLOOR = 0.1, 0.1
"""Shares: of the steps, and of the learning rate."""


@dataclass(frozen=True)
class Run:
    """What identifies a run among those of one setting."""

    base: str
    text: str
    method: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Held-out nats a token, before and after, of the text that was learnt and of the one that the base knew."""

    learnt: float
    forgotten: float
    learnt_before: float
    forgotten_before: float
    trained: int
    """Parameters that the optimizer held."""
    seconds: float
    """Of training: on a CPU its own clock, else the wall's."""


class Task:
    """A base and a text to be learnt, tokenized once for all runs, on the device that they run on."""

    def __init__(self, base: Base, text: Corpus, device: torch.device) -> None:
        tokenizer = base.tokenizer()
        self.base, self.name, self.device = base, text.name, device
        self.train = token_blocks(text.train, tokenizer).to(device)
        self.learnt = windows(text.held_out, tokenizer).to(device)
        self.known = windows(base.known.held_out, tokenizer).to(device)
        model = base.model().to(device)
        self.before = (held_out_loss(model, self.learnt), held_out_loss(model, self.known))

    def run(self, method: Method, lr: float, seed: int, steps: int) -> Outcome:
        torch.manual_seed(seed)  # of LoRA's first weights; subnets have their own
        model = method.prepare(self.base.model().to(self.device), seed)
        began = self._clock()
        trained = train(model, self.train, method, lr, seed, steps)
        seconds = self._clock() - began
        after = (held_out_loss(model, self.learnt), held_out_loss(model, self.known))
        return Outcome(*after, *self.before, trained, round(seconds, 2))

    def _clock(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def train(model: nn.Module, blocks: Tensor, method: Method, lr: float, seed: int, steps: int) -> int:
    """``steps`` steps on batches in seeded order; returns how many parameters the optimizer holds."""
    optimizer = method.optimizer(model, lr)
    scheduler = LambdaLR(optimizer, lambda step: cosine(step, steps))
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    for _, batch in zip(range(steps), batches(blocks, seed), strict=False):
        loss(model, batch).backward()
        if method.clip_norm is not None:
            nn.utils.clip_grad_norm_(learning, method.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return sum(parameter.numel() for parameter in learning)


def cosine(step: int, steps: int) -> float:
    """The share of the learning rate: a linear warm-up, then a cosine down to FLOOR."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2


def batches(blocks: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless (BATCH, LENGTH), in a new order on each pass; a pass ends with its last whole batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(blocks), generator=generator, device="cpu").to(blocks.device)
        yield from (blocks[some] for some in order.split(BATCH) if len(some) == min(BATCH, len(blocks)))


def loss(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return found


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor) -> float:
    """Mean nats a token."""
    model.eval()
    parts = blocks.split(BATCH)
    return sum(loss(model, part).item() * len(part) for part in parts) / len(blocks)
