"""state_dict and load_state_dict: training goes on to the bit, and nothing half is ever loaded."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

import losia_fx
from losia_fx import LosiaWarning, StateError, TransformError
from losia_fx.checkpoint.state import load_state, save_state
from losia_fx.optim import SubnetRMS
from losia_fx.storage.atomic import write_file
from tests.support.toy_runs import PERIOD, adamw, assert_same, batches, learning, same, toy, train
from tests.support.toys import Toy, batch, by_string, loss_of

SLOW = pytest.mark.slow  # many such variants only add up
STEPS = 5 * PERIOD  # past a round of three groups
CUTS = (0, 2, PERIOD, PERIOD + 1, 3 * PERIOD + 2)  # the start, in a slot, at its edge, in rewarming, the second round
MOMENTUM: Any = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
FUSED: Any = lambda parameters: torch.optim.AdamW(parameters, lr=5e-3, fused=True)  # noqa: E731


@pytest.mark.parametrize(
    ("make", "dtype", "options"),
    [
        (adamw, torch.float32, {}),
        (adamw, torch.bfloat16, {}),
        pytest.param(MOMENTUM, torch.float32, {"schedule": "sync"}, marks=SLOW),
        pytest.param(FUSED, torch.bfloat16, {"rewarm": False}, marks=SLOW),
        pytest.param(MOMENTUM, torch.float32, {"importance": "random"}, marks=SLOW),
        pytest.param(FUSED, torch.float32, {"schedule": "static"}, marks=SLOW),
    ],
    ids=["adamw", "bfloat16", "sync", "fused", "random", "static"],
)
def test_a_run_goes_on_to_the_bit(make: Any, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    """From every cut, weights or state first; into a model that has been elsewhere, with an optimizer of its own."""
    steps, whole, saved = batches(STEPS), toy(dtype, **options), {}
    optimizer = make(learning(whole))
    for number, ids in enumerate(steps):
        if number in CUTS:
            torch.save(losia_fx.state_dict(whole), tmp_path / f"losia-{number}.pt")
            saved[number] = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        train(whole, optimizer, [ids])

    resumed = toy(dtype, seed=2, **options)
    train(resumed, make(learning(resumed)), steps[: PERIOD + 1])
    for cut, flip in zip(CUTS, itertools.cycle((False, True)), strict=False):
        continued = make(learning(resumed))
        state = torch.load(tmp_path / f"losia-{cut}.pt", weights_only=True)
        loads: list[Callable[[], Any]] = [
            lambda cut=cut: resumed.load_state_dict(saved[cut][0]),
            lambda cut=cut, continued=continued: continued.load_state_dict(copy.deepcopy(saved[cut][1])),
            lambda state=state: losia_fx.load_state_dict(resumed, state),
        ]
        for load in reversed(loads) if flip else loads:
            load()
        train(resumed, continued, steps[cut:])
        assert_same(whole, resumed)
    assert losia_fx.controller(resumed).step == STEPS
    assert bool(losia_fx.controller(resumed).history) == ("static" not in options.values())


@pytest.mark.parametrize("schedule", ["async", pytest.param("sync", marks=SLOW)])
def test_a_run_that_measures_the_last_steps_of_a_slot_goes_on_to_the_bit(schedule: str) -> None:
    """Cut before the steps that are measured, at their border, within them, and at the slot's end."""
    options = {"profile_steps": 2, "schedule": schedule}
    steps, whole, saved = batches(STEPS), toy(**options), {}
    optimizer = adamw(learning(whole))
    for number, ids in enumerate(steps):
        if number in (1, PERIOD - 2, PERIOD - 1, PERIOD, 2 * PERIOD - 1):
            saved[number] = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), losia_fx.state_dict(whole)))
        train(whole, optimizer, [ids])
    assert losia_fx.controller(whole).history
    for cut, (weights, moments, state) in saved.items():
        measured = cut % PERIOD == PERIOD - 1 and (schedule == "async" or cut < PERIOD)  # sync: one slot of a round
        assert any(":importance" in name for name in state) == measured, cut
        resumed = toy(seed=2, **options)
        continued = adamw(learning(resumed))
        resumed.load_state_dict(weights)
        continued.load_state_dict(moments)
        losia_fx.load_state_dict(resumed, state)
        train(resumed, continued, steps[cut:])
        assert_same(whole, resumed)


