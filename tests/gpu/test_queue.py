"""On a GPU: what makes the host wait, what stays in the allocator, and how batches get there."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import losia_fx
from losia_fx.method.transfers import copies
from losia_fx.ops.localization import tapped_bytes
from tests.architectures.test_experts import MIXTRAL
from tests.gpu.device import DEVICE, batch, build, learning, on_cuda, step
from tests.support.table import LLAMA, TOY, Case, ToyWithLoss

pytestmark = pytest.mark.gpu
PERIOD = 4


def waits(work: Callable[[], object]) -> list[str]:
    """Where the host has waited for the device within ``work``, as torch tells it."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}: {w.message}" for w in caught if "called a synchronizing" in str(w.message)]


def has_grouped_kernel() -> bool:
    """Of other architectures torch's grouped product reads its offsets on the host."""
    return torch.cuda.get_device_capability()[0] in (9, 10)


@on_cuda
@pytest.mark.parametrize(
    ("case", "dtype", "compiler"),
    [
        (LLAMA, torch.float32, "eager"),
        (LLAMA, torch.float32, "aot_eager"),
        (LLAMA, torch.bfloat16, "inductor"),
        (MIXTRAL, torch.bfloat16, "aot_eager"),
        (MIXTRAL, torch.bfloat16, "inductor"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_the_host_waits_where_it_must(case: Case, dtype: torch.dtype, compiler: str) -> None:
    """At rest never, with a block profiled once, and a few times when it moves: as tests/device counts on "meta", and
    once more, since there no values can be compared."""
    if case is MIXTRAL and not has_grouped_kernel():
        pytest.skip("torch's grouped product waits on this architecture")
    model = losia_fx.transform(build(case, dtype), compiler=compiler, period=PERIOD, profile_steps=2, rank_factor=0.25)
    optimizer, controller = torch.optim.AdamW(learning(model), lr=1e-3), losia_fx.controller(model)
    inputs = batch(case, dtype)

    def train() -> None:
        model(**inputs).loss.backward()
        model(**inputs).loss.backward()  # a second micro-batch
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    for _ in range(PERIOD):  # compiles, keeps the base, compares values, and moves the head once
        train()
    for expected in (0, 0, 1, 3):
        found = waits(train)
        assert len(found) == expected, found
    assert [event.group for event in controller.history] == [0, 1]


@on_cuda
def test_the_waits_are_seen() -> None:
    """Or the test above would find none."""
    x = torch.ones(3, device=DEVICE)
    assert len(waits(lambda: (x.sum().item(), x.nonzero(), x.cpu()))) >= 3
    assert waits(lambda: (x + 1, copies([]))) == []


def test_copies_are_whole() -> None:
    given = [torch.randn(3, 2, device=DEVICE), torch.arange(5, device=DEVICE), torch.tensor([1.5]), torch.tensor(2)]
    for copy, tensor in zip(copies(given), given, strict=True):
        assert copy.device.type == "cpu"
        assert torch.equal(copy, tensor.cpu())


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


@on_cuda
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_nothing_stays_in_the_allocator(compiler: str) -> None:
    """I and U go when their slot ends, taps with their step: round after round the same memory is held."""
    model = losia_fx.transform(build(LLAMA), compiler=compiler, period=2, rank_factor=0.25)
    optimizer, controller = torch.optim.AdamW(learning(model), lr=1e-3), losia_fx.controller(model)
    inputs, round_of = batch(LLAMA), 2 * len(controller.groups)
    for _ in range(round_of):
        step(model, optimizer, inputs)
    held = allocated()
    for _ in range(2):
        for _ in range(round_of):
            step(model, optimizer, inputs)
        assert tapped_bytes() == 0
        assert abs(allocated() - held) <= 2**16  # blocks of optimizer state that a re-selection makes anew


@on_cuda
def test_a_step_takes_less_memory_than_a_full_one() -> None:
    """No gradient and no optimizer state of the weights' size: many times what the libraries take for themselves."""

    def peak(model: nn.Module) -> int:
        optimizer = torch.optim.AdamW(learning(model), lr=1e-3)
        for _ in range(2):
            step(model, optimizer, inputs)
        torch.cuda.synchronize()
        before = sum(p.numel() * p.element_size() for p in model.parameters())
        torch.cuda.reset_peak_memory_stats()
        step(model, optimizer, inputs)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before

    inputs = batch(TOY)
    full = peak(ToyWithLoss(layers=4, width=512, inner=2048).to(DEVICE))
    gc.collect()
    mine = ToyWithLoss(layers=4, width=512, inner=2048).to(DEVICE)
    assert peak(losia_fx.transform(mine, compiler="aot_eager", schedule="static")) < 0.6 * full
