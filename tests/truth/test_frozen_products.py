"""Frozen products in 8 bits against the model's own: as close as is said, without a bias, and in all ways to train.

Where losia_fx alone decides (checkpoints, accumulation, deltas, ranks), to the bit or as its other runs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import losia_fx
from losia_fx._compat import install_call
from losia_fx.api.transform import CompiledCall
from losia_fx.compile.backend import LosiaBackend
from losia_fx.ops.library import VERSION
from losia_fx.passes import Observer
from losia_fx.runtime import expected
from tests.support import table
from tests.support.eight_bits import KINDS, needs_float8, trained_by_two
from tests.support.toy_runs import adamw, assert_same, batches, learning, toy, train
from tests.support.toys import Toy, loss_of

WIDTH, TOKENS = 64, (4, 32)
OPTIONS: dict[str, Any] = {"rank_factor": 0.25, "output_rank_factor": 0.0, "compiler": "eager", "schedule": "static"}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which 8-bit products are fast, so that nothing is said of it."""
    monkeypatch.setattr(expected, "share_of_dense", lambda *_: 0.5)


def llama(layers: int, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": layers, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    return LlamaForCausalLM(config).to(dtype).train()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(256, TOKENS, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def gradients(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, dL/dx at the embeddings' output, as "", and dL/dS by weight."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=ids).loss
    loss.backward()
    assert embedded.grad is not None
    found = {"": embedded.grad}
    for name, subnet in losia_fx.subnets(model).items():
        assert subnet.values.grad is not None
        found[name], subnet.values.grad = subnet.values.grad, None
    return loss.detach(), found


@pytest.mark.parametrize(
    ("kind", "compiler", "dtype", "layers"),
    [
        ("int8", "eager", torch.float32, 4),
        ("int8", "aot_eager", torch.bfloat16, 2),
        pytest.param("float8", "aot_eager", torch.float32, 2, marks=needs_float8),
        pytest.param("int8", "inductor", torch.bfloat16, 1, marks=pytest.mark.slow),
        pytest.param("float8", "inductor", torch.bfloat16, 1, marks=[pytest.mark.slow, needs_float8]),
    ],
)
def test_a_step_is_near_the_dense_one(kind: str, compiler: str, dtype: torch.dtype, layers: int) -> None:
    """The loss within 1e-3; dL/dx at the embeddings and each dL/dS within 8% with int8. e4m3 has half of its bits."""
    options = {**OPTIONS, "compiler": compiler}
    plain = gradients(losia_fx.transform(llama(layers, dtype), **options), tokens())
    mine = gradients(losia_fx.transform(llama(layers, dtype), **options, frozen_products=kind), tokens())
    assert abs(float(mine[0] - plain[0])) <= 1e-3 * float(plain[0])
    assert len(mine[1]) == 1 + 7 * layers
    for name, exact in plain[1].items():
        assert 0 < error(mine[1][name], exact) <= (0.08 if kind == "int8" else 0.2), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_has_no_bias(kind: str) -> None:
    """Over many steps the mean of the error goes down as that of independent ones does: to 1/sqrt(n) of each."""
    steps = 100
    plain, mine = (losia_fx.transform(llama(1), **OPTIONS, frozen_products=each) for each in (None, kind))
    sums: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    losses = 0.0
    for step in range(steps):
        (exact_loss, exact), (loss, found) = (gradients(model, tokens(step)) for model in (plain, mine))
        losses += float(loss - exact_loss) / steps
        for name, gradient in exact.items():
            off = (found[name] - gradient).double()
            sums[name] = sums.get(name, torch.zeros_like(off)) + off / steps
            sizes[name] = sizes.get(name, 0.0) + float(off.norm()) / steps
    assert abs(losses) <= (2e-4 if kind == "int8" else 1e-3)
    for name, mean in sums.items():
        assert float(mean.norm()) <= 2 * sizes[name] / steps**0.5, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_goes_down_as_it_does_densely(kind: str) -> None:
    """Four slots of a model that learns one text by heart."""
    ends = []
    for products in (None, kind):
        model = losia_fx.transform(llama(1), **{**OPTIONS, "schedule": "async", "period": 5}, frozen_products=products)
        optimizer = torch.optim.AdamW(learning(model), lr=2e-2)
        losses = []
        for _ in range(20):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends.append(losses[0] - losses[-1])
    assert ends[0] > 0.3
    assert abs(ends[1] - ends[0]) <= 0.05 * ends[0]


class Seen:
    """Counts the products of 8-bit numbers and the quantisations in a step's graphs, forward and backward."""

    def __init__(self) -> None:
        self.forward, self.joint = "", ""

    def __call__(self, gm: Any, inputs: Any, plan: Any) -> Observer:
        def observe(stage: str, after: Any) -> None:
            if stage == "frozen-products":
                self.forward = str(after.graph)
            elif stage == "sink-gathers":
                self.joint = str(after.graph)

        return observe