def test_the_file_form_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, resumed = toy(torch.bfloat16), toy(torch.bfloat16, seed=2)
    train(whole, adamw(learning(whole)), batches(PERIOD + 2))
    save_state(whole, tmp_path / "state")
    load_state(resumed, tmp_path / "state")
    resumed.load_state_dict(whole.state_dict())
    assert_same(whole, resumed)


def test_the_optimizers_state_of_a_subnet_that_has_just_moved_is_not_there_and_stays_so() -> None:
    """At a re-selection its moments go; an optimizer that lacks some of its states reloads to the bit."""
    steps = batches(2 * PERIOD)
    model = toy()
    optimizer = adamw(learning(model))
    train(model, optimizer, steps[:PERIOD])
    moved = losia_fx.subnets(model)["head.weight"].values
    assert moved not in optimizer.state or not optimizer.state[moved]
    saved = copy.deepcopy(optimizer.state_dict())
    other = adamw(learning(toy()))
    other.load_state_dict(saved)
    assert same(saved["state"], other.state_dict()["state"])
    assert len(saved["state"]) == len(learning(model)) - 1


def test_accumulation_goes_on_where_its_gradients_are_kept() -> None:
    """Two of four micro-batches, then a new process that gets the gradients too: G is in the state."""
    whole, parts = toy(), batches(4)
    for ids in parts[:2]:
        loss_of(whole, ids).backward()
    saved, gradients = losia_fx.state_dict(whole), [p.grad for p in learning(whole)]
    resumed = toy()
    losia_fx.load_state_dict(resumed, saved)
    for parameter, gradient in zip(learning(resumed), gradients, strict=True):
        assert gradient is not None
        parameter.grad = gradient.clone()
    for model in (whole, resumed):
        for ids in parts[2:]:
            loss_of(model, ids).backward()
        adamw(learning(model)).step()
    assert "head.weight:grad" in saved
    assert losia_fx.controller(resumed).left_out == 0
    assert_same(whole, resumed)


def test_two_optimizers_of_which_one_has_stepped() -> None:
    whole, ids = toy(), batch(4)
    halves = learning(whole)[:3], learning(whole)[3:]
    first, second = (torch.optim.SGD(half, lr=0.1) for half in halves)
    loss_of(whole, ids).backward()
    first.step()
    state = losia_fx.state_dict(whole)
    assert len(state["stepped"]) == 3
    resumed = toy()
    resumed.load_state_dict(whole.state_dict())
    losia_fx.load_state_dict(resumed, state)
    rest = torch.optim.SGD(learning(resumed)[3:], lr=0.1)
    loss_of(resumed, ids).backward()
    rest.step()
    assert losia_fx.controller(resumed).step == 1
    second.step()
    assert losia_fx.controller(whole).step == 1


def test_the_state_is_plain_and_a_copy() -> None:
    model = toy()
    optimizer = adamw(learning(model))
    train(model, optimizer, batches(PERIOD + 2))
    state = losia_fx.state_dict(model)
    before = copy.deepcopy(state)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    assert json.loads(json.dumps(plain)) == plain
    assert {name.rpartition(":")[2] for name in tensors} == {
        "generator", "values", "rows", "cols", "importance", "uncertainty",
    }  # fmt: skip
    train(model, optimizer, batches(PERIOD))
    assert same(state, before)


def test_a_checkpoint_of_many_files_by_one_process(tmp_path: Path) -> None:
    """torch.distributed.checkpoint without processes: to the bit, and cut within a slot of another group."""
    steps, model = batches(2 * PERIOD + 2), toy()
    train(model, adamw(learning(model)), steps)
    save_in_parts({"run": {"losia": losia_fx.state_dict(model, sharded=True)}, "weights": model.state_dict()}, tmp_path)
    resumed = toy(seed=2)
    state = {"run": {"losia": losia_fx.state_dict(resumed, like=metadata(tmp_path))}, "weights": resumed.state_dict()}
    load_in_parts(state, tmp_path)
    losia_fx.load_state_dict(resumed, state["run"]["losia"])
    assert same(losia_fx.state_dict(resumed), losia_fx.state_dict(model))
    assert_same(resumed, model)


