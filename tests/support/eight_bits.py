"""The kinds of 8-bit numbers that this torch multiplies on a CPU (with 2.11 none in float8), a machine on which that is
fast, and two processes that train in them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from losia_fx import LosiaWarning
from losia_fx.method.packing import DTYPES, quantise
from losia_fx.ops.packed import product
from losia_fx.runtime import expected


@functools.cache
def is_multiplied(kind: str) -> bool:
    (x, token_scales), (weight, scales) = quantise(torch.ones(16, 16), kind), quantise(torch.ones(16, 16), kind)
    try:
        product(x, weight.t(), token_scales, scales.t(), torch.float32)
    except NotImplementedError:
        return False
    return True


needs_float8 = pytest.mark.skipif(not is_multiplied("float8"), reason="this torch has no product of float8 on a CPU")
KINDS = [pytest.param(kind, marks=needs_float8) if kind == "float8" else kind for kind in DTYPES]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which 8-bit products are fast, so that nothing is said of it."""
    monkeypatch.setattr(expected, "share_of_dense", lambda *_: 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LosiaWarning)
        yield


RANK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import losia_fx
from tests.support.toy_runs import adamw, batches, learning
from tests.support.toys import loss_of
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
MODEL
ddp, optimizer = DistributedDataParallel(model), adamw(learning(model))
for ids in batches(9):
    loss_of(ddp, ids[2 * rank : 2 * rank + 2]).backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save((model.state_dict(), losia_fx.state_dict(model)), f"{sys.argv[2]}.{rank}")
"""


def trained_by_two(model: str, folder: Path) -> list[Any]:
    """(weights, LoSiA state) of each rank of DistributedDataParallel after nine steps. model: the lines that make it,
    of ``rank``, whose number is in its seed."""
    root, store = Path(__file__).parents[2], folder / "store"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    code = RANK.replace("MODEL", model)
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(store)], env=environment) for rank in (0, 1)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    return [torch.load(f"{store}.{rank}", weights_only=True) for rank in (0, 1)]
