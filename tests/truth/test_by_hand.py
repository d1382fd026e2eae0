"""Training without a followed optimizer: steps written by hand, masters, flat copies; with stepped() and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

import losia_fx
from losia_fx import LosiaWarning, TransformError
from tests.support.pair import PERIOD, Pair
from tests.support.toys import Toy, batch
from tests.support.twin import (
    Twin,
    assert_one,
    assert_subnets,
    backward,
    close,
    loss_of,
    subnets_of,
    twins,
    values_of,
    warned,
    zero,
)

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

RATE = 0.1
MOVING: dict[str, Any] = {"schedule": "async", "importance": "random", "period": 3}


def sgd(parameters: Iterable[Tensor]) -> Optimizer:
    return optim.SGD(parameters, lr=RATE)


# -- by hand, and said: as the followed optimizer that does the same -----------------------------------------------


@torch.no_grad()
def in_place(values: list[nn.Parameter]) -> None:
    for value in values:
        if value.grad is not None:
            value -= RATE * value.grad


def by_data(values: list[nn.Parameter]) -> None:
    for value in values:
        if value.grad is not None:
            value.data.add_(value.grad, alpha=-RATE)


def new_data(values: list[nn.Parameter]) -> None:
    for value in values:
        if value.grad is not None:
            value.data = value.data - RATE * value.grad


@torch.no_grad()
def foreach(values: list[nn.Parameter]) -> None:
    torch._foreach_add_(values, [value.grad for value in values], alpha=-RATE)


def as_a_vector(values: list[nn.Parameter]) -> None:
    grads = parameters_to_vector([value.grad for value in values])
    vector_to_parameters(parameters_to_vector(values).detach() - RATE * grads, values)


BY_HAND: dict[str, Callable[[list[nn.Parameter]], None]] = {
    f.__name__: f for f in (in_place, by_data, new_data, foreach, as_a_vector)
}


@pytest.mark.parametrize("name", BY_HAND)
def test_steps_by_hand_that_are_said(name: str) -> None:
    """Schedule, importance, re-selections, rewarming: the path of the eager reference with torch's own descent."""
    pair = Pair(sgd)
    step = BY_HAND[name]

    def take() -> None:
        step(pair.values())
        losia_fx.stepped(pair.model)

    pair.rounds(take=take)


def test_steps_by_hand_over_micro_batches() -> None:
    pair = Pair(sgd)
    for _ in pair.steps():
        for _ in range(3):
            for loss in pair.losses(batch()):
                (loss / 3).backward()

        def take() -> None:
            in_place(pair.values())
            losia_fx.stepped(pair.model)

        pair.finish(take)