def test_a_checkpoint_of_many_files_that_is_another(tmp_path: Path) -> None:
    model, other = toy(), toy(rank_factor=1 / 8)
    one = losia_fx.state_dict(model, sharded=True)
    for name, state in {"none": {"x": torch.zeros(2)}, "two": {"a": one, "b": one}, "losia": {"a": one}}.items():
        save_in_parts(state, tmp_path / name)
    for name, count in {"none": 0, "two": 2}.items():
        with pytest.raises(StateError, match=f"holds {count} states"):
            losia_fx.state_dict(model, like=metadata(tmp_path / name))
    with pytest.raises(StateError, match=r"like=.*read_metadata"):
        losia_fx.state_dict(model, like=tmp_path / "losia")  # type: ignore[arg-type]
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load_in_parts({"a": losia_fx.state_dict(other, like=metadata(tmp_path / "losia"))}, tmp_path / "losia")
    with pytest.raises(StateError, match="losia_fx holds no state: ''"):
        losia_fx.load_state_dict(model, losia_fx.state_dict(model, like=metadata(tmp_path / "losia")))


def save_in_parts(state: dict[str, Any], folder: Path) -> None:
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def load_in_parts(state: dict[str, Any], folder: Path) -> None:
    dcp.load(state, checkpoint_id=folder, no_dist=True)


def metadata(folder: Path) -> Any:
    return dcp.FileSystemReader(folder).read_metadata()


def test_the_float32_subnet_of_a_bfloat16_weight_keeps_its_bits() -> None:
    model = toy(torch.bfloat16)
    train(model, adamw(learning(model)), batches(3))
    subnets = losia_fx.subnets(model)
    assert any(not torch.equal(s.values, s.values.bfloat16().float()) for s in subnets.values())
    resumed = toy(torch.bfloat16)
    held = {name: subnet.values for name, subnet in losia_fx.subnets(resumed).items()}
    resumed.load_state_dict(model.state_dict())
    losia_fx.load_state_dict(resumed, losia_fx.state_dict(model))
    for name, subnet in losia_fx.subnets(resumed).items():
        assert subnet.values is held[name]  # the parameter that an optimizer holds
        assert torch.equal(subnet.values, subnets[name].values), name


def test_a_state_collected_and_loaded_in_inference_mode() -> None:
    steps, whole, resumed = batches(STEPS), toy(), toy(seed=2)
    optimizer = adamw(learning(whole))
    train(whole, optimizer, steps[:2])
    with torch.inference_mode():
        resumed.load_state_dict(whole.state_dict())
        losia_fx.load_state_dict(resumed, losia_fx.state_dict(whole))
    continued = adamw(learning(resumed))
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, each in ((whole, optimizer), (resumed, continued)):
        train(model, each, steps[2:])
    assert_same(whole, resumed)


def momentum(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "said_of"),
    [(adamw, "is of before 3 subnets moved"), (momentum, "If it is of before step 8, or of another model")],
)
def test_an_optimizer_that_is_put_back_in_mid_run_without_the_subnets_is_said(
    make: Callable[[Iterable[nn.Parameter]], Optimizer], said_of: str
) -> None:
    """After a divergence, say: its moments are of places where the subnets are no longer."""
    model = toy()
    optimizer = make(learning(model))
    train(model, optimizer, batches(PERIOD - 1))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), losia_fx.state_dict(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weights, moments, state in (kept, kept):
            model.load_state_dict(weights)
            optimizer.load_state_dict(copy.deepcopy(moments))
            losia_fx.load_state_dict(model, state)
            train(model, optimizer, batches(PERIOD + 1))
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(copy.deepcopy(kept[1]))
    with pytest.warns(LosiaWarning, match="oad the LoSiA state of the same moment too") as said:
        train(model, optimizer, batches(1))
    assert len(said) == 1
    assert said_of in str(said[0].message)


@pytest.mark.parametrize(("before", "between"), [(1, 1), (PERIOD + 1, 0)])
def test_an_optimizer_that_is_put_back_to_where_the_subnets_are_is_not_said(before: int, between: int) -> None:
    """A learning rate finder's way, before any subnet has moved; and a state loaded again at once."""
    model = toy()
    optimizer = adamw(learning(model))
    train(model, optimizer, batches(before))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches(between))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        train(model, optimizer, batches(1))


