"""G: as wide as the product that made it, a sum in float32, nobody else's memory; and its fit to S.grad."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import losia_fx
from losia_fx.runtime.measure import fit_gradients
from losia_fx.runtime.state import SubnetState, states_of
from tests.support.toys import Toy, batch, loss_of

OPTIONS: dict[str, Any] = {"compiler": "aot_eager", "rank_factor": 0.25, "output_rank_factor": 0.25}


def profiled(model: nn.Module) -> dict[str, SubnetState]:
    found = {state.name: state for state in states_of(model) if state.profile is not None}
    assert found
    return found


def full(state: SubnetState) -> Tensor:
    assert state.profile is not None
    assert state.profile.grad is not None
    return state.profile.grad


def block_slot(model: nn.Module) -> torch.optim.Optimizer:
    """Brings a toy with period=1 to the slot of its first block; weights stay as they are."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    loss_of(model, batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert losia_fx.controller(model).active == 1
    return optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_product_keeps_its_width_and_a_sum_is_float32(dtype: torch.dtype) -> None:
    model = losia_fx.transform(Toy(layers=1).to(dtype), period=1, **OPTIONS)
    block_slot(model)
    ids = [batch(4), batch(4)]
    apart: list[dict[str, Tensor]] = []
    for each in ids:
        loss_of(model, each).backward()
        apart.append({name: full(state).clone() for name, state in profiled(model).items()})
        assert {grad.dtype for grad in apart[-1].values()} == {dtype}
        assert all(state.values.grad is not None and state.values.grad.any() for state in profiled(model).values())
        model.zero_grad()
    for each in ids:
        loss_of(model, each).backward()
    for name, state in profiled(model).items():
        assert full(state).dtype == torch.float32
        assert torch.equal(full(state), apart[0][name].float() + apart[1][name].float()), name


def test_of_a_float64_model_it_is_float32() -> None:
    model = losia_fx.transform(Toy(layers=1).double(), period=1, **OPTIONS)
    block_slot(model)
    plain, ids = copy.deepcopy(model), batch(4)
    plain = losia_fx.restore(plain).requires_grad_(True)
    loss_of(model, ids).backward()
    loss_of(plain, ids).backward()
    for name, state in profiled(model).items():
        expected = plain.get_parameter(name).grad
        assert expected is not None
        assert full(state).dtype == torch.float32
        torch.testing.assert_close(full(state).double(), expected, rtol=1e-6, atol=1e-9)