def test_a_layers_inputs_are_quantised_once_for_q_k_v_and_once_for_gate_and_up() -> None:
    config = losia_fx.LosiaConfig(**{**OPTIONS, "compiler": "aot_eager"}, frozen_products="int8")
    model, seen = losia_fx.transform(llama(2), config), Seen()
    install_call(model, CompiledCall(model, config, LosiaBackend(config, watch=seen)))
    gradients(model, tokens())
    assert seen.forward.count(f"losia.quantised.{VERSION}](") == 2 * 4
    assert seen.joint.count("aten._int_mm.default](") == 2 * 2 * 7
    # q, k and v; o; gate and up; down: and of grad_y one a weight, each with its own scales
    assert seen.joint.count("aten.amax.default](") == 2 * (4 + 7)


# -- all ways to train ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_gradient_checkpointing_computes_the_same(compiler: str) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = losia_fx.transform(
            Toy(checkpointed=checkpointed), **{**OPTIONS, "compiler": compiler}, frozen_products="int8"
        )
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        found.append([loss, *(subnet.values.grad for subnet in losia_fx.subnets(model).values())])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_micro_batches_add_up() -> None:
    model = toy(frozen_products="int8")
    ids, subnets = batches(2), losia_fx.subnets(model)
    apart: dict[str, list[Tensor]] = {}
    for each in ids:
        loss_of(model, each).backward()
        for name, subnet in subnets.items():
            assert subnet.values.grad is not None
            apart.setdefault(name, []).append(subnet.values.grad)
        model.zero_grad()
    for each in ids:
        loss_of(model, each).backward()
    for name, subnet in subnets.items():
        assert subnet.values.grad is not None
        torch.testing.assert_close(subnet.values.grad, sum(apart[name]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [2, 4, 9])
def test_a_run_goes_on_to_the_bit(kind: str, cut: int) -> None:
    """In a slot, at its edge, and after re-selections: into a model that has packed other weights before."""
    options = {"frozen_products": kind, "period": 4}
    steps, whole = batches(14), toy(torch.bfloat16, **options)
    optimizer = adamw(learning(whole))
    train(whole, optimizer, steps[:cut])
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), losia_fx.state_dict(whole)))
    train(whole, optimizer, steps[cut:])

    resumed = toy(torch.bfloat16, seed=2, **options)
    train(resumed, adamw(learning(resumed)), steps[:3])
    continued = adamw(learning(resumed))
    resumed.load_state_dict(saved[0])
    continued.load_state_dict(saved[1])
    losia_fx.load_state_dict(resumed, saved[2])
    train(resumed, continued, steps[cut:])
    assert_same(whole, resumed)
    assert losia_fx.controller(resumed).history


def test_a_delta_holds_what_was_trained(tmp_path: Path) -> None:
    model = toy(frozen_products="int8", track_delta=True)
    base = losia_fx.restore(copy.deepcopy(model))
    train(model, adamw(learning(model)), batches(9))
    losia_fx.save_delta(model, tmp_path / "tuned.safetensors")
    tuned = losia_fx.restore(model)
    losia_fx.load_delta(base, tmp_path / "tuned.safetensors")
    for (name, one), (_, other) in zip(base.named_parameters(), tuned.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_importance_is_measured_of_the_same_gradients() -> None:
    """G is x^T grad_y as without: near the dense one's, and its block is S.grad."""
    model = toy(frozen_products="int8", schedule="sync")
    loss_of(model, batches(1)[0]).backward()
    for state in losia_fx.controller(model).states:
        assert state.profile is not None
        assert state.profile.grad is not None
        torch.testing.assert_close(state.block_of(state.profile.grad).float(), state.values.grad)


@pytest.mark.parametrize(
    "case",
    [table.VIT, *(pytest.param(case, marks=pytest.mark.slow) for case in (table.GPT_NEOX, table.BERT))],
    ids=lambda case: case.name,
)
def test_other_architectures(case: table.Case) -> None:
    """Those with biases, with fused projections, with attention of torch's own."""
    losses = []
    for kind in (None, "int8"):
        model = table.build(case)
        losia_fx.transform(model, rank_factor=0.25, compiler="aot_eager", frozen_products=kind)
        loss = model(**table.batch(case)).loss
        loss.backward()
        losses.append(loss.item())
        assert all(subnet.values.grad is not None for subnet in losia_fx.subnets(model).values())
    assert losses[0] != losses[1]
    assert abs(losses[1] - losses[0]) <= 0.02 * losses[0]


TWO = """
from tests.support.toy_runs import toy
model = toy(seed=1 + rank, frozen_products="int8")
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DistributedDataParallel: the ranks agree to the bit, and nearly with one process on the joined batch."""
    first, second = trained_by_two(TWO, tmp_path)
    one = toy(frozen_products="int8")
    optimizer = adamw(learning(one))
    train(one, optimizer, batches(9), clip=None)
    for name, value in one.state_dict().items():
        assert torch.equal(first[0][name], second[0][name]), name
        assert torch.allclose(first[0][name], value, rtol=0.01, atol=2e-3), name
    assert len(first[1]["history"]) == len(losia_fx.controller(one).history) == 2