@pytest.mark.parametrize("carry_moments", [False, True])
@pytest.mark.parametrize("others", [False, True], ids=["its own of a slot before", "another model's of the same step"])
def test_a_state_that_may_be_of_other_places_is_said(others: bool, carry_moments: bool) -> None:
    """Its count of steps does not tell: both are of after a move. In population-based training the better model's
    weights and moments are loaded into the worse one."""
    options: dict[str, Any] = {"schedule": "all", "carry_moments": carry_moments}
    model, other = toy(**options), toy(seed=2, **options)
    optimizers = [adamw(learning(each)) for each in (model, other)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        train(each, optimizer, batches(PERIOD + 2))
    kept = copy.deepcopy((model.state_dict(), optimizers[0].state_dict()))
    train(model, optimizers[0], batches(2 * PERIOD))
    train(other, optimizers[1], batches(2 * PERIOD))
    if others:
        kept = other.state_dict(), optimizers[1].state_dict()
    model.load_state_dict(kept[0])
    optimizers[0].load_state_dict(kept[1])
    with pytest.warns(LosiaWarning, match=r"If it is of before step \d+, or of another model") as said:
        train(model, optimizers[0], batches(2))
    assert len(said) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_subnet_rms_put_back_alone(momentum: float) -> None:
    """What it keeps of a whole weight's rows and columns is right wherever a subnet is; its momentum is not."""
    model = toy()
    optimizer = SubnetRMS(model, lr=1e-3, momentum=momentum)
    train(model, optimizer, batches(PERIOD + 2))
    kept = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches(2 * PERIOD))
    optimizer.load_state_dict(kept)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, optimizer, batches(1))
    assert len(said) == (momentum > 0), [str(each.message) for each in said]


def test_two_optimizers_that_are_put_back_with_the_subnets_are_not_said() -> None:
    model = toy()
    values = learning(model)
    optimizers = [momentum(values[:3]), momentum(values[3:])]

    def run(count: int) -> None:
        for ids in batches(count):
            model.zero_grad()
            loss_of(model, ids).backward()
            for each in optimizers:
                each.step()

    run(PERIOD - 1)
    kept = copy.deepcopy((model.state_dict(), [each.state_dict() for each in optimizers], losia_fx.state_dict(model)))
    run(2 * PERIOD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(kept[0])
        for each, moments in zip(optimizers, kept[1], strict=True):
            each.load_state_dict(moments)
        losia_fx.load_state_dict(model, kept[2])
        run(1)


def test_a_new_optimizer_that_takes_an_old_state_without_the_subnets_is_said() -> None:
    model = toy()
    optimizer = adamw(learning(model))
    train(model, optimizer, batches(PERIOD - 1))
    kept = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches(PERIOD + 1))
    again = adamw(learning(model))
    again.load_state_dict(kept)
    with pytest.warns(LosiaWarning, match="Load the LoSiA state of the same moment too"):
        train(model, again, batches(1))


def test_moments_of_other_places_go_where_the_subnets_alone_are_put_back() -> None:
    model = toy()
    optimizer = adamw(learning(model))
    train(model, optimizer, batches(PERIOD - 1))
    kept = copy.deepcopy((model.state_dict(), losia_fx.state_dict(model)))
    train(model, optimizer, batches(2 * PERIOD))
    later = {name: (s.rows.clone(), s.cols.clone()) for name, s in losia_fx.subnets(model).items()}
    model.load_state_dict(kept[0])
    losia_fx.load_state_dict(model, kept[1])
    moved = 0
    for name, subnet in losia_fx.subnets(model).items():
        stays = torch.equal(subnet.rows, later[name][0]) and torch.equal(subnet.cols, later[name][1])
        assert bool(optimizer.state[subnet.values]) == stays
        moved += not stays
    assert moved > 1
    train(model, optimizer, batches(1))


def test_what_trains_alone_is_loaded_with_a_word_of_its_places() -> None:
    model = toy()
    alone = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    with pytest.warns(LosiaWarning, match="right only where every subnet still is where it was") as said:
        model.load_state_dict(alone, strict=False)
    assert len(said) == 1
    still = toy(schedule="static")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        still.load_state_dict(alone, strict=False)


def test_without_subnets_there_is_no_state() -> None:
    with pytest.raises(TransformError):
        losia_fx.state_dict(Toy())
    with pytest.raises(TransformError):
        losia_fx.load_state_dict(Toy(), {})