class Turned(nn.Module):
    """A weight stored (in, out), and one used as its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"conv": Conv1D(12, 8), "up": nn.Linear(10, 12)})])

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.layers
        return layer["conv"](x) @ layer["up"].weight


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_of_a_transposed_weight_it_is_contiguous(compiler: str) -> None:
    model, x = Turned(), torch.randn(3, 5, 8)
    plain = copy.deepcopy(model)
    plain(x).pow(2).sum().backward()
    losia_fx.transform(model, target="*", **{**OPTIONS, "compiler": compiler})
    model(x).pow(2).sum().backward()
    found = profiled(model)
    assert set(found) == {"layers.0.conv.weight", "layers.0.up.weight"}
    for name, state in found.items():
        expected = plain.get_parameter(name).grad
        assert expected is not None
        assert full(state).shape == state.weight.shape
        assert full(state).is_contiguous()
        torch.testing.assert_close(full(state), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["localize_whole", "take_gradient"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_tensor_that_others_own_is_not_kept(way: str, transposed: bool) -> None:
    model = losia_fx.transform(Toy(layers=1), **OPTIONS)
    ((_, state),) = profiled(model).items()  # the head
    rows, cols = state.weight.shape
    theirs = torch.randn(cols, rows).mT if transposed else torch.randn(rows, cols)
    if way == "take_gradient":
        state.take_gradient(theirs)
    else:
        torch.ops.losia.localize_whole(theirs, state.handle, 0)
    expected = theirs.clone()
    assert torch.equal(full(state), expected)
    theirs.zero_()
    assert torch.equal(full(state), expected)
    full(state).add_(1.0)
    assert not theirs.any()


def test_a_product_of_our_own_is_kept_as_it_is() -> None:
    model = losia_fx.transform(Toy(layers=1), **OPTIONS)
    ((_, state),) = profiled(model).items()
    mine = torch.randn(state.weight.shape)
    state.begin_use()
    state.accumulate(mine, None, owned=True)
    assert full(state) is mine


# -- the fit of all of them at once --------------------------------------------------------------------------------


def after_a_backward(scale: float = 0.5) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, SubnetState]]:
    """A toy in the slot of its block, whose gradients the loop has scaled."""
    model = losia_fx.transform(Toy(layers=1), period=1, **{**OPTIONS, "compiler": "eager"})
    optimizer = block_slot(model)
    loss_of(model, batch(4)).backward()
    states = profiled(model)
    assert len(states) == 3
    for state in states.values():
        assert state.values.grad is not None
        state.values.grad.mul_(scale)
    return model, optimizer, states


def fits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found = fit_gradients(losia_fx.controller(model).states, list(profiled(model).values()), [optimizer])
    return {state.name: fit for state, fit in found.items()}


def zeroed(state: SubnetState) -> None:
    """Its gradient is zero within the subnet, and G is there."""
    assert state.values.grad is not None
    state.values.grad.zero_()
    full(state)[state.rows[:, None], state.cols] = 0.0


def test_each_has_the_factor_of_the_loop() -> None:
    model, optimizer, states = after_a_backward()
    found = fits(model, optimizer)
    assert set(found) == set(states)
    for fit in found.values():
        assert fit.factor == pytest.approx(0.5, rel=1e-4)
        assert fit.limit is None


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("zero", [False, True])
def test_what_is_not_finite_outside_of_the_subnet_is_left_out(bad: float, zero: bool, caplog: Any) -> None:
    """Even where the gradient of the subnet is zero, and its neighbours have a factor to offer."""
    model, optimizer, states = after_a_backward()
    name, state = next(iter(states.items()))
    if zero:
        zeroed(state)
    row = next(row for row in range(state.weight.shape[0]) if row not in state.rows.tolist())
    col = next(col for col in range(state.weight.shape[1]) if col not in state.cols.tolist())
    full(state)[row, col] = bad
    found = fits(model, optimizer)
    assert found[name] is None
    assert all(fit.factor == pytest.approx(0.5, rel=1e-4) for other, fit in found.items() if other != name)
    controller = losia_fx.controller(model)
    with caplog.at_level(logging.WARNING, "losia_fx"):
        optimizer.step()
    assert controller.left_out == 1
    assert name in caplog.text
    assert controller.history[-1].group == 1


def test_a_zero_gradient_takes_its_neighbours_factor() -> None:
    model, optimizer, states = after_a_backward()
    name, state = next(iter(states.items()))
    zeroed(state)
    assert fits(model, optimizer)[name].factor == pytest.approx(0.5, rel=1e-4)
    optimizer.step()
    assert losia_fx.controller(model).left_out == 0


@pytest.mark.filterwarnings("ignore:losia_fx.*keeps its subnets")
def test_where_all_are_zero_nothing_is_known() -> None:
    model, optimizer, states = after_a_backward()
    for state in states.values():
        zeroed(state)
    assert fits(model, optimizer) == dict.fromkeys(states)
    optimizer.step()
    assert losia_fx.controller(model).left_out == len(states)


def test_a_clip_by_value_is_found() -> None:
    model, optimizer, states = after_a_backward()
    sizes = torch.cat([state.values.grad.abs().flatten() for state in states.values() if state.values.grad is not None])
    limit = float(sizes.quantile(0.9))
    nn.utils.clip_grad_value_(model.parameters(), limit)
    found = fits(model, optimizer)
    clipped = [
        name
        for name, state in states.items()
        if state.values.grad is not None and int((state.values.grad.abs() == limit).sum()) > 0
    ]
    assert clipped
    for name, fit in found.items():
        assert fit.factor == pytest.approx(0.5, rel=1e-4), name
        assert (fit.limit is not None) == (name in clipped), name
        assert fit.limit is None or fit.limit == pytest.approx(limit)


def test_what_is_clipped_throughout_takes_its_neighbours_factor() -> None:
    """The subnet alone does not tell how far beyond the limit its gradient was."""
    model, optimizer, states = after_a_backward()
    name, state = next(iter(states.items()))
    assert state.values.grad is not None
    limit = 0.5 * float(state.values.grad.abs().min())
    state.values.grad.clamp_(-limit, limit)
    found = fits(model, optimizer)
    assert found[name].factor == pytest.approx(0.5, rel=1e-4)
    assert found[name].limit == pytest.approx(limit)
    assert all(fit.limit is None for other, fit in found.items() if other != name)


def test_without_gradients_there_is_nothing_to_fit() -> None:
    model, optimizer, _ = after_a_backward()
    model.zero_grad()
    assert fits(model, optimizer) == {}
