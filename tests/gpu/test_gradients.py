"""On a GPU: every subnet's gradient against plain autograd there, in all dtypes, compiled and checkpointed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx.method.subnet import gather
from losia_fx.runtime.state import states_of
from tests.architectures.test_experts import MIXTRAL
from tests.gpu.device import DEVICE, batch, build
from tests.support.table import BERT_UNTIED, LLAMA, VIT, Case

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")]
Context = Callable[[], AbstractContextManager[Any]]
Gradients = dict[str, Tensor]
EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}
BF16, FP16, SINGLE = torch.bfloat16, torch.float16, torch.float32


def gradients(model: nn.Module, inputs: dict[str, Tensor], context: Context = nullcontext) -> Gradients:
    with context():
        loss = model(**inputs).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain(model: nn.Module, inputs: dict[str, Tensor], context: Context = nullcontext) -> Gradients:
    return gradients(copy.deepcopy(model).requires_grad_(True), inputs, context)


def off(actual: Tensor | None, truth: Tensor) -> float:
    """The largest difference of an element."""
    assert actual is not None
    assert truth.any(), "nothing to compare"
    return float((actual.double() - truth.double()).abs().max())


def error(actual: Tensor | None, truth: Tensor) -> float:
    """The same, relative to the largest element."""
    return off(actual, truth) / float(truth.double().abs().max())


def transformed(model: nn.Module, **options: Any) -> nn.Module:
    """All groups are profiled, so that the full gradients can be looked at too."""
    return losia_fx.transform(model, **{"rank_factor": 0.25, "schedule": "sync", **options})


def pairs(model: nn.Module, truth: Gradients) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """(weight, found, true): every subnet's gradient, and every full one."""
    for state in states_of(model):
        assert state.values.grad is not None, state.name
        assert state.values.grad.device == state.weight.device
        assert state.values.grad.dtype == torch.promote_types(state.weight.dtype, SINGLE)
        assert state.weight.grad is None
        yield state.name, state.values.grad, gather(truth[state.name], state.rows, state.picked_cols)
        if state.profile is not None:
            yield state.name, state.profile.grad, truth[state.name]


def assert_near(model: nn.Module, truth: Gradients, theirs: Gradients) -> None:
    """No further from the truth than twice what the plain model's whole gradient is."""
    for name, found, true in pairs(model, truth):
        largest = float(truth[name].abs().max())
        assert off(found, true) <= 2 * off(theirs[name], truth[name]) + 1e-6 * largest, (name, true.shape)


@pytest.mark.parametrize(
    ("case", "compiler", "dtype", "checkpointed"),
    [
        (LLAMA, "eager", torch.float64, False),
        (LLAMA, "eager", torch.float64, True),
        (LLAMA, "aot_eager", torch.float64, False),
        (LLAMA, "aot_eager", torch.float64, True),
        (LLAMA, "inductor", torch.float32, False),
        (LLAMA, "inductor", torch.float32, True),
        (VIT, "aot_eager", torch.float64, True),
        (VIT, "inductor", torch.float64, False),
        (BERT_UNTIED, "inductor", torch.float32, False),
        (MIXTRAL, "inductor", torch.float32, False),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_exact(case: Case, compiler: str, dtype: torch.dtype, checkpointed: bool) -> None:
    model, inputs = build(case, dtype), batch(case, dtype)
    truth = plain(model, inputs)
    transformed(model, compiler=compiler)
    if checkpointed:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    gradients(model, inputs)
    for name, found, true in pairs(model, truth):
        least = 1e-6 if true.shape == truth[name].shape else 0.0  # G is float32
        assert error(found, true) <= max(EXACT[dtype], least), (name, true.shape)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize(
    ("case", "dtype", "compiler"),
    [
        *((case, dtype, "aot_eager") for case in (LLAMA, VIT, MIXTRAL) for dtype in (BF16, FP16)),
        *((case, BF16, "inductor") for case in (LLAMA, MIXTRAL)),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_narrow_weights(case: Case, dtype: torch.dtype, compiler: str) -> None:
    model, inputs = build(case, dtype), batch(case, dtype)
    exact = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    truth = plain(copy.deepcopy(model).float(), exact)
    theirs = plain(model, inputs)
    transformed(model, compiler=compiler)
    gradients(model, inputs)
    assert_near(model, truth, theirs)


@pytest.mark.parametrize(("dtype", "compiler"), [(BF16, "aot_eager"), (FP16, "aot_eager"), (BF16, "inductor")], ids=str)
def test_autocast(dtype: torch.dtype, compiler: str) -> None:
    """As close to the truth as the plain model under autocast."""

    def context() -> AbstractContextManager[Any]:
        return torch.autocast(DEVICE.type, dtype)

    model, inputs = build(LLAMA), batch(LLAMA)
    truth, theirs = plain(model, inputs), plain(model, inputs, context)
    transformed(model, compiler=compiler, schedule="static")
    gradients(model, inputs, context)
    assert_near(model, truth, theirs)


def test_an_expert_without_tokens_has_no_gradient() -> None:
    """Nor anything that a kernel has left in the memory of its gradient."""
    model, inputs = build(MIXTRAL, BF16), batch(MIXTRAL, BF16, size=1, length=2)
    truth = plain(model, inputs)
    transformed(model, compiler="aot_eager")
    gradients(model, inputs)
    idle = 0
    for state in states_of(model):
        if state.weight.dim() == 3:
            assert state.values.grad is not None
            assert state.profile is not None
            assert state.profile.grad is not None
            unused = ~truth[state.name].flatten(1).any(1)
            idle += int(unused.sum())
            assert not state.values.grad[unused].any()
            assert not state.profile.grad[unused].any()
    assert idle > 0, "nothing to look at: give fewer tokens"


def test_after_a_move_to_another_device() -> None:
    """Transformed on the CPU, trained on the GPU, and back: S, rows and cols come along."""
    model = transformed(build(LLAMA).cpu(), compiler="aot_eager")
    for device in (DEVICE, torch.device("cpu"), DEVICE):
        model.to(device)
        model.zero_grad()
        for state in states_of(model):
            assert {t.device.type for t in (state.weight, state.values, state.rows, state.cols)} == {device.type}
            assert state.handle.device.type == "cpu"
        inputs = {name: value.to(device) for name, value in batch(LLAMA).items()}
        truth = plain(losia_fx.restore(copy.deepcopy(model)), inputs)
        gradients(model, inputs)
        for state in states_of(model):
            block = gather(truth[state.name], state.rows, state.picked_cols)
            assert error(state.values.grad, block) <= EXACT[SINGLE], (state.name, device)
            if state.profile is not None:
                state.profile.grad = None


def test_under_cuda_graphs() -> None:
    """Inductor's CUDA graphs leave out what taps do on the host, so graphs with taps are not captured."""
    model, inputs = build(LLAMA), batch(LLAMA)
    truth = plain(model, inputs)
    transformed(model, compiler="inductor")
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        for _ in range(4):  # warm-up, capture, replay
            model.zero_grad()
            for state in states_of(model):
                assert state.profile is not None
                state.profile.grad = None
            gradients(model, inputs)
            assert all(error(found, true) <= EXACT[SINGLE] for _, found, true in pairs(model, truth))