def test_a_model_compiled_by_string_goes_on_after_its_first_forward() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = Toy()
        call = by_string(model, compiler="eager", rank_factor=0.25, period=PERIOD)
        optimizer = adamw(learning(model))
        loss_of(call, batch())  # the subnets are made now, and take their weights' places in the optimizer
        runs.append((model, call, optimizer))
    (whole, call, optimizer), (resumed, call_again, continued) = runs
    steps = batches(3 * PERIOD)
    train(call, optimizer, steps[: PERIOD + 1])
    losia_fx.load_state_dict(resumed, losia_fx.state_dict(whole))
    resumed.load_state_dict(whole.state_dict())
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(call, optimizer, steps[PERIOD + 1 :])
    train(call_again, continued, steps[PERIOD + 1 :])
    assert_same(whole, resumed)


# -- half a resume is said --------------------------------------------------------------------------------------------


def trained(steps: int = PERIOD + 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = toy()
    optimizer = adamw(learning(model))
    train(model, optimizer, batches(steps))
    return model, optimizer


def test_a_state_without_its_weights_is_an_error_at_the_first_step() -> None:
    model, _ = trained()
    resumed = toy(seed=5)
    losia_fx.load_state_dict(resumed, losia_fx.state_dict(model))
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(StateError, match=r"weights do not hold the subnets .*checkpoint"):
        train(resumed, adamw(learning(resumed)), batches(1))
    assert same(before, resumed.state_dict())


def test_an_optimizer_that_goes_on_while_the_subnets_start_anew_is_said() -> None:
    model, optimizer = trained()
    resumed = toy()
    resumed.load_state_dict(model.state_dict())
    continued = adamw(learning(resumed))
    continued.load_state_dict(optimizer.state_dict())
    with pytest.warns(LosiaWarning, match="the optimizer goes on from an earlier run, but the subnets do not"):
        train(resumed, continued, batches(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LosiaWarning)
        train(resumed, continued, batches(1))  # once


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.SGD, torch.optim.AdamW])
def test_a_fresh_optimizer_is_not_taken_for_a_resumed_one(make: Any) -> None:
    model = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LosiaWarning)
        train(model, make(learning(model), lr=0.01), batches(1))


def test_moments_of_a_subnet_selected_by_hand_before_the_first_step_start_anew() -> None:
    model, optimizer = trained(PERIOD + 2)
    resumed = toy()
    resumed.load_state_dict(model.state_dict())
    losia_fx.load_state_dict(resumed, losia_fx.state_dict(model))
    continued = adamw(learning(resumed))
    continued.load_state_dict(optimizer.state_dict())
    losia_fx.controller(resumed).select(1)
    for name in losia_fx.controller(resumed).groups[1]:
        assert losia_fx.subnets(resumed)[name].values not in continued.state


# -- what does not fit is refused, by name, and nothing changes -------------------------------------------------------


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__setitem__(key, value)


def _edit(key: str, edit: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__setitem__(key, edit(state[key]))


def _swapped(rows: Tensor) -> Tensor:
    return rows.flip(0)


def _twice(rows: Tensor) -> Tensor:
    return torch.cat((rows[:1], rows[:-1]))


HEAD = "head.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no format": (lambda state: state.pop("format"), "format is None"),
    "other format": (_set("format", 2), "format is 2"),
    "missing": (lambda state: state.pop(f"{HEAD}:values"), f"{HEAD}:values is missing"),
    "missing plain": (lambda state: state.pop("history"), "history is missing"),
    "unknown": (_set("extra", 1), "extra is unknown"),
    "unknown weight": (_set("nobody.weight:rows", torch.arange(3)), "nobody.weight:rows is unknown"),
    "profile of an idle group": (_set(f"{HEAD}:importance", torch.zeros(40, 16)), f"{HEAD}:importance is unknown"),
    "half a profile": (lambda s: s.pop("layers.0.mix.weight:uncertainty"), "layers.0.mix.weight:uncertainty is miss"),
    "period": (_edit("config", lambda c: {**c, "period": 9}), "period was 9 and is 4"),
    "no config": (_set("config", 3), "config is no table"),
    "groups": (_edit("groups", lambda groups: groups[::-1]), "groups are not those"),
    "step": (_set("step", -1), "step is -1"),
    "step of another kind": (_set("step", True), "step is True"),
    "left_out": (_set("left_out", "none"), "left_out is 'none'"),
    "rewarm of a stranger": (_set("rewarm_from", {"nobody": 1}), "rewarm_from"),
    "rewarm in the future": (_set("rewarm_from", {HEAD: 99}), "rewarm_from"),
    "stepped": (_set("stepped", ["nobody"]), "stepped"),
    "history": (_set("history", [[1, 2]]), "history"),
    "history of a group that is not": (_set("history", [[4, 7, 0.5, None]]), "history"),
    "shape": (_edit(f"{HEAD}:values", lambda t: t[:-1]), f"{HEAD}:values is (9, 16) torch.float32, not (10, 16)"),
    "dtype": (_edit(f"{HEAD}:values", Tensor.half), f"{HEAD}:values is (10, 16) torch.float16"),
    "rows of another dtype": (_edit(f"{HEAD}:rows", Tensor.int), f"{HEAD}:rows is (10,) torch.int32"),
    "negative": (_edit(f"{HEAD}:rows", lambda t: t - 40), f"{HEAD}:rows holds an index outside of 0 to 39"),
    "too large": (_edit(f"{HEAD}:rows", lambda t: t + 40), f"{HEAD}:rows holds an index outside of 0 to 39"),
    "unsorted": (_edit(f"{HEAD}:rows", _swapped), f"{HEAD}:rows is not sorted"),
    "twice": (_edit(f"{HEAD}:rows", _twice), f"{HEAD}:rows is not sorted, or names an index twice"),
    "no tensor": (_set(f"{HEAD}:cols", [1, 2]), f"{HEAD}:cols is no ordinary tensor"),
    "sparse": (_edit(f"{HEAD}:values", Tensor.to_sparse), f"{HEAD}:values is no ordinary tensor"),
    "on no device": (_edit(f"{HEAD}:values", lambda t: t.to("meta")), f"{HEAD}:values is no ordinary tensor"),
    "generator": (_edit("generator", lambda t: t[:-1]), "generator is no state"),
    "importance": (
        _edit("layers.0.mix.weight:importance", lambda t: t.double()),
        "layers.0.mix.weight:importance is (16, 16) torch.float64, not (16, 16) torch.float32",
    ),
}


