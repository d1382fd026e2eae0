"""What loops do around a step: loss scaling, skipped steps, clipping, accumulation, averages, checkpointing."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn, optim
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import losia_fx
from tests.support.pair import PERIOD, Pair
from tests.support.toy_runs import adamw, batches, learning, toy, train
from tests.support.toys import Toy, batch, loss_of, tiny_llama

CLIP = {"none": {}, "norm": {"clip_norm": 0.3}, "value": {"clip_value": 3e-3}}
MAKE: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda parameters: optim.AdamW(parameters, lr=5e-3, eps=1e-6),
    "adamw fused": lambda parameters: optim.AdamW(parameters, lr=5e-3, eps=1e-6, fused=True),
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
    "sgd fused": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adagrad fused": lambda parameters: optim.Adagrad(parameters, lr=0.05, fused=True),
}


def clip(model: nn.Module, clip_norm: float | None = None, clip_value: float | None = None) -> None:
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    if clip_value is not None:
        nn.utils.clip_grad_value_(model.parameters(), clip_value)


SLOW = pytest.mark.slow  # many such variants only add up
SCALED = [("adamw", "norm"), ("adamw fused", "value"), ("sgd fused", "none")]
MORE = [*itertools.product(("adamw", "adamw fused"), CLIP), ("sgd", "norm"), ("adagrad fused", "none")]


@pytest.mark.parametrize(
    ("name", "clipped"), [*SCALED, *(pytest.param(*c, marks=SLOW) for c in MORE if c not in SCALED)]
)
def test_grad_scaler_with_skipped_steps_and_accumulation(name: str, clipped: str) -> None:
    """Two micro-batches a step; every fourth step overflows and is skipped, whoever notices it."""
    pair = Pair(MAKE[name], tolerance=1e-6)
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    scales, skipped = set(), 0
    for number in range(3 * 2 * PERIOD):
        overflows = number % 4 == 1
        before = {key: value.clone() for key, value in pair.inner.state_dict().items()}
        for part in range(2):
            mine, expected = pair.losses(batch())
            scaler.scale(mine / 2 * (float("inf") if overflows and part else 1.0)).backward()
            (expected / 2).backward()
        if clipped != "none":
            scaler.unscale_(pair.optimizer)
            clip(pair.model, **CLIP[clipped])
        if overflows:
            scaler.step(pair.optimizer)
            pair.model.zero_grad()
            pair.reference.model.zero_grad()
            pair.assert_same()
            assert all(torch.equal(value, before[key]) for key, value in pair.inner.state_dict().items())
            skipped += 1
        else:
            pair.finish(lambda: scaler.step(pair.optimizer), **CLIP[clipped])
        scaler.update()
        scales.add(scaler.get_scale())
    assert skipped > 2
    assert len(scales) > 1
    assert any(event.moved > 0 for event in pair.controller.history)


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=SLOW)])
def test_autocast_with_a_scaler_keeps_near_the_reference(fused: bool) -> None:
    """bfloat16 autocast: not to the bit, but on the same way; nothing is left out."""
    torch.manual_seed(0)
    model = losia_fx.transform(Toy(layers=1), compiler="eager", rank_factor=0.25, period=PERIOD)
    optimizer = optim.AdamW(learning(model), lr=5e-3, fused=fused)
    scaler, losses = GradScaler("cpu", init_scale=2.0**10), []
    ids = batch(4)
    for _ in range(4 * PERIOD):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, ids)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert losia_fx.controller(model).left_out == 0
    assert losia_fx.controller(model).step == 4 * PERIOD


@pytest.mark.parametrize(
    ("bad", "where"),
    [(float("nan"), "everywhere"), (float("inf"), "outside"), pytest.param(float("inf"), "everywhere", marks=SLOW)],
)
def test_a_gradient_that_is_not_finite_does_not_poison_the_importance(bad: float, where: str) -> None:
    """That step is left out and counted, the others count; the user's loop drops or masks such gradients."""
    model = toy()
    optimizer = optim.SGD(learning(model), lr=0.0)
    state = next(s for s in losia_fx.controller(model).states if s.name == "head.weight")
    twin = toy()
    twin_optimizer = optim.SGD(learning(twin), lr=0.0)
    twin_state = next(s for s in losia_fx.controller(twin).states if s.name == "head.weight")
    for number, ids in enumerate(batches(3)):
        loss = loss_of(model, ids)
        (loss * bad if number == 1 and where == "everywhere" else loss).backward()
        if number == 1 and where != "everywhere":
            assert state.profile is not None
            assert state.profile.grad is not None
            outside = next(row for row in range(40) if row not in state.rows.tolist())
            state.profile.grad[outside, 3] = bad
        if number != 1:
            loss_of(twin, ids).backward()
            twin_optimizer.step()
            twin_optimizer.zero_grad()
        elif where == "everywhere":
            for parameter in learning(model):
                assert parameter.grad is not None
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losia_fx.controller(model).left_out == 1
    assert (losia_fx.controller(model).step, losia_fx.controller(twin).step) == (3, 2)
    for one, other in ((state.profile, twin_state.profile),):
        assert one is not None
        assert other is not None
        assert torch.equal(one.importance, other.importance)
        assert torch.equal(one.uncertainty, other.uncertainty)


