"""On a GPU: FSDP2 over one process, whose reductions run in streams of its own, beside the same model that is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import losia_fx
from losia_fx.runtime.state import states_of
from tests.gpu.device import DEVICE, batch, build, learning, step
from tests.support.table import TOY

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*reduction")]
OPTIONS: dict[str, Any] = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3, "compiler": "aot_eager"}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(DEVICE.type, (1,))
    for block in model.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.parametrize("busy", [False, True])
def test_a_sharded_run_is_that_of_the_whole_model(one_process: None, busy: bool) -> None:
    """busy: the device is far behind the host, and memory that was given back too early is written over."""
    whole = losia_fx.transform(build(TOY, torch.float64), **OPTIONS)
    cut = sharded(losia_fx.transform(build(TOY, torch.float64), **OPTIONS))
    optimizers = [torch.optim.AdamW(learning(model), lr=3e-3) for model in (whole, cut)]
    for _ in range(2 * OPTIONS["period"] * len(losia_fx.controller(whole).groups)):
        inputs = batch(TOY, torch.float64)
        losses = []
        for model, optimizer in zip((whole, cut), optimizers, strict=True):
            if busy and DEVICE.type == "cuda":
                torch.cuda._sleep(20_000_000)
            losses.append(step(model, optimizer, inputs))
            scribble()
        torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    for one, other in zip(states_of(whole), states_of(cut), strict=True):
        assert torch.equal(one.rows, other.rows), one.name
        assert torch.equal(one.cols, other.cols), one.name
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(full(cut.state_dict()[name]), value, rtol=1e-7, atol=1e-9)
    assert losia_fx.controller(cut).left_out == 0
    assert len(losia_fx.controller(cut).history) == len(losia_fx.controller(whole).history) > 0


def scribble() -> None:
    """Takes memory of many sizes from the allocator, and writes to it."""
    for size in (2**8, 2**10, 2**12, 2**14):
        for _ in range(8):
            torch.full((size,), float("nan"), device=DEVICE)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
