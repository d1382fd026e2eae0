"""Steps in all the forms that torch.optim knows, and selection by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from tests.support.toys import Toy, batch, loss_of, plain_gradients
from tests.support.twin import warned

OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "period": 2}


def twins(**options: Any) -> tuple[Toy, Toy]:
    first, second = Toy(layers=1), Toy(layers=1)
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        losia_fx.transform(model, **{**OPTIONS, **options})
    return first, second


def assert_same_path(first: nn.Module, second: nn.Module) -> None:
    one, two = losia_fx.controller(first), losia_fx.controller(second)
    assert one.step == two.step
    assert one.left_out == two.left_out == 0
    assert [(e.step, e.group, e.moved) for e in one.history] == [(e.step, e.group, e.moved) for e in two.history]
    assert any(event.moved > 0 for event in one.history)
    for name, subnet in losia_fx.subnets(first).items():
        other = losia_fx.subnets(second)[name]
        assert torch.equal(subnet.rows, other.rows), name
        assert torch.equal(subnet.cols, other.cols), name
        torch.testing.assert_close(subnet.weight, other.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_step_with_a_closure_goes_the_same_way(keyword: bool) -> None:
    first, second = twins()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (first, second)]
    for _ in range(8):
        ids = batch()
        optimizers[0].zero_grad()
        loss_of(first, ids).backward()
        optimizers[0].step()

        def closure(ids: Tensor = ids) -> float:
            optimizers[1].zero_grad()
            loss = loss_of(second, ids)
            loss.backward()
            return loss.item()

        if keyword:
            optimizers[1].step(closure=closure)
        else:
            optimizers[1].step(closure)
    assert losia_fx.controller(first).step == 8
    assert_same_path(first, second)


def test_two_optimizers_are_one_step_when_both_have_stepped() -> None:
    first, second = twins()
    whole = torch.optim.AdamW(first.parameters(), lr=0.01)
    values = [subnet.values for subnet in losia_fx.subnets(second).values()]
    halves = [torch.optim.AdamW(values[:2], lr=0.01), torch.optim.AdamW(values[2:], lr=0.01)]
    for index in range(8):
        ids = batch()
        whole.zero_grad()
        loss_of(first, ids).backward()
        whole.step()
        second.zero_grad()
        loss_of(second, ids).backward()
        for half in halves if index % 2 else reversed(halves):
            assert losia_fx.controller(second).step == index
            half.step()
        assert losia_fx.controller(second).step == index + 1
    assert_same_path(first, second)


@pytest.mark.parametrize("change", ["zeros", "accumulate", "norm", "value", "all"])
def test_what_training_loops_do_to_gradients_does_not_move_the_choice(change: str) -> None:
    """The subnets depend on the gradient as the optimizer sees it, so one made in another way selects alike."""
    first, second = twins()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (first, second)]
    for _ in range(6):
        ids = batch(4)
        for model, optimizer in zip((first, second), optimizers, strict=True):
            varied = model is second
            optimizer.zero_grad(set_to_none=not (varied and change in ("zeros", "all")))
            if varied and change in ("accumulate", "all"):
                for part in ids.split(2):
                    (loss_of(model, part) / 2).backward()
            else:
                loss_of(model, ids).backward()
            if varied and change == "all":
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(7.0).div_(7.0)
            if change in ("norm", "all"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if change == "value":
                torch.nn.utils.clip_grad_value_(model.parameters(), 1e-2)
            optimizer.step()
    assert_same_path(first, second)


def test_a_gradient_that_somebody_changed_is_left_out_and_counted() -> None:
    model, _ = twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_of(model, batch()).backward()
    subnet = losia_fx.subnets(model)["head.weight"]
    assert subnet.values.grad is not None
    subnet.values.grad.add_(torch.randn_like(subnet.values))
    optimizer.step()
    controller = losia_fx.controller(model)
    assert (controller.step, controller.left_out) == (1, 1)
    assert "left out" in str(losia_fx.report(model))


def test_a_gradient_that_is_not_finite_is_left_out_and_counted() -> None:
    model, _ = twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (loss_of(model, batch()) * float("inf")).backward()
    optimizer.step()
    state = next(s for s in losia_fx.controller(model).states if s.name == "head.weight")
    assert losia_fx.controller(model).left_out == 1
    assert state.profile is not None
    assert state.profile.importance is None


def test_the_importance_of_one_step() -> None:
    """(1 - b) * ipt and (1 - b) * |ipt - I|, both from zero, with W as it was before the step."""
    model, _ = twins(period=5)
    ids = batch()
    plain = Toy(layers=1)
    plain.load_state_dict(model.state_dict())
    grad = plain_gradients(plain, ids)["head.weight"]
    weight = model.head.weight.detach().clone()
    loss_of(model, ids).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert not torch.equal(weight, model.head.weight)
    ipt = (weight * grad - (weight * grad).square() / 2).abs()
    profile = next(s.profile for s in losia_fx.controller(model).states if s.name == "head.weight")
    assert profile is not None
    assert profile.importance is not None
    torch.testing.assert_close(profile.importance, 0.15 * ipt, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(profile.uncertainty, 0.15 * (ipt - 0.15 * ipt).abs(), rtol=1e-4, atol=1e-9)
    assert profile.grad is None


def test_selection_by_hand() -> None:
    model, _ = twins(period=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
    controller = losia_fx.controller(model)
    assert controller.active == 0
    assert controller.groups[0] == ["head.weight"]
    subnet = losia_fx.subnets(model)["head.weight"]
    assert subnet.values in optimizer.state
    dense = subnet.weight.detach().clone()
    event = controller.select(0)
    assert controller.history == [event]
    assert (event.step, event.group) == (3, 0)
    assert event.captured is not None
    assert 0 < event.captured <= 1
    assert torch.equal(subnet.weight, dense)
    assert torch.equal(subnet.values, dense[subnet.rows])
    assert subnet.values not in optimizer.state or not optimizer.state[subnet.values]
    before = subnet.weight.detach().clone()
    optimizer.zero_grad()
    loss_of(model, batch()).backward()
    optimizer.step()  # the first update of ten after a re-selection: Adam's step is lr, a tenth of it counts
    moved = (subnet.weight - before)[subnet.rows]
    decay = before[subnet.rows] * 0.05 * 0.01
    torch.testing.assert_close((moved + decay / 10).abs().max(), torch.tensor(0.005), rtol=1e-3, atol=0)
    assert float(optimizer.state[subnet.values]["step"]) == 1


@pytest.mark.parametrize(("schedule", "active"), [("async", 0), ("sync", None), ("static", None)])
def test_active(schedule: str, active: int | None) -> None:
    model, _ = twins(schedule=schedule)
    assert losia_fx.controller(model).active == active


def test_random_profiles_nothing_and_moves_in_turn() -> None:
    first, second = twins(importance="random")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (first, second)]
    for _ in range(6):
        ids = batch()
        for model, optimizer in zip((first, second), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, ids).backward()
            assert all(state.profile is None for state in losia_fx.controller(model).states)
            optimizer.step()
    assert [event.group for event in losia_fx.controller(first).history] == [0, 1, 0]
    assert all(event.captured is None for event in losia_fx.controller(first).history)
    assert_same_path(first, second)  # the same seed


def test_gradients_that_say_nothing_of_the_importance_are_named_once_with_what_to_do(caplog: Any) -> None:
    """Noise, projections, an average over processes by hand: S learns by them, and has no reason to move."""
    model, _ = twins(period=2, schedule="async")
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(values, lr=0.05)
    with warned() as said:
        for _ in range(8):
            loss_of(model, batch()).backward()
            for value in values:
                value.grad = torch.randn_like(value)
            optimizer.step()
            optimizer.zero_grad()
    assert len(said) == 1, said
    assert 'importance="random"' in said[0]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert losia_fx.controller(model).left_out > 2
    assert all(event.moved == 0 for event in losia_fx.controller(model).history)