@pytest.fixture(scope="module")
def good_and_target() -> tuple[dict[str, Any], nn.Module]:
    source, target = trained()[0], trained(2)[0]
    return losia_fx.state_dict(source), target


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(wrong: str, good_and_target: tuple[dict[str, Any], nn.Module]) -> None:
    good, model = good_and_target
    state, before = copy.deepcopy(good), losia_fx.state_dict(model)
    edit, said = WRONG[wrong]
    edit(state)
    with pytest.raises(StateError) as caught:
        losia_fx.load_state_dict(model, state)
    assert said in str(caught.value)
    assert same(before, losia_fx.state_dict(model))


def test_a_state_of_another_model_is_refused() -> None:
    state = losia_fx.state_dict(toy())
    for other in (toy(rank_factor=0.5), losia_fx.transform(Toy(layers=1), compiler="eager", period=PERIOD)):
        with pytest.raises(StateError):
            losia_fx.load_state_dict(other, state)
    with pytest.raises(StateError, match="format"):
        losia_fx.load_state_dict(toy(), [1, 2])  # type: ignore[arg-type]


def test_the_compiler_and_the_seed_may_differ() -> None:
    model, _ = trained()
    losia_fx.load_state_dict(toy(compiler="aot_eager"), losia_fx.state_dict(model))
    torch.manual_seed(1)
    losia_fx.load_state_dict(
        losia_fx.transform(Toy(), compiler="eager", rank_factor=0.25, output_rank_factor=0.25, period=PERIOD, seed=9),
        losia_fx.state_dict(model),
    )


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained()
    path = tmp_path / "state"
    save_state(model, path)
    old = path.read_bytes()

    def fail(draft: Path) -> None:
        draft.write_bytes(old[:100])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(path, fail)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


class MakesItsStateAnew(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.state = type(self.state)(dict, {key: dict(value) for key, value in self.state.items()})
        return result


class Around(Optimizer):
    """A wrapper with a state of its own."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step()


def test_an_optimizer_that_makes_its_state_anew_has_loaded_nothing() -> None:
    model = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, MakesItsStateAnew(learning(model), lr=1e-3), batches(4 * PERIOD))


def test_a_state_loaded_into_an_optimizer_within_another_is_said() -> None:
    model = toy(schedule="all")
    inner = adamw(learning(model))
    around = Around(inner)
    train(model, around, batches(PERIOD + 2))
    kept = copy.deepcopy(inner.state_dict())
    train(model, around, batches(2 * PERIOD))
    inner.load_state_dict(kept)
    with pytest.warns(LosiaWarning, match="or of another model"):
        train(model, around, batches(1))
