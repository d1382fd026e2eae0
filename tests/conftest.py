"""What every test starts from: the same seed, no compiled code of the test before."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from losia_fx.compile.backend import losia_backend

if "losia" not in torch._dynamo.list_backends(exclude_tags=None):
    # A checkout that is not installed has no entry point; an installed one is tested as its users have it.
    torch._dynamo.register_backend(losia_backend, name="losia")

hypothesis.settings.register_profile("untimed", deadline=None)  # a machine that is busy proves nothing wrong
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Seeds torch and drops Dynamo's compiled code and counters."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def apart() -> None:
    """Puts what is there by now, imports above all, out of gc's sight.

    It would come to a million objects, to be searched with every new model for optimizers and wrappers: half of the
    time that these tests take."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips slow tests unless ``-m`` is given, and gpu tests where there is no CUDA device and none stands for it."""
    skips = {}
    if not config.option.markexpr:
        skips["slow"] = pytest.mark.skip(reason="slow: run with -m slow")
    if not torch.cuda.is_available() and "LOSIA_TEST_DEVICE" not in os.environ:  # see tests/gpu/device.py
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)
