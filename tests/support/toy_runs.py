"""Seeded toy runs that are continued, interrupted and compared to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import losia_fx
from tests.support.toys import Toy, batch, loss_of

PERIOD = 4
OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "output_rank_factor": 0.25, "period": PERIOD}

Make = Callable[[list[nn.Parameter]], Optimizer]


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.1)


def toy(dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> nn.Module:
    """A transformed toy of two layers and so three groups; the same one for the same seed."""
    torch.manual_seed(seed)
    return losia_fx.transform(Toy().to(dtype), **{**OPTIONS, **options})


def batches(count: int, size: int = 4) -> list[Tensor]:
    torch.manual_seed(7)
    return [batch(size) for _ in range(count)]


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: nn.Module, optimizer: Optimizer, steps: list[Tensor], clip: float | None = 0.5) -> None:
    for ids in steps:
        loss_of(model, ids).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Every parameter, every subnet and every entry of the state, to the bit."""
    for (name, first), (_, second) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(first, second), name
    first_state, second_state = losia_fx.state_dict(one), losia_fx.state_dict(other)
    assert first_state.keys() == second_state.keys()
    for key, value in first_state.items():
        assert same(value, second_state[key]), key
