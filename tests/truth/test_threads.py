"""One thread trains while another evaluates, saves, or trains another model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn, optim

import losia_fx
from losia_fx.runtime.steps import STEPPING
from tests.support.toys import batch
from tests.support.twin import Twin, assert_one, loss_of, subnets_of, twins, values_of, zero

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

MOVING: dict[str, Any] = {"schedule": "async", "importance": "random", "period": 3, "rewarm": True}


class Slow(optim.SGD):
    """A step in the midst of which another thread has a turn."""

    turn: Callable[[], Any] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in held]
        for part in (held[:2], held[2:]):
            for p, grad in zip(held, grads, strict=True):
                p.grad = grad if any(p is each for each in part) else None
            super().step()
            if self.turn is not None:
                self.turn()
        for p, grad in zip(held, grads, strict=True):
            p.grad = grad


def in_a_thread(run: Callable[[], Any]) -> None:
    """Runs it to its end in another thread, which must not fail."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(60)
    assert not failed, failed
    assert not thread.is_alive()


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model(batch())


USES: dict[str, Callable[[nn.Module], Any]] = {
    "evaluates": evaluate,
    "saves": lambda model: model.state_dict(),
    "saves the losia state": losia_fx.state_dict,
    "calls a part": lambda model: model.head(torch.zeros(1, 16, dtype=torch.float64)),
    "copies": copy.deepcopy,
}


@pytest.mark.parametrize("use", USES)
def test_a_use_in_the_midst_of_another_threads_step(use: str) -> None:
    """S is the optimizer's until the step is made: nobody else takes it for written, or forgets what was before."""
    model, _ = twins(**MOVING)
    quiet = copy.deepcopy(model)
    mine, other = (Slow(values_of(each), lr=0.1) for each in (model, quiet))
    for number in range(1, 9):
        for each, optimizer in ((model, mine), (quiet, other)):
            torch.manual_seed(number)
            optimizer.zero_grad()
            loss_of(each, batch()).backward()
            optimizer.turn = None if each is quiet else lambda: in_a_thread(lambda: USES[use](model))
            optimizer.step()
        assert losia_fx.controller(model).step == number
        for (name, one), two in zip(subnets_of(model).items(), subnets_of(quiet).values(), strict=True):
            assert torch.equal(one.values, two.values), name
            assert torch.equal(one.weight, two.weight), name
    assert losia_fx.controller(model).history


@contextmanager
def beside(use: Callable[[], Any]) -> Iterator[None]:
    """``use``, again and again, in another thread."""
    ends = threading.Event()

    def again() -> None:
        while not ends.is_set():
            use()
            ends.wait(0.0005)

    thread = threading.Thread(target=lambda: in_a_thread(again))
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join(60)


def optimizers_of(model: nn.Module, twin: Twin) -> tuple[Any, Any]:
    # Adam asks whether anybody is compiling, in any thread, and then computes in another width.
    return optim.SGD(values_of(model), lr=0.1, momentum=0.9), optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, twin: Twin, optimizers: tuple[Any, Any], steps: int) -> None:
    for _ in range(steps):
        zero(model, twin)
        ids = batch()
        loss_of(model, ids).backward()
        loss_of(twin, ids).backward()
        for optimizer in optimizers:
            optimizer.step()
        twin.follow(subnets_of(model), optimizers[1])


@pytest.mark.parametrize("use", ["evaluates", "saves"])
def test_uses_beside_the_training(use: str) -> None:
    model, twin = twins(**{**MOVING, "rewarm": False})
    optimizers = optimizers_of(model, twin)
    train(model, twin, optimizers, 2)
    with beside(lambda: USES[use](model)):
        train(model, twin, optimizers, 40)
    assert_one(model, twin)
    assert losia_fx.controller(model).step == 42


def test_two_threads_train_two_models() -> None:
    pairs = [twins(**{**MOVING, "rewarm": False}) for _ in range(2)]

    def run(model: nn.Module, twin: Twin) -> None:
        train(model, twin, optimizers_of(model, twin), 12)

    threads = [threading.Thread(target=lambda pair=pair: in_a_thread(lambda: run(*pair))) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for model, twin in pairs:
        assert losia_fx.controller(model).step == 12
        assert_one(model, twin)


def test_a_step_that_failed_in_another_thread_holds_nobody_up() -> None:
    model, _ = twins(**MOVING)
    optimizer = Slow(values_of(model), lr=0.1)

    def fail() -> None:
        raise RuntimeError("in the midst")

    def run() -> None:
        loss_of(model, batch()).backward()
        optimizer.turn = fail
        with pytest.raises(RuntimeError, match="in the midst"):
            optimizer.step()

    in_a_thread(run)
    evaluate(model)
    for name, subnet in subnets_of(model).items():
        assert torch.equal(subnet.weight[subnet.rows][:, subnet.cols], subnet.values), name
    assert losia_fx.controller(model).step == 0


class Outside(nn.Module):
    """A layer that no graph holds, with something to do in its midst."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, dtype=torch.float64)
        self.midst: Callable[[], Any] | None = None

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.midst is not None and not torch.is_grad_enabled():
            self.midst()
        return self.linear(x)


def test_a_training_forward_in_the_midst_of_another_threads_evaluation() -> None:
    """What runs outside of graphs goes through the subnets, although the evaluation wants the modules' plain calls."""
    model: Any = nn.Module()
    model.layers = nn.ModuleList(Outside() for _ in range(2))
    model.forward = lambda x: model.layers[1](model.layers[0](x)).square().mean()
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, schedule="static")
    values, x = values_of(model), torch.randn(4, 16, dtype=torch.float64)
    optimizer = optim.SGD(values, lr=0.0)
    with pytest.warns(losia_fx.LosiaWarning, match="outside a rewritten graph"):
        model(x).backward()
    optimizer.step()
    expected = [each.grad.clone() for each in values if each.grad is not None]
    optimizer.zero_grad()
    within, done = threading.Event(), threading.Event()

    def stay() -> None:
        within.set()
        assert done.wait(30)

    model.layers[0].midst = stay
    evaluation = threading.Thread(target=lambda: torch.no_grad()(model)(x))
    evaluation.start()
    assert within.wait(30)
    model(x).backward()
    done.set()
    evaluation.join(30)
    assert len(expected) == len(values) == 2
    for each, grad in zip(values, expected, strict=True):
        torch.testing.assert_close(each.grad, grad, rtol=1e-12, atol=1e-15)


def test_a_thread_that_has_ended_is_forgotten() -> None:
    """Each forward of a part would else wait for threads that are long gone."""
    model, _ = twins()
    optimizer, idents = optim.SGD(values_of(model), lr=0.1), []

    def train() -> None:
        idents.append(threading.get_ident())
        loss_of(model, batch()).backward()
        optimizer.step()
        assert idents[0] in STEPPING

    in_a_thread(train)
    assert losia_fx.controller(model).step == 1
    assert idents[0] not in STEPPING
