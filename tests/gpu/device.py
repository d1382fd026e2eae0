"""The device of these tests, and what several of them need on it.

A GPU; or, to read the tests over on a machine without one, what LOSIA_TEST_DEVICE names: "cpu" runs all of them but
those that are about CUDA itself.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import table
from tests.support.table import Case

DEVICE = torch.device(os.environ.get("LOSIA_TEST_DEVICE", "cuda"))
on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="about CUDA itself")


def build(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The weights of the CPU's tests, on the device."""
    return table.build(case, dtype).to(DEVICE)


def batch(case: Case, dtype: torch.dtype = torch.float32, **shape: int) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in table.batch(case, dtype, **shape).items()}


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> Tensor:
    """One optimizer step; its loss, still on the device."""
    loss: Tensor = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
