"""What both ways have in common around a step: clips by value, moves to a device, states, fake steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import losia_fx
from losia_fx import StateError
from losia_fx.runtime.state import SubnetState, states_of
from tests.runtime.test_full_gradient import fits
from tests.support.toys import Toy, batch, loss_of
from tests.truth.test_string_way import WAYS, made, sgd

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

# -- clipping by value -----------------------------------------------------------------------------------------------


def largest(state: SubnetState) -> float:
    assert state.values.grad is not None
    return float(state.values.grad.abs().max())


@pytest.mark.parametrize("way", WAYS)
def test_a_clip_by_value_is_followed_that_cut_other_subnets_alone(way: str) -> None:
    """The importance of a weight whose subnet lost nothing is of the clipped gradient too."""
    torch.manual_seed(0)
    model, call = made(way, Toy(layers=2, width=64, inner=96), importance="first", period=5)
    loss_of(call, batch(4, 12)).backward()
    states = {state.name: state for state in states_of(model)}
    (name,) = [name for name, state in states.items() if state.profile is not None and state.profile.grad is not None]
    state = states[name]
    assert state.profile is not None
    assert state.profile.grad is not None
    others = max(largest(other) for other in states.values() if other is not state)
    assert state.values.grad is not None
    state.values.grad *= 0.5 * others / largest(state)
    state.profile.grad *= 2 * others / largest(state)  # larger, but for the subnet
    state.profile.grad[state.rows[:, None], state.cols] = state.values.grad
    limit = 0.75 * others
    assert largest(state) < limit < float(state.profile.grad.abs().max())
    nn.utils.clip_grad_value_(model.parameters(), limit)
    fit = fits(model, sgd(model.parameters()))[name]
    assert fit.limit == pytest.approx(limit)
    assert fit.factor == pytest.approx(1.0)


# -- what a slot has gathered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("move", ["meta", "bfloat16", "double", "same"])
def test_what_a_slot_has_gathered_goes_where_its_weight_goes(way: str, move: str) -> None:
    model, call = made(way, Toy().float(), period=9)
    optimizer = sgd(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(call, batch()).backward()
        optimizer.step()
    optimizer.zero_grad()
    loss_of(call, batch()).backward()
    profiled = [state for state in states_of(model) if state.profile is not None]
    before = [(s.profile.importance, s.profile.uncertainty, s.profile.grad) for s in profiled]  # type: ignore
    assert profiled
    target = {"meta": "meta", "bfloat16": torch.bfloat16, "double": torch.float64, "same": "cpu"}[move]
    model.to(target)  # type: ignore[call-overload]
    for state, parts in zip(profiled, before, strict=True):
        profile = state.profile
        assert profile is not None
        for now, then in zip((profile.importance, profile.uncertainty, profile.grad), parts, strict=True):
            assert now is not None
            assert now.device == state.weight.device == state.values.device == state.rows.device
            assert now.dtype == then.dtype
            assert move == "meta" or torch.equal(now, then)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("saved", "loaded"), [(2, None), (None, 2), (1, 2)])
def test_a_state_belongs_to_what_its_slots_profile(way: str, saved: int | None, loaded: int | None) -> None:
    (one, call), (other, again) = (made(way, period=4, profile_steps=steps) for steps in (saved, loaded))
    for each in (call, again):
        loss_of(each, batch())
    before = losia_fx.state_dict(other)
    with pytest.raises(StateError, match=rf"profile_steps was {saved} and is {loaded}"):
        losia_fx.load_state_dict(other, losia_fx.state_dict(one))
    after = losia_fx.state_dict(other)
    assert all(torch.equal(value, after[key]) for key, value in before.items() if isinstance(value, torch.Tensor))
    losia_fx.load_state_dict(one, losia_fx.state_dict(one))


# -- steps that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("schedule", ["async", "static"])
def test_a_fake_step_after_the_first_forward_does_not_count(way: str, schedule: str) -> None:
    """By string the subnets are made by a forward, so that a resumed optimizer has its state made after one."""
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        model, call = made(way, schedule=schedule)
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss_of(call, batch())
        runs.append((model, call, optimizer))
    (model, call, optimizer), (resumed, again, continued) = runs
    held = {id(p) for p in model.parameters()}
    assert all(id(p) in held for group in optimizer.param_groups for p in group["params"])
    get_optimizer_state_dict(resumed, continued)
    assert losia_fx.controller(resumed).step == 0
    for each in [batch() for _ in range(3)]:
        for run, its in ((call, optimizer), (again, continued)):
            loss_of(run, each).backward()
            its.step()
            its.zero_grad()
    assert losia_fx.controller(resumed).step == losia_fx.controller(model).step == 3
    fresh, third = made(way, schedule=schedule)
    loss_of(third, batch())
    newest = optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-2)
    # By string the weights ask for gradients, and torch misses their state.
    options = StateDictOptions(strict=way == "transform")
    set_optimizer_state_dict(fresh, newest, get_optimizer_state_dict(model, optimizer), options=options)
    assert losia_fx.controller(fresh).step == 0


def test_a_real_step_at_a_rate_of_zero_counts() -> None:
    """Warm-up begins there, with gradients."""
    model, call = made("transform")
    optimizer = sgd(model.parameters(), 0.0)
    loss_of(call, batch()).backward()
    optimizer.step()
    assert losia_fx.controller(model).step == 1
