"""Every test of this folder leaves the GPU as it found it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.device import DEVICE


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """Work that is under way ends, and memory goes back."""
    yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