@pytest.mark.parametrize("how", ["swa", "ema with buffers", pytest.param("ema", marks=SLOW)])
def test_averages_of_the_weights(how: str) -> None:
    """The average is that of the dense weights over the steps, saves under ordinary names, and disturbs nothing."""
    model, alone = toy(), toy()
    optimizer, other = adamw(learning(model)), adamw(learning(alone))
    ema = None if how == "swa" else get_ema_multi_avg_fn(0.9)
    averaged = AveragedModel(model, multi_avg_fn=ema, use_buffers=how == "ema with buffers")
    expected: dict[str, torch.Tensor] = {}
    for number, ids in enumerate(batches(10)):
        train(model, optimizer, [ids])
        train(alone, other, [ids])
        averaged.update_parameters(model)
        for name, value in model.state_dict().items():
            weight = 1 / (number + 1) if how == "swa" else 0.1 if number else 1.0
            expected[name] = value.clone() if not number else torch.lerp(expected[name], value, weight)
    for (name, one), two in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert averaged.module.state_dict().keys() == expected.keys()
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    plain = Toy()
    plain.load_state_dict(averaged.module.state_dict())
    ids = batch()
    with torch.no_grad():
        torch.testing.assert_close(averaged(ids), plain(ids))
    # and back into the model that trains, as people end a run
    model.load_state_dict(averaged.module.state_dict())
    for name, subnet in losia_fx.subnets(model).items():
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols]), name
    train(model, optimizer, batches(2))


class Checkpointed(Toy):
    """Each block recomputed, the reentrant way or not."""

    reentrant = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.reentrant:
            x.requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return self.head(self.norm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=SLOW)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:losia_fx.*ran outside")
def test_gradient_checkpointing(reentrant: bool, compiler: str) -> None:
    model = Checkpointed(layers=1).double()
    model.reentrant = reentrant
    Pair(MAKE["adamw"], model, compiler=compiler).rounds()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:losia_fx.*ran outside")
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    model = tiny_llama(layers=1).double()
    model.config.use_cache = False
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    pair = Pair(MAKE["adamw"], model, tolerance=1e-6)
    pair.reference.model.load_state_dict(plain.state_dict())
    model.train()
    pair.rounds(1)


@pytest.mark.parametrize("name", ["sgd fused", "adamw fused"])
def test_a_first_step_that_is_skipped_is_not_taken_for_a_resumed_optimizer(name: str) -> None:
    """A fused optimizer makes its state in a step that found_inf then takes back."""
    model = toy()
    optimizer, scaler = MAKE[name](learning(model)), GradScaler("cpu", init_scale=2.0**10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", losia_fx.LosiaWarning)
        for factor in (float("inf"), 1.0):
            scaler.scale(loss_of(model, batch()) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert losia_fx.controller(model).step == 1


@pytest.mark.parametrize("name", ["sgd fused", "adamw fused"])
def test_a_step_that_is_skipped_leaves_nothing_behind(name: str) -> None:
    """No copy of S, which would be kept until the next step, and no fit of a gradient that was not finite."""
    model = toy()
    optimizer, scaler = MAKE[name](learning(model)), GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, batch()) * float("inf")).backward()
    scaler.step(optimizer)
    pending = losia_fx.controller(model).train.pending
    assert not pending.before
    assert not pending.fits
