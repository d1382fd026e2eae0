"""On a GPU: whole runs against the CPU, resumed, on other streams, scaled, and under DistributedDataParallel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import losia_fx
from losia_fx.checkpoint.state import load_state, save_state
from losia_fx.method import kernels
from losia_fx.runtime.state import states_of
from tests.architectures.test_experts import MIXTRAL
from tests.gpu.device import DEVICE, batch, build, learning, on_cuda, step
from tests.support import table
from tests.support.table import LLAMA, TOY

pytestmark = pytest.mark.gpu
PERIOD = 3
OPTIONS: dict[str, Any] = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": PERIOD}


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(learning(model), lr=3e-3, eps=1e-7, **options)


@pytest.mark.parametrize(("compiler", "fused"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_a_run_is_that_of_the_cpu(compiler: str, fused: bool) -> None:
    """Two rounds in float64: the same subnets all the way, and the same weights but for rounding."""
    mine, theirs = build(TOY, torch.float64), table.build(TOY, torch.float64)
    losia_fx.transform(mine, compiler=compiler, **OPTIONS)
    losia_fx.transform(theirs, compiler="aot_eager", **OPTIONS)
    optimizers = adamw(mine, fused=fused), adamw(theirs)
    groups = len(losia_fx.controller(mine).groups)
    for number in range(2 * groups * PERIOD):
        inputs = table.batch(TOY, torch.float64)
        loss = step(mine, optimizers[0], {name: value.to(DEVICE) for name, value in inputs.items()})
        torch.testing.assert_close(loss.cpu(), step(theirs, optimizers[1], inputs), rtol=1e-8, atol=0)
        for one, other in zip(states_of(mine), states_of(theirs), strict=True):
            assert torch.equal(one.rows.cpu(), other.rows), (one.name, number)
            assert torch.equal(one.cols.cpu(), other.cols), (one.name, number)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name].cpu(), weight, rtol=1e-7, atol=1e-9)
    found = [[(event.step, event.group) for event in losia_fx.controller(m).history] for m in (mine, theirs)]
    assert found[0] == found[1]
    assert len(found[0]) == 2 * groups
    assert losia_fx.controller(mine).left_out == 0


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_run_in_bfloat16_learns(name: str) -> None:
    """Through a whole round of the schedule, compiled."""
    case = {"llama": LLAMA, "mixtral": MIXTRAL}[name]
    model = losia_fx.transform(build(case, torch.bfloat16), **OPTIONS)
    optimizer, controller = adamw(model, fused=True), losia_fx.controller(model)
    inputs = batch(case, torch.bfloat16)
    losses = [step(model, optimizer, inputs) for _ in range(len(controller.groups) * PERIOD)]
    assert losses[-1] < losses[0]
    assert controller.left_out == 0
    assert len(controller.history) == len(controller.groups)
    assert all(0 <= event.moved <= 1 and event.captured for event in controller.history)
    for state in states_of(model):
        assert torch.equal(state.block_of(state.weight), state.values.to(state.weight.dtype)), state.name


def test_saved_resumed_and_undone(tmp_path: Path) -> None:
    """From the middle of a slot, to the bit; and the delta leads there and back, on the GPU and on the CPU."""
    base = build(LLAMA)
    model, twin = build(LLAMA), build(LLAMA)
    losia_fx.transform(model, compiler="aot_eager", track_delta=True, **OPTIONS)
    optimizer = torch.optim.SGD(learning(model), lr=0.05)
    batches = [batch(LLAMA) for _ in range(3 * PERIOD)]
    for inputs in batches[: PERIOD + 1]:
        step(model, optimizer, inputs)
    save_state(model, tmp_path / "state.safetensors")
    losia_fx.transform(twin, compiler="aot_eager", **OPTIONS)
    twin.load_state_dict(model.state_dict())
    load_state(twin, tmp_path / "state.safetensors")
    twin_optimizer = torch.optim.SGD(learning(twin), lr=0.05)
    for inputs in batches[PERIOD + 1 :]:
        torch.testing.assert_close(
            step(twin, twin_optimizer, inputs), step(model, optimizer, inputs), rtol=1e-6, atol=0
        )
    for one, other in zip(states_of(model), states_of(twin), strict=True):
        assert torch.equal(one.rows, other.rows), one.name
        assert torch.equal(one.cols, other.cols), one.name
    losia_fx.save_delta(model, tmp_path / "delta.safetensors")
    tuned = losia_fx.restore(model).state_dict()
    for target in (build(LLAMA), table.build(LLAMA)):
        losia_fx.load_delta(target, tmp_path / "delta.safetensors")
        assert all(torch.equal(value.cpu(), tuned[name].cpu()) for name, value in target.state_dict().items())
        losia_fx.load_delta(target, tmp_path / "delta.safetensors", undo=True)
        assert all(torch.equal(value.cpu(), base.state_dict()[n].cpu()) for n, value in target.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_steps(fused: bool) -> None:
    """float16 under autocast: a step that overflows is none, and what is measured goes by unscaled gradients."""
    model = losia_fx.transform(build(LLAMA), compiler="aot_eager", **OPTIONS)
    optimizer, controller = adamw(model, fused=fused), losia_fx.controller(model)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**8)
    made = 0
    for number in range(PERIOD * len(controller.groups) + 2):
        spoiled = number in (1, 5)
        with torch.autocast(DEVICE.type, torch.float16):
            loss = model(**batch(LLAMA)).loss
        scaler.scale(loss * (float("inf") if spoiled else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        made += not spoiled
        assert controller.step == made
    assert controller.left_out == 0
    assert len(controller.history) == len(controller.groups)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@on_cuda
def test_on_a_stream_of_its_own() -> None:
    """What backwards, hooks and re-selections queue stands behind what made their inputs, whatever the stream."""
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.manual_seed(0)
        model = losia_fx.transform(build(LLAMA, torch.float64), compiler="aot_eager", **OPTIONS)
        optimizer = adamw(model)
        batches = [batch(LLAMA, torch.float64) for _ in range(3 * PERIOD)]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            losses = [step(model, optimizer, inputs) for inputs in batches]
        torch.cuda.current_stream().wait_stream(stream)
        rows = [state.rows.clone() for state in states_of(model)]
        results.append((torch.stack(losses), rows, {n: v.clone() for n, v in model.state_dict().items()}))
    (losses, rows, weights), (other_losses, other_rows, other_weights) = results
    torch.testing.assert_close(losses, other_losses, rtol=1e-10, atol=0)
    assert all(torch.equal(one, other) for one, other in zip(rows, other_rows, strict=True))
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-8, atol=1e-10)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device(DEVICE)
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_the_device_as_everybodys_default() -> None:
    results = []
    for default in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, batches = build(LLAMA, torch.float64), [batch(LLAMA, torch.float64) for _ in range(2 * PERIOD)]
        with default_device() if default else torch.device("cpu"):
            losia_fx.transform(model, compiler="aot_eager", **OPTIONS)
            optimizer = torch.optim.SGD(learning(model), lr=0.05)
            losses = [step(model, optimizer, inputs) for inputs in batches]
        assert all(state.handle.device.type == "cpu" for state in states_of(model))
        results.append((torch.stack(losses), [state.rows for state in states_of(model)]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=0)
    assert all(torch.equal(one, other) for one, other in zip(results[0][1], results[1][1], strict=True))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A world of this process alone."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_under_data_parallel(one_process: None) -> None:
    """With NCCL, the full gradients are averaged on the GPU; a rank alone trains as it does without."""
    models: list[Any] = [losia_fx.transform(build(TOY), compiler="aot_eager", **OPTIONS) for _ in range(2)]
    calls = models[0], DistributedDataParallel(models[1])
    optimizers = [adamw(call) for call in calls]
    for _ in range(2 * PERIOD):
        inputs = batch(TOY)
        losses = [step(call, optimizer, inputs) for call, optimizer in zip(calls, optimizers, strict=True)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for one, other in zip(states_of(models[0]), states_of(models[1]), strict=True):
        assert torch.equal(one.rows, other.rows), one.name
    assert losia_fx.controller(models[1]).ranks is not None
    assert losia_fx.controller(models[1]).left_out == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_passes_over_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importance and write-back by Inductor, with numbers that the host hands over, are the plain ones."""
    monkeypatch.setattr(kernels, "WORTH_COMPILING", 1)
    kernels._forms.clear()
    weight, grad = (torch.randn(64, 48, device=DEVICE).to(dtype) for _ in range(2))
    for factor, limit in ((0.5, None), (2.0, 0.3)):
        pairs = []
        for compiled in (False, True):
            pairs.append([torch.zeros(weight.shape, device=DEVICE) for _ in range(2)])
            for _ in range(2):
                kernels.update_importance(*pairs[-1], weight, grad, factor, limit, "mixed", (0.85, 0.7), compiled)
        for plain, fused in zip(*pairs, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    rows, cols = (torch.randperm(n)[:6].sort().values.to(DEVICE) for n in weight.shape)
    values, written = torch.randn(6, 6, device=DEVICE), [weight.clone() for _ in range(2)]
    for target, write in zip(written, (kernels._write_back, kernels.write_back), strict=True):
        write([target], [rows], [cols], [values])
    assert torch.equal(*written)
    assert torch.equal(written[0][rows][:, cols], values.to(dtype))


def test_selections_are_those_of_the_cpu() -> None:
    """Ties included: whole numbers, of which many sums are equal."""
    from losia_fx.method.fit import lower_median
    from losia_fx.method.selection import select_experts, select_subnet

    for experts in (None, 5):
        score = torch.randint(0, 4, (40, 56) if experts is None else (experts, 40, 56)).float()
        if experts is None:
            mine, theirs = select_subnet(score.to(DEVICE), 7, 9), select_subnet(score, 7, 9)
        else:
            score[2] = 0
            old = torch.arange(7).repeat(experts, 1), torch.arange(9).repeat(experts, 1)
            mine = select_experts(score.to(DEVICE), (old[0].to(DEVICE), old[1].to(DEVICE)))
            theirs = select_experts(score, old)
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.cpu(), other)
    for size, nans in itertools.product((1, 40, 100_000), (0.0, 0.3, 1.0)):
        values: Tensor = torch.randn(size)
        values[torch.rand(size) < nans] = -float("nan")
        torch.testing.assert_close(
            lower_median(values.to(DEVICE)).cpu(), values.nanmedian(), rtol=0, atol=0, equal_nan=True
        )