def test_a_gradient_clipped_by_hand_scales_the_importance_too() -> None:
    pair = Pair(sgd)
    for _ in pair.steps():
        for loss in pair.losses(batch()):
            loss.backward()
        nn.utils.clip_grad_norm_(pair.values(), 0.05)

        def take() -> None:
            in_place(pair.values())
            losia_fx.stepped(pair.model)

        pair.finish(take, clip_norm=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_hand_and_by_an_optimizer_are_one_to_the_bit(dtype: torch.dtype) -> None:
    """In rewarming too, where the S of before the step counts with all the bits that a narrow W does not hold."""
    torch.manual_seed(0)
    plain = Toy(layers=1).to(dtype)
    options: dict[str, Any] = {"schedule": "async", "period": 3}
    followed, by_hand = (twins(copy.deepcopy(plain), **options)[0] for _ in range(2))
    optimizer = sgd(values_of(followed))
    for _ in range(11):
        ids = batch()
        for model in (followed, by_hand):
            model.zero_grad()
            loss_of(model, ids).backward()
        optimizer.step()
        with torch.no_grad():  # as torch's optimizer computes it
            torch._foreach_add_(values_of(by_hand), [value.grad for value in values_of(by_hand)], alpha=-RATE)
        losia_fx.stepped(by_hand)
        one, other = losia_fx.state_dict(followed), losia_fx.state_dict(by_hand)
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
            assert same, key
        for name, subnet in subnets_of(followed).items():
            assert torch.equal(subnet.weight, subnets_of(by_hand)[name].weight), name
    assert len(losia_fx.controller(by_hand).history) == 3


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_steps_by_hand_of_a_compiled_model(compiler: str) -> None:
    pair = Pair(sgd, compiler=compiler, tolerance=1e-7)

    def take() -> None:
        in_place(pair.values())
        losia_fx.stepped(pair.model)

    pair.rounds(take=take)


def test_a_followed_optimizer_and_a_hand_by_turns() -> None:
    """A few steps each: t and the path are those of one optimizer throughout."""
    pair = Pair(sgd)

    def take() -> None:
        if (pair.reference.steps // 2) % 2:
            in_place(pair.values())
            losia_fx.stepped(pair.model)
        else:
            pair.optimizer.step()

    pair.rounds(take=take)


@pytest.mark.parametrize("wrap", ["itself", "compiled", "a module around it"])
def test_stepped_takes_wrappers_of_the_model(wrap: str) -> None:
    model, twin = twins()
    backward(model, twin)
    in_place(values_of(model))
    around: Any = {"compiled": torch.compile(model, backend="eager"), "a module around it": nn.Sequential(model)}
    losia_fx.stepped(around.get(wrap, model))
    assert losia_fx.controller(model).step == 1


def test_stepped_refuses_a_plain_model() -> None:
    with pytest.raises(TransformError, match="Toy"):
        losia_fx.stepped(Toy())


def test_a_state_saved_in_a_run_by_hand_goes_on_to_the_bit() -> None:
    """In a slot and in rewarming, into a model made anew."""

    def trained(model: nn.Module, steps: Iterator[Tensor]) -> None:
        for ids in steps:
            model.zero_grad()
            loss_of(model, ids).backward()
            in_place(values_of(model))
            losia_fx.stepped(model)

    ids = [batch() for _ in range(11)]
    for cut in (2, 3, 4, 7):
        torch.manual_seed(1)
        whole = losia_fx.transform(Toy(layers=1), compiler="eager", rank_factor=0.25, period=3)
        trained(whole, iter(ids[:cut]))
        saved = losia_fx.state_dict(whole), {name: value.clone() for name, value in whole.state_dict().items()}
        trained(whole, iter(ids[cut:]))
        torch.manual_seed(2)
        resumed = losia_fx.transform(Toy(layers=1), compiler="eager", rank_factor=0.25, period=3)
        losia_fx.load_state_dict(resumed, saved[0])
        resumed.load_state_dict(saved[1])
        trained(resumed, iter(ids[cut:]))
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), f"{name}, cut at {cut}"
        assert losia_fx.controller(resumed).step == 11


class Masters:
    """Adam on float32 (here: wider) copies of one's own, copied back after every step; no Optimizer sees S."""

    def __init__(self, values: list[nn.Parameter]) -> None:
        self.values = values
        self.masters = [value.detach().double().clone().requires_grad_() for value in values]
        self.optimizer = optim.Adam(self.masters, lr=0.02)

    def step(self) -> None:
        for master, value in zip(self.masters, self.values, strict=True):
            master.grad = None if value.grad is None else value.grad.double()
        self.optimizer.step()
        with torch.no_grad():
            for master, value in zip(self.masters, self.values, strict=True):
                value.copy_(master)


class Flat:
    """All of S in one vector, of which each S becomes a view; the vector is what torch's optimizer steps."""

    def __init__(self, values: list[nn.Parameter]) -> None:
        self.values = values
        self.vector = torch.cat([value.detach().flatten() for value in values]).requires_grad_()
        start = 0
        for value in values:
            value.data = self.vector.detach()[start : start + value.numel()].view_as(value)
            start += value.numel()
        self.optimizer = optim.Adam([self.vector], lr=0.02)

    def step(self) -> None:
        self.vector.grad = torch.cat([value.grad.flatten() for value in self.values])
        self.optimizer.step()


class FlatWrapper(Optimizer):
    """As Flat, and an Optimizer that holds the vector: its hooks run, but it owns no subnet that anyone can see."""

    def __init__(self, values: list[nn.Parameter]) -> None:
        self.flat = Flat(values)
        super().__init__([self.flat.vector], {"lr": 0.02})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.flat.step()


def replaced_groups(values: list[nn.Parameter]) -> Any:
    """As apex and others do it: an optimizer made of S, whose groups then hold masters in its place."""
    made = Masters(values)
    optimizer = optim.Adam(values, lr=0.02)
    optimizer.param_groups[0]["params"] = made.masters
    made.optimizer = optimizer
    return made


ELSEWHERE: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "masters": Masters,
    "flat": Flat,
    "a flat wrapper": FlatWrapper,
    "groups replaced": replaced_groups,
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_steps_of_copies_that_are_said(name: str) -> None:
    """Without re-selections such an optimizer trains the subnets exactly, and t goes on."""
    model, twin = twins()
    mine, expected = ELSEWHERE[name](values_of(model)), ELSEWHERE[name](twin.parameters())
    for number in range(1, 8):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        losia_fx.stepped(model)
        expected.step()
        assert losia_fx.controller(model).step == number
        assert_subnets(model, twin)
    assert_one(model, twin)


# -- by hand, and not said: followed, and one warning that t stands still ------------------------------------------


@pytest.mark.parametrize("name", [*BY_HAND, *ELSEWHERE])
def test_steps_that_are_not_said_are_followed_and_named_once(name: str) -> None:
    """Forward, evaluation and checkpoint are right throughout; one warning comes within what would be a slot or so."""
    model, twin = twins(**MOVING)
    places = {name: (s.rows.clone(), s.cols.clone()) for name, s in subnets_of(model).items()}
    made = ELSEWHERE.get(name, lambda values: None)
    mine, expected = made(values_of(model)), made(twin.parameters())
    said: list[str] = []
    for number in range(5 * MOVING["period"]):
        with warned() as now:
            zero(model, twin)
            backward(model, twin)
            if mine is None:
                BY_HAND[name](values_of(model))
                BY_HAND[name](twin.parameters())
            else:
                mine.step()
                expected.step()
            if number % 4 == 3:
                assert_one(model, twin)
        said += now
        if number >= 2 * MOVING["period"]:
            assert said, "nothing is said of t standing still"
    assert len(said) == 1, said
    assert "stepped" in said[0]
    assert losia_fx.controller(model).step == 0
    for name, subnet in subnets_of(model).items():
        assert torch.equal(subnet.rows, places[name][0])
        assert torch.equal(subnet.cols, places[name][1])
    assert_one(model, twin)


def test_a_static_schedule_does_not_mind_that_t_stands_still() -> None:
    """There t decides nothing: either silence or the one warning, and the path is right."""
    model, twin = twins(period=2)
    with warned() as said:
        for _ in range(8):
            zero(model, twin)
            backward(model, twin)
            in_place(values_of(model))
            in_place(twin.parameters())
    assert len(said) <= 1
    assert_one(model, twin)


def test_what_is_profiled_meanwhile_does_not_pile_up() -> None:
    """Without a step that is said, gradients of one backward are not added to those of the next."""
    options = {"schedule": "sync", "importance": "mixed", "period": 100}
    model, twin = twins(**options)
    with warned():
        for _ in range(6):
            zero(model, twin)
            backward(model, twin)
            in_place(values_of(model))
            in_place(twin.parameters())
        zero(model, twin)
        ids = batch()
        plain = twin.solid().requires_grad_(True)
        loss_of(plain, ids).backward()
        backward(model, twin, ids)
    state = losia_fx.state_dict(model)
    for name in twin.values:
        close(state[f"{name}:grad"].double(), plain.get_parameter(name).grad, 1e-5, f"G of {name}")


def test_a_warning_does_not_come_when_every_step_is_said() -> None:
    model, _ = twins(**MOVING)
    for _ in range(4 * MOVING["period"]):
        model.zero_grad()
        loss_of(model, batch()).backward()
        in_place(values_of(model))
        losia_fx.stepped(model)
    assert losia_fx.controller(model).step == 12
    assert len(losia_fx.controller(model).history) == 4


def test_evaluations_and_repairs_are_not_taken_for_steps() -> None:
    """S moves back and forth between followed steps (a swap for validation): nothing is said, nothing counts."""
    model, twin = twins(**{**MOVING, "period": 20})
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for number in range(1, 9):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        expected.step()
        for factor in (0.5, 2.0):
            with torch.no_grad():
                for values in (values_of(model), twin.parameters()):
                    torch._foreach_mul_(values, factor)
            assert_one(model, twin)
        assert losia_fx.controller(model).step == number


# -- habits --------------------------------------------------------------------------------------------------------


def test_a_learning_rate_finder() -> None:
    """Steps of growing rate, then everything back as it was: weights, moments, and training as if it had not been."""
    model, twin = twins(**MOVING)
    start = copy.deepcopy(model.state_dict())
    held = [value.detach().clone() for value in values_of(model)]
    finder = optim.SGD(values_of(model), lr=1e-3)
    for number in range(2):
        model.zero_grad()
        loss_of(model, batch()).backward()
        finder.param_groups[0]["lr"] = 10.0**-number
        finder.step()
    for value, before in zip(values_of(model), held, strict=True):
        value.data.copy_(before)
    state = model.state_dict()
    for name, value in start.items():
        close(state[name], value, 0, name)
    assert_one(model, twin)


def test_a_learning_rate_finder_that_loads_what_it_saved() -> None:
    """Through state_dict and load_state_dict, as fastai's and Lightning's do."""
    model, twin = twins()
    saved = copy.deepcopy(model.state_dict())
    finder = optim.Adam(values_of(model), lr=0.1)
    for _ in range(3):
        model.zero_grad()
        loss_of(model, batch()).backward()
        finder.step()
    model.load_state_dict(saved)
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(3):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        expected.step()
    assert_one(model, twin)


def test_evolution_strategies() -> None:
    """Perturb, evaluate, undo: no gradients at all; every evaluation sees its own perturbation."""
    model, twin = twins()
    with torch.no_grad(), warned():
        for _ in range(4):
            noise = [torch.randn_like(value) for value in values_of(model)]
            for scale in (0.1, -0.2, 0.1):
                for values in (values_of(model), twin.parameters()):
                    torch._foreach_add_(values, noise, alpha=scale)
                ids = batch()
                close(model(ids), twin(ids), 1e-9, "logits")


def test_zeroth_order_by_a_vector() -> None:
    """MeZO's way: the same noise from a seed, added and taken away through .data."""
    model, twin = twins()

    def perturb(values: list[nn.Parameter], scale: float) -> None:
        generator = torch.Generator().manual_seed(5)
        for value in values:
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.data = value.data + scale * noise

    with torch.no_grad(), warned():
        for _ in range(3):
            losses: list[list[Tensor]] = [[], []]
            ids = batch()
            for scale in (1e-2, -2e-2):
                for found, call, values in (
                    (losses[0], model, values_of(model)), (losses[1], twin, twin.parameters()),
                ):  # fmt: skip
                    perturb(values, scale)
                    found.append(loss_of(call, ids))
            close(torch.stack(losses[0]), torch.stack(losses[1]), 1e-9, "losses")
            slope = float(losses[1][0] - losses[1][1]) / 2e-2
            for values in (values_of(model), twin.parameters()):
                perturb(values, 1e-2 - 0.01 * slope)
    assert_one(model, twin)


def test_gradient_descent_with_a_line_search() -> None:
    """Several trial points a step, each evaluated with gradients off; the last one stays."""
    model, twin = twins()
    for _ in range(3):
        ids = batch()
        zero(model, twin)
        backward(model, twin, ids)
        held = [value.detach().clone() for value in values_of(model)]
        for rate in (4.0, 1.0, 0.25):
            for values in (values_of(model), twin.parameters()):
                with torch.no_grad():
                    for value, before in zip(values, held, strict=True):
                        value.copy_(before - rate * value.grad)
            with torch.no_grad(), warned():
                close(loss_of(model, ids), loss_of(twin, ids), 1e-9, "loss at a trial point")
    assert_one(model, twin)


def test_torch_func_over_the_subnets() -> None:
    """grad() of a function of S by functional_call: a swapped S reaches the product through W."""
    model, twin = twins()
    name = "head.weight"
    key = next(k for k, p in model.named_parameters() if p is subnets_of(model)[name].values)
    ids = batch()

    def mine(values: Tensor) -> Tensor:
        return loss_of(lambda given: torch.func.functional_call(model, {key: values}, (given,)), ids)

    def expected(values: Tensor) -> Tensor:
        whole = twin.base[name].index_put(twin.places[name], values)
        return loss_of(lambda given: twin(given) if values is None else _with(twin, name, whole, given), ids)

    other = (twin.values[name].detach() * 1.5).requires_grad_()
    found = torch.autograd.grad(mine(other), other)[0]
    wanted = torch.autograd.grad(expected(other), other)[0]
    close(found, wanted, 1e-9, "gradient to the swapped S")
    with warned():  # that call ran uncompiled
        assert_one(model, twin)


def _with(twin: Twin, name: str, weight: Tensor, ids: Tensor) -> Any:
    return torch.func.functional_call(twin.plain, {**twin.weights(), name: weight}, (ids,))


def test_the_pairs_period_is_that_of_these_tests() -> None:
    assert PERIOD == MOVING["period"]
    assert issubclass(LosiaWarning, UserWarning)
