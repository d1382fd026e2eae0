"""Models with a past: a base, what training made of it, and its delta file. Equality here is equality of bits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import losia_fx
from losia_fx.method.visits import as_integers
from tests.support.toys import Toy, batch, loss_of

OPTIONS: dict[str, Any] = {
    "compiler": "eager", "rank_factor": 0.5, "period": 2, "importance": "random", "track_delta": True,
}  # fmt: skip
"""Random subnets of half the rows and columns: every visit overlaps the ones before it."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every weight of the model, as a checkpoint would name them."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    """Whether the model's weights have the bits of ``expected``."""
    found = model.state_dict()
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(as_integers(found[name]), as_integers(tensor))
        for name, tensor in expected.items()
    )


def train(model: nn.Module, steps: int = 12, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    for _ in range(steps):
        loss_of(model, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@dataclass
class Made:
    base: Toy
    """Plain and untrained."""
    model: Toy
    """Transformed and trained."""
    tuned: dict[str, Tensor]
    file: Path


def make(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, steps: int = 12, **options: Any) -> Made:
    torch.manual_seed(seed)
    model = Toy(layers=2, bias=True).to(dtype)
    base = copy.deepcopy(model)
    losia_fx.transform(model, **{**OPTIONS, "seed": seed, **options})
    train(model, steps)
    file = folder / f"{seed}.safetensors"
    losia_fx.save_delta(model, file)
    return Made(base, model, weights(model), file)
