"""On a GPU: every subnet's gradient against plain autograd there, in all dtypes, compiled and checkpointed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx.state import states_of
from losia_fx.subnet import gather
from tests.gpu.device import DEVICE, batch, build
from tests.models.table import BERT_UNTIED, LLAMA, VIT, Case
from tests.models.test_experts import MIXTRAL

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


def error(actual: Tensor | None, truth: Tensor) -> float:
    assert actual is not None
    largest = truth.double().abs().max()
    assert largest > 0, "nothing to compare"
    return float((actual.double() - truth.double()).abs().max() / largest)


def transformed(model: nn.Module, **options: Any) -> nn.Module:
    """All groups are profiled, so that the full gradients can be looked at too."""
    return losia_fx.transform(model, **{"rank_factor": 0.25, "schedule": "sync", **options})


def errors(model: nn.Module, truth: Gradients) -> dict[str, float]:
    """Of every subnet's gradient, and of every full one."""
    found = {}
    for state in states_of(model):
        place = (state.rows, state.picked_cols)
        assert state.values.grad is not None, state.name
        assert state.values.grad.device == state.weight.device
        assert state.values.grad.dtype == torch.promote_types(state.weight.dtype, SINGLE)
        assert state.weight.grad is None
        assert state.profile is not None
        found[state.name] = error(state.values.grad, gather(truth[state.name], *place))
        found[f"G of {state.name}"] = error(state.profile.grad, truth[state.name])
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("case", "compiler", "dtype"),
    [
        (LLAMA, "eager", torch.float64),
        (LLAMA, "aot_eager", torch.float64),
        (LLAMA, "inductor", torch.float32),
        (VIT, "aot_eager", torch.float64),
        (VIT, "inductor", torch.float64),
        (BERT_UNTIED, "inductor", torch.float32),
        (MIXTRAL, "inductor", torch.float32),
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
    allowed = {True: 1e-6, False: EXACT[dtype]}  # G is float32
    assert {
        name: e for name, e in errors(model, truth).items() if e > max(EXACT[dtype], allowed[name[:2] == "G "])
    } == {}
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", [LLAMA, VIT, MIXTRAL], ids=lambda case: case.name)
def test_narrow_weights(case: Case, dtype: torch.dtype, compiler: str) -> None:
    """No further from the float32 truth than twice what the plain model is."""
    model, inputs = build(case, dtype), batch(case, dtype)
    exact = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    truth = plain(copy.deepcopy(model).float(), exact)
    theirs = plain(model, inputs)
    transformed(model, compiler=compiler)
    gradients(model, inputs)
    places = {state.name: (state.rows, state.picked_cols) for state in states_of(model)}
    for name, mine in errors(model, truth).items():
        weight = name.removeprefix("G of ")
        pair = [grads[weight] for grads in (theirs, truth)]
        if name == weight:
            pair = [gather(grad, *places[weight]) for grad in pair]
        assert mine <= 2 * error(*pair) + 1e-6, name


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast(dtype: torch.dtype, compiler: str) -> None:
    """As close to the truth as the plain model under autocast."""

    def context() -> AbstractContextManager[Any]:
        return torch.autocast(DEVICE.type, dtype)

    model, inputs = build(LLAMA), batch(LLAMA)
    truth, theirs = plain(model, inputs), plain(model, inputs, context)
    transformed(model, compiler=compiler, schedule="static")
    gradients(model, inputs, context)
    for state in states_of(model):
        place = (state.rows, state.picked_cols)
        pair = [gather(grads[state.name], *place) for grads in (theirs, truth)]
        assert error(state.values.grad, pair[1]) <= 2 * error(*pair) + 1e-6, state.name


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
            assert max(errors(model, truth).values()) <= EXACT[SINGLE]
