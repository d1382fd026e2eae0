"""The parts of a step by themselves, on one weight of one layer: fit, importance, rewarm, write-back, selection."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from losia_fx import LosiaConfig
from losia_fx.method.fit import Fit
from losia_fx.method.selection import select_subnet
from losia_fx.runtime.measure import add_importance, fit_gradients
from losia_fx.runtime.profile import Profile
from losia_fx.runtime.slot import choose
from losia_fx.runtime.state import SubnetState
from losia_fx.runtime.train_state import Progress, TrainState
from losia_fx.runtime.write_back import rewarm, rewarm_share, undo_write_back, write_back

CONFIG = LosiaConfig(rank_factor=0.25, period=4, compiler="eager")


@pytest.fixture
def state() -> SubnetState:
    made = SubnetState(nn.Linear(12, 8), "weight", "layer.weight", CONFIG, whole_cols=False)
    made.register(torch.tensor([1, 5]), torch.tensor([0, 4, 11]))
    return made


def test_of_the_gradient_that_is_seen_the_factor_is_found(state: SubnetState) -> None:
    grad = torch.randn(8, 12)
    state.profile, state.values.grad = Profile(grad=grad), 0.5 * state.block_of(grad)
    fit = fit_gradients([state], [state], [])[state]
    assert fit is not None
    assert fit.factor == pytest.approx(0.5)
    assert fit.limit is None


def test_one_step_of_importance(state: SubnetState) -> None:
    grad, profile = torch.randn(8, 12), Profile()
    add_importance(profile, state.weight, grad, Fit(0.5), "mixed", (CONFIG.beta1, CONFIG.beta2), compiled=False)
    wg = state.weight.detach() * grad * 0.5
    new = (wg - wg**2 / 2).abs()
    torch.testing.assert_close(profile.importance, (1 - CONFIG.beta1) * new)
    assert profile.importance is not None
    torch.testing.assert_close(profile.uncertainty, (1 - CONFIG.beta2) * (new - profile.importance).abs())


@pytest.mark.parametrize(("step", "share"), [(8, 0.25), (9, 0.5), (10, 0.75), (11, 1.0), (20, 1.0)])
def test_the_kth_update_after_a_move_counts_by_k_of_a_period(state: SubnetState, step: int, share: float) -> None:
    assert rewarm_share(state, CONFIG, step) == 1.0
    state.rewarm_from = 8
    assert rewarm_share(state, CONFIG, step) == share
    before = state.values.detach().clone()
    state.values.data.add_(1.0)
    rewarm(state.values, before, share)
    torch.testing.assert_close(state.values.detach(), before + share)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_written_back_can_be_undone(state: SubnetState, compiled: bool) -> None:
    whole, values = state.weight.detach().clone(), state.values.detach().clone()
    version = state.weight._version
    state.values.data.add_(1.0)
    write_back([state], compiled)
    moved = whole.clone()
    moved[state.rows[:, None], state.cols] += 1.0
    assert torch.equal(state.weight, moved)
    undo_write_back(state, values, version)
    assert torch.equal(state.weight, whole)


def test_the_choice_is_the_selection_by_the_score(state: SubnetState) -> None:
    train = TrainState(state.owner, CONFIG, False, Progress(torch.Generator()), states=[state])
    assert not choose(train, [state])  # nothing was measured
    importance, uncertainty = torch.rand(8, 12), torch.rand(8, 12)
    state.profile = Profile(importance, uncertainty)
    choice = choose(train, [state])[state]
    expected = select_subnet(importance * uncertainty, *state.size)
    assert all(torch.equal(*pair) for pair in zip(choice.selection, expected, strict=True))
    torch.testing.assert_close(choice.total, (importance * uncertainty).sum())
    state.move_to(choice.selection.rows, choice.selection.cols)
    again = choose(train, [state])[state].selection
    assert torch.equal(again.rows, state.rows)
    assert torch.equal(again.cols, state.cols)
