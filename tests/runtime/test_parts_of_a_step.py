"""The parts of a step by themselves, on one weight of one layer: fit, importance, rewarm, write-back, selection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from losia_fx import LosiaConfig
from losia_fx.method import kernels
from losia_fx.method.fit import Fit
from losia_fx.method.selection import select_subnet
from losia_fx.runtime.measure import add_importance, fit_gradients
from losia_fx.runtime.profile import Profile
from losia_fx.runtime.slot import choose
from losia_fx.runtime.state import SubnetState
from losia_fx.runtime.train_state import Progress, TrainState
from losia_fx.runtime.write_back import WriteBack, rewarm, rewarm_share, undo_write_back

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
    WriteBack(compiled)([state])
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


# -- many subnets that are written again where they were --------------------------------------------------------------


def _rows_move(state: SubnetState) -> None:
    state.rows.copy_(torch.tensor([0, 7]))


def _cols_move(state: SubnetState) -> None:
    state.cols.copy_(torch.tensor([2, 3, 5]))


def _another_weight(state: SubnetState) -> None:
    state.owner.weight = nn.Parameter(torch.randn(8, 12))


def _another_subnet(state: SubnetState) -> None:
    state.owner.weight_subnet = nn.Parameter(torch.randn(2, 3))


def _other_rows(state: SubnetState) -> None:
    state.owner.weight_subnet_rows = torch.tensor([2, 3])


def _another_memory(state: SubnetState) -> None:
    state.weight.data = torch.randn(8, 12)
    state.values.data = torch.randn(2, 3)


def _narrow(state: SubnetState) -> None:
    state.owner.to(torch.bfloat16)


def _nothing(state: SubnetState) -> None:
    pass


CHANGES = [_nothing, _rows_move, _cols_move, _another_weight, _another_subnet, _other_rows, _another_memory, _narrow]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_again_goes_where_it_belongs_now(change: Callable[[SubnetState], None], compiled: bool) -> None:
    states = [SubnetState(nn.Linear(12, 8), "weight", f"layers.{n}.weight", CONFIG, n == 2) for n in range(4)]
    for state in states:  # the third learns whole rows, so it is never written with the others
        state.register(torch.tensor([1, 5]), torch.arange(12) if state.whole_cols else torch.tensor([0, 4, 11]))
    write = WriteBack(compiled)
    for number in range(7):
        if number == 4:
            change(states[1])
        chosen = states[: 3 if number == 5 else 4]
        wanted = []
        for state in chosen:
            state.values.data.normal_()
            whole = state.weight.detach().clone()
            whole[state.rows[:, None], state.cols] = state.values.detach().to(whole.dtype)
            wanted.append(whole)
        last = states[3].weight.detach().clone()
        states[3].values.data.add_(1.0 if len(chosen) == 3 else 0.0)
        write(chosen)
        for state, whole in zip(chosen, wanted, strict=True):
            assert torch.equal(state.weight, whole)
        assert len(chosen) == 4 or torch.equal(states[3].weight, last)


@pytest.mark.parametrize("compiled", [False, True])
def test_of_small_blocks_that_stay_none_is_looked_at_by_itself(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    states = [SubnetState(nn.Linear(12, 8), "weight", f"layers.{n}.weight", CONFIG, n == 2) for n in range(4)]
    alone = list[str]()
    real = SubnetState.write_back
    monkeypatch.setattr(SubnetState, "write_back", lambda state: (alone.append(state.name), real(state)))
    for state in states:
        state.register(torch.tensor([1, 5]), torch.arange(12) if state.whole_cols else torch.tensor([0, 4, 11]))
    write = WriteBack(compiled)
    for _ in range(3):
        write(states)
    alone.clear()
    write(states)
    assert alone == ["layers.2.weight"]


def test_large_blocks_are_compiled_and_small_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which block a subnet is goes by its group; what is worth compiling, by the block's weights together."""
    compiled: list[int] = []
    monkeypatch.setattr(kernels, "WORTH_COMPILING", 2 * 8 * 12)
    monkeypatch.setattr(kernels, "_compiled_form", lambda function, kind, dynamic: function)
    monkeypatch.setattr(kernels, "_runs", lambda form, given: (compiled.append(len(given[0])), form(*given)))
    states = [SubnetState(nn.Linear(12, 8), "weight", f"layers.{n}.weight", CONFIG, False) for n in range(6)]
    for state, group in zip(states, (0, 1, 1, 2, 3, 3), strict=True):
        state.register(torch.tensor([1, 5]), torch.tensor([0, 4, 11]))
        state.group = group
    write = WriteBack(compiled=True)
    for chosen in (states, states, states[1:], states[:2], states):
        for state in chosen:
            state.values.data.normal_()
        compiled.clear()
        write(chosen)
        assert compiled == ([2, 2] if len(chosen) > 2 else [])
        for state in chosen:
            assert torch.equal(state.weight[state.rows[:, None], state.cols], state.values)


@pytest.mark.parametrize("way", ["W", "S"])
def test_what_is_transposed_in_place_is_written_where_it_is_now(way: str) -> None:
    state = SubnetState(
        nn.Linear(8, 8), "weight", "layer.weight", LosiaConfig(rank_factor=0.25, compiler="eager"), False
    )
    state.register(torch.tensor([1, 5]), torch.tensor([0, 4]))
    write = WriteBack(compiled=False)
    for number in range(5):
        if number == 3:
            with torch.no_grad():
                (state.weight if way == "W" else state.values).t_()
        state.values.data.normal_()
        whole = state.weight.detach().clone()
        whole[state.rows[:, None], state.cols] = state.values.detach()
        write([state])
        assert torch.equal(state.weight, whole)
