"""Ctrl-C, or no memory, anywhere: the next use mends the model, what is saved loads, nothing is left switched on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils.checkpoint import checkpoint

import losia_fx
from tests.support.optimizers import Failing
from tests.support.toys import Toy, batch
from tests.support.twin import Twin, assert_one, backward, close, loss_of, subnets_of, twins, values_of, warned, zero
from tests.truth.interrupts import Interrupter, assert_agree, assert_nothing_leaks, lines_of

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

MOVING: dict[str, Any] = {"schedule": "async", "period": 3, "rewarm": False}
ERRORS = (KeyboardInterrupt, MemoryError)


def sgd(parameters: Iterable[Tensor]) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """W of every subnet as a checkpoint has it now."""
    state = model.state_dict()
    return {name: state[name].clone() for name in subnets_of(model)}


def assert_saved_state_loads(model: nn.Module, where: str) -> None:
    """Both parts of a checkpoint made now, into another model, which takes a step and computes the same."""
    state, weights = losia_fx.state_dict(model), copy.deepcopy(model.state_dict())
    other = losia_fx.transform(Toy(layers=1).double(), **_options(model))
    losia_fx.load_state_dict(other, state)
    other.load_state_dict(weights)
    for value in values_of(other):
        value.grad = torch.zeros_like(value)
    sgd(values_of(other)).step()  # which raises where the two do not belong together
    ids = batch()
    with torch.no_grad():
        close(other(ids), model(ids), 1e-12, f"{where}: logits of the model that was loaded")


def _options(model: nn.Module) -> dict[str, Any]:
    config = losia_fx.controller(model).config
    names = ("rank_factor", "output_rank_factor", "period", "schedule", "importance", "rewarm", "compiler")
    return {name: getattr(config, name) for name in names}


def points(total: int, count: int) -> list[int]:
    """Some of the numbers from 1 to ``total``, the first and the last among them."""
    return sorted({1 + round(number * (total - 1) / (count - 1)) for number in range(count)})


# -- around a step -------------------------------------------------------------------------------------------------


def at_step(number: int, **options: Any) -> tuple[nn.Module, Twin, optim.Optimizer, optim.Optimizer]:
    """A model before its ``number``-th step, with its gradients there. With a period of 3, a subnet moves in step 3."""
    model, twin = twins(**{**MOVING, **options})
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(number - 1):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        expected.step()
        twin.follow(subnets_of(model))
    zero(model, twin)
    backward(model, twin)
    return model, twin, mine, expected


@pytest.mark.parametrize(
    ("importance", "number", "count", "error"),
    [
        ("mixed", 2, 12, KeyboardInterrupt),
        ("mixed", 3, 24, KeyboardInterrupt),
        ("random", 3, 24, MemoryError),
        *(
            pytest.param(importance, 3, 10_000, error, marks=pytest.mark.slow)
            for importance in ("mixed", "random")
            for error in ERRORS
        ),
    ],
)
def test_a_step_that_is_cut_short(importance: str, number: int, count: int, error: type[BaseException]) -> None:
    """In any line of ours before and after the optimizer's own: each weight is as before the step, or as after it.

    In step 3 importance is taken, a slot ends and a group moves; the numbers that S held stay in W wherever it is.
    """
    options = {"importance": importance}
    model, twin, mine, expected = at_step(number, **options)
    start = weights_of(model)
    expected.step()
    whole = {name: weight.detach() for name, weight in twin.weights().items()}
    blank = copy.deepcopy(model)  # never run: nothing in it has to be compiled before it is asked
    gradients = [value.grad for value in values_of(model)]
    total = lines_of(mine.step)
    assert total > 50
    for at in points(total, count):
        model = copy.deepcopy(blank)
        mine = sgd(values_of(model))
        for value, grad in zip(values_of(model), gradients, strict=True):
            value.grad = grad.clone()
        cut = Interrupter(at, error)
        if not cut(mine.step):
            continue  # a line that runs the first time alone
        assert_nothing_leaks(model, cut.where)
        assert losia_fx.controller(model).step in (number - 1, number), cut.where
        found = weights_of(model)
        assert_agree(model, cut.where)
        sides = set()
        for name, weight in found.items():
            before, after = (
                torch.equal(weight, start[name]),
                torch.allclose(weight, whole[name], rtol=1e-12, atol=1e-14),
            )
            assert before or after, f"{cut.where}: {name} is neither as before nor as after the step"
            sides.add("before" if before else "after")
        assert len(sides) == 1, f"{cut.where}: some weights are as before the step and some as after it"
        assert_saved_state_loads(model, cut.where)


@pytest.mark.parametrize("error", ERRORS)
def test_training_goes_on_after_every_kind_of_cut(error: type[BaseException]) -> None:
    """One model, cut again and again at lines from first to last; each time the next steps are ordinary ones."""
    model, twin, mine, expected = at_step(1, importance="mixed")
    for at in points(900, 31):
        cut = Interrupter(at, error)
        cut(mine.step)
        assert_nothing_leaks(model, cut.where)
        with torch.no_grad():
            model(batch())
        # the twin takes whatever came of it as its new beginning
        twin.follow(losia_fx.subnets(model))
        for name, weight in weights_of(model).items():
            twin.write(name, weight)
        for _ in range(2):
            zero(model, twin)
            backward(model, twin)
            steps = losia_fx.controller(model).step
            mine.step()
            expected.step()
            assert losia_fx.controller(model).step == steps + 1, cut.where
            twin.follow(subnets_of(model))
        assert_one(model, twin)
        zero(model, twin)
        backward(model, twin)
    assert len(losia_fx.controller(model).history) > 10


def test_rewarming_is_not_lost() -> None:
    """A cut in a step that is rewarmed: S is where it was, or where a whole or a rewarmed step has brought it."""
    model, twin, mine, _ = at_step(4, importance="random", rewarm=True)
    name = losia_fx.controller(model).groups[losia_fx.controller(model).history[-1].group][0]
    before = subnets_of(model)[name].values.detach().clone()
    grad = twin.values[name].grad
    assert grad is not None
    blank = copy.deepcopy(model)
    gradients = [value.grad for value in values_of(model)]
    total = lines_of(mine.step)
    for at in points(total, 20):
        model = copy.deepcopy(blank)
        for value, given in zip(values_of(model), gradients, strict=True):
            value.grad = given.clone()
        cut = Interrupter(at)
        cut(sgd(values_of(model)).step)
        value = losia_fx.subnets(model)[name].values.detach()
        shares = [share for share in (0.0, 1 / 3, 1.0) if torch.allclose(value, before - share * 0.1 * grad, rtol=1e-9)]
        assert shares, f"{cut.where}: S is in no place that it could be"
        assert_agree(model, cut.where)


@pytest.mark.parametrize("error", ERRORS)
def test_an_optimizer_that_is_cut_short_itself(error: type[BaseException]) -> None:
    """Some of its parameters are stepped: that is what the model computes with, saves and goes on from."""
    model, twin = twins(**MOVING)
    mine, expected = Failing(values_of(model), 0.1), Failing(twin.parameters(), 0.1)
    for number in range(1, 8):
        zero(model, twin)
        backward(model, twin)
        if number % 2:
            for optimizer in (mine, expected):
                optimizer.fails = error()
                with pytest.raises(error):
                    optimizer.step()
                optimizer.fails = None
            assert_nothing_leaks(model)
            state = model.state_dict()  # the next use
            for name, weight in twin.weights().items():
                close(state[name], weight.detach(), 1e-12, name)
            assert_saved_state_loads(model, "in the optimizer")
            zero(model, twin)
            backward(model, twin)
        mine.step()
        expected.step()
        assert losia_fx.controller(model).step == number
        twin.follow(subnets_of(model))
    assert_one(model, twin)


def test_a_step_said_by_hand_that_is_cut_short() -> None:
    model, _, _, _ = at_step(3, importance="mixed")
    blank, gradients = copy.deepcopy(model), [value.grad for value in values_of(model)]

    def step(model: nn.Module) -> None:
        with torch.no_grad():
            for value, grad in zip(values_of(model), gradients, strict=True):
                value.grad = grad.clone()
                value.sub_(0.1 * grad)

    step(model)
    total = lines_of(lambda model=model: losia_fx.stepped(model))
    for at in points(total, 20):
        model = copy.deepcopy(blank)
        step(model)
        after = [value.detach().clone() for value in values_of(model)]
        rows = {name: subnet.rows.clone() for name, subnet in subnets_of(model).items()}
        cut = Interrupter(at)
        cut(lambda model=model: losia_fx.stepped(model))
        assert_nothing_leaks(model, cut.where)
        found = weights_of(model)
        assert_agree(model, cut.where)
        for (name, subnet), values in zip(subnets_of(blank).items(), after, strict=True):
            block = found[name][rows[name]][:, subnet.cols]
            close(block, values, 1e-12, f"{cut.where}: what the step has made of {name}")
        assert_saved_state_loads(model, cut.where)


# -- elsewhere -----------------------------------------------------------------------------------------------------


def test_a_selection_by_hand_that_is_cut_short() -> None:
    """W holds all the numbers throughout; the subnet is in its old place or in its new one."""
    model, _ = twins(importance="random", schedule="async", period=50)
    with torch.no_grad():
        for value in values_of(model):
            value.add_(1)
    wanted = weights_of(model)
    blank = copy.deepcopy(model)
    total = lines_of(lambda model=model: losia_fx.controller(model).select(1))
    for at in points(total, 16):
        model = copy.deepcopy(blank)
        cut = Interrupter(at)
        cut(lambda model=model: losia_fx.controller(model).select(1))
        for name, weight in weights_of(model).items():
            assert torch.equal(weight, wanted[name]), f"{cut.where}: {name}"
        assert_agree(model, cut.where)
        assert_saved_state_loads(model, cut.where)


def test_a_load_that_is_cut_short_can_be_done_again() -> None:
    """Of the LoSiA state, and of weights: the second time all is as if the first had not been."""
    model, _, optimizer, _ = at_step(4, importance="mixed")
    optimizer.step()
    state, weights = losia_fx.state_dict(model), copy.deepcopy(model.state_dict())
    other = losia_fx.transform(Toy(layers=1).double(), **_options(model), seed=9)
    for what in (lambda: losia_fx.load_state_dict(other, state), lambda: other.load_state_dict(weights)):
        total = lines_of(what)
        for at in points(total, 12):
            cut = Interrupter(at)
            cut(what)
            losia_fx.load_state_dict(other, state)
            other.load_state_dict(weights)
            assert_agree(other, cut.where)
            for name, subnet in losia_fx.subnets(model).items():
                assert torch.equal(subnet.rows, losia_fx.subnets(other)[name].rows), cut.where
                assert torch.equal(subnet.values, losia_fx.subnets(other)[name].values), cut.where


def test_a_save_that_is_cut_short_changes_nothing() -> None:
    model, twin, _, _ = at_step(4, importance="mixed")
    for what in (lambda: losia_fx.state_dict(model), model.state_dict, lambda: losia_fx.report(model)):
        for at in points(lines_of(what), 8):
            cut = Interrupter(at)
            cut(what)
            assert_nothing_leaks(model, cut.where)
    zero(model, twin)
    assert_one(model, twin)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_forward_that_is_cut_short_in_our_lines(gradients: bool) -> None:
    """Also just after S was written from elsewhere. What is left switched on is off again with the next use."""
    model, twin = twins()
    model(batch())  # compiled from here on
    with torch.no_grad():
        model(batch())

    def call() -> None:
        with torch.set_grad_enabled(gradients), torch.no_grad() if not gradients else torch.enable_grad():
            model(batch())

    for at in points(max(lines_of(call), 24), 24):
        with torch.no_grad():
            for values in (values_of(model), twin.parameters()):
                torch._foreach_mul_(values, -1.0)
        cut = Interrupter(at)
        with warned():
            cut(call)
            assert_one(model, twin)
        assert_nothing_leaks(model, cut.where)


# -- in the model's own code ---------------------------------------------------------------------------------------


class Stopping(nn.Module):
    """Passes its input on, until it is told to raise."""

    def __init__(self) -> None:
        super().__init__()
        self.error: type[BaseException] | None = None

    @torch.compiler.disable
    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def forward(self, x: Tensor) -> Tensor:
        self.check()
        return x


def stopping(where: str, **options: Any) -> tuple[nn.Module, Twin, Stopping]:
    """A model with such a module somewhere, which breaks its graph."""
    plain = Toy(layers=2).double()
    stop = Stopping()
    if where == "in an mlp":
        plain.layers[1].mlp.up = nn.Sequential(stop, plain.layers[1].mlp.up)
    elif where == "after the head":
        plain.head = nn.Sequential(plain.head, stop)
        plain.get_output_embeddings = lambda: plain.head[0]
    else:
        plain.norm = nn.Sequential(plain.norm, stop)
    twin_of = copy.deepcopy(plain)
    with warned():
        model = losia_fx.transform(plain, compiler="eager", rank_factor=0.25, output_rank_factor=0.25, **options)
    return model, Twin(twin_of, losia_fx.subnets(model)), stop


@pytest.mark.parametrize("error", [*ERRORS, RuntimeError, SystemExit])
@pytest.mark.parametrize("where", ["in an mlp", "before the head", "after the head"])
def test_an_interrupt_in_a_module_outside_of_the_graph(where: str, error: type[BaseException]) -> None:
    model, twin, stop = stopping(where, schedule="static")
    calls: list[Callable[[], Any]] = [
        lambda: model(batch()),
        lambda: model.forward(batch()),
        lambda: model.layers[1](torch.randn(2, 3, 16, dtype=torch.float64)),
        lambda: checkpoint(model, batch(), use_reentrant=False),
    ]
    with warned():  # of modules that run outside of a graph
        for call in calls:
            for _ in range(2):
                stop.error = error
                try:
                    call()
                except error:
                    pass
                stop.error = None
                assert_nothing_leaks(model, f"{where}, {error.__name__}")
        mine, expected = sgd(values_of(model)), sgd(twin.parameters())
        for _ in range(2):
            zero(model, twin)
            backward(model, twin)
            mine.step()
            expected.step()
        assert_one(model, twin)


@pytest.mark.parametrize("error", [*ERRORS, RuntimeError])
def test_an_interrupt_in_the_backward(error: type[BaseException]) -> None:
    """In a hook on a gradient, while a group is being profiled: the next backward starts anew."""
    options = {"schedule": "sync", "importance": "mixed", "period": 50}
    model, twin = twins(**options)
    value = values_of(model)[0]
    armed = [True]

    def stop(grad: Tensor) -> None:
        if armed[0]:
            raise error

    value.register_hook(stop)
    with pytest.raises(error):
        loss_of(model, batch()).backward()
    armed[0] = False
    assert_nothing_leaks(model)
    zero(model, twin)
    ids = batch()
    backward(model, twin, ids)
    plain = twin.solid().requires_grad_(True)
    loss_of(plain, ids).backward()
    state = losia_fx.state_dict(model)
    for name in twin.values:
        close(state[f"{name}:grad"].double(), plain.get_parameter(name).grad, 1e-5, f"G of {name}")


def test_an_interrupt_while_weights_are_asked_for_gradients() -> None:
    """None of them goes on requiring grad, wherever it comes."""
    model, twin = twins()
    loss_of(model, batch()).backward()
    at = 1
    while True:
        cut = Interrupter(at, only=("ask_for_gradients",))
        if not cut(lambda: model(batch())):
            break
        assert_nothing_leaks(model, cut.where)
        at += 1
    assert at > len(twin.values)
    zero(model, twin)
    backward(model, twin)
    assert_one(model, twin)


def test_an_interrupt_while_the_first_graph_is_compiled() -> None:
    """In any of our lines that a compiler calls: the next forward compiles again."""
    for at in points(2000, 8):
        torch._dynamo.reset()
        model, twin = twins()
        cut = Interrupter(at)
        wrapped: Exception | None = None
        try:
            cut(lambda model=model: model(batch()))
        except Exception as error:  # torch wraps what a backend raises
            wrapped = error
        assert cut.where or wrapped is None
        if "stop_asking" not in cut.where:  # cut while it switched off what was left on
            assert_nothing_leaks(model, cut.where)
        with warned():
            backward(model, twin)
            zero(model, twin)
            assert_one(model, twin)
        assert_nothing_leaks(model, cut.where)
        if not cut.where:
            return
