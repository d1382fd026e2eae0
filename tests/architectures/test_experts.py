"""Mixtures of experts: one subnet an expert, its gradient exact, its localization from the tokens it saw."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
import transformers.integrations.moe
from torch import Tensor, nn

import losia_fx
from losia_fx.method.subnet import gather
from losia_fx.runtime.state import states_of
from losia_fx.tools.tiny.architectures import SEED, TinyModel, build
from tests.runtime.test_trajectory import PERIOD, Run
from tests.support.forms import EXPERT_FORMS, EXPERTS, Model
from tests.support.table import TEXT, Case, tokens

ARCHITECTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe")
slow = pytest.mark.slow
ignore_outside = pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")


def in_default_run(*names: str) -> list[Any]:
    """All architectures, the others marked slow."""
    return [name if name in names else pytest.param(name, marks=slow) for name in ARCHITECTURES]


def gradients(tiny: TinyModel, model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    tiny.loss(model(**tiny.batch)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def dense_gradients(tiny: TinyModel) -> dict[str, Tensor]:
    return gradients(tiny, copy.deepcopy(tiny.model).requires_grad_(True))


def experts_of(model: nn.Module) -> dict[str, losia_fx.Subnet]:
    found = {name: subnet for name, subnet in losia_fx.subnets(model).items() if subnet.weight.dim() == 3}
    assert found
    return found


def error(actual: Tensor, truth: Tensor) -> float:
    assert truth.any(), "nothing to compare"
    return float((actual.double() - truth.double()).abs().max() / truth.double().abs().max())


def assert_layout(subnet: losia_fx.Subnet) -> None:
    count, out, into = subnet.weight.shape
    assert subnet.rows.shape == (count, out // 4)
    assert subnet.cols.shape == (count, into // 4)
    assert subnet.values.shape == (count, out // 4, into // 4)
    assert torch.equal(subnet.rows.sort().values, subnet.rows)
    assert any(not torch.equal(subnet.rows[0], rows) for rows in subnet.rows[1:])


@ignore_outside
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
@pytest.mark.parametrize("architecture", in_default_run("mixtral"))
def test_single_precision(architecture: str, compiler: str) -> None:
    tiny = build(architecture, torch.float32)
    expected = dense_gradients(tiny)
    model = losia_fx.transform(copy.deepcopy(tiny.model), rank_factor=0.25, compiler=compiler)
    gradients(tiny, model)
    for name, subnet in experts_of(model).items():
        assert_layout(subnet)
        assert subnet.values.grad is not None
        assert error(subnet.values.grad, gather(expected[name], subnet.rows, subnet.cols)) <= 1e-4, name
        assert subnet.weight.grad is None
    rows = {row.name: row for row in losia_fx.report(model).weights}
    assert all(rows[name].used == "grouped_mm" for name in experts_of(model))


@ignore_outside
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
@pytest.mark.parametrize("architecture", in_default_run("gpt_oss"))
def test_bfloat16(architecture: str, compiler: str) -> None:
    """No further from the float32 truth than twice what the plain model is."""
    tiny = build(architecture, torch.bfloat16)
    plain = dense_gradients(tiny)
    exact = TinyModel(copy.deepcopy(tiny.model).float(), _single(tiny.batch), tiny.labelled)
    truth = dense_gradients(exact)
    model = losia_fx.transform(copy.deepcopy(tiny.model), rank_factor=0.25, compiler=compiler)
    gradients(tiny, model)
    for name, subnet in experts_of(model).items():
        place = (subnet.rows, subnet.cols)
        assert subnet.values.grad is not None
        assert subnet.values.dtype == subnet.values.grad.dtype == torch.float32
        theirs = error(gather(plain[name], *place), gather(truth[name], *place))
        assert error(subnet.values.grad, gather(truth[name], *place)) <= 2 * theirs + 1e-6, name


def _single(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


USED = {"grouped_mm": {"grouped_mm"}, "batched_mm": {"bmm"}, "eager": {"linear", ""}}


@ignore_outside
@pytest.mark.filterwarnings("ignore:.*ran outside a rewritten graph")
@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [("mixtral", "grouped_mm"), ("mixtral", "batched_mm"), ("mixtral", "eager"), ("gpt_oss", "batched_mm")],
)
def test_implementations(architecture: str, implementation: str) -> None:
    """Exact in all of them, and the full gradient of the profiled group with it."""
    tiny = build(architecture, torch.float32)
    tiny.model.set_experts_implementation(implementation)  # type: ignore[operator]
    expected = dense_gradients(tiny)
    options = {"rank_factor": 0.25, "schedule": "sync", "compiler": "eager"}
    model = losia_fx.transform(copy.deepcopy(tiny.model), **options)
    gradients(tiny, model)
    states = {state.name: state for state in states_of(model)}
    for name, subnet in losia_fx.subnets(model).items():
        assert subnet.values.grad is not None
        assert error(subnet.values.grad, gather(expected[name], subnet.rows, subnet.cols)) <= 1e-4, name
        profile = states[name].profile
        assert profile is not None
        assert profile.grad is not None
        assert error(profile.grad, expected[name]) <= 1e-4, name
    used = {row.used for row in losia_fx.report(model).weights if row.name in experts_of(model)}
    assert used <= USED[implementation]


@pytest.mark.parametrize("name", ["grouped", "grouped-turned", "from-the-end"])
def test_an_expert_without_tokens_keeps_its_subnet(name: str) -> None:
    """The second expert of these forms sees none."""
    (form,) = [form for form in EXPERT_FORMS if form.name == name]
    model = Model(form).double()
    options = {"rank_factor": 0.4, "schedule": "sync", "period": 2, "compiler": "aot_eager"}
    losia_fx.transform(model, seed=3, **options)
    subnet = losia_fx.subnets(model)["layers.0.weight"]
    rows, cols, values = subnet.rows.clone(), subnet.cols.clone(), subnet.values.detach().clone()
    optimizer = torch.optim.AdamW([subnet.values], lr=0.1, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model([torch.randn(form.x, dtype=torch.float64)]).backward()
        optimizer.step()
    (event,) = losia_fx.controller(model).history
    assert 0 < event.moved < 1
    assert torch.equal(subnet.rows[1], rows[1])
    assert torch.equal(subnet.cols[1], cols[1])
    assert torch.equal(subnet.values[1], values[1])
    moved = [e for e in range(EXPERTS) if not torch.equal(subnet.rows[e], rows[e])]
    assert moved == [0, 2]
    picked = gather(subnet.weight.detach(), subnet.rows, subnet.cols)
    assert torch.equal(subnet.values, picked)


def tiny_mixtral() -> nn.Module:
    config = hf.MixtralConfig(
        **TEXT, num_key_value_heads=2, num_local_experts=4, tie_word_embeddings=False, use_cache=False
    )
    return hf.MixtralForCausalLM(config)


MIXTRAL = Case("mixtral", tiny_mixtral, tokens, 15)


def test_two_rounds_as_the_reference() -> None:
    run = Run(MIXTRAL, compiler="eager")  # grouped products take no float64
    assert {subnet.weight.dim() for subnet in run.subnets.values()} == {2, 3}
    rounds = 2 * len(losia_fx.controller(run.model).groups) * PERIOD
    for _ in range(rounds):
        run.step()
    assert len(losia_fx.controller(run.model).history) == len(run.reference.reselections) == rounds // PERIOD
