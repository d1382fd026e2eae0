"""Optimizers around optimizers, stale ones, ones that make state at birth: a step counts once, and is exact."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.amp import GradScaler
from torch.optim import Optimizer

import losia_fx
from losia_fx import OptimizerError
from tests.support.optimizers import (
    Chained,
    Clipping,
    Failing,
    Passing,
    Sam,
    TimmLookahead,
    Twice,
)
from tests.support.pair import PERIOD, Pair
from tests.support.toys import Toy, batch
from tests.support.twin import (
    Twin,
    assert_one,
    assert_subnets,
    backward,
    close,
    logits,
    loss_of,
    subnets_of,
    twins,
    values_of,
    warned,
    zero,
)

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

MOVING: dict[str, Any] = {"schedule": "async", "importance": "random", "period": 3, "rewarm": False}
Make = Callable[[Iterable[Tensor]], Optimizer]


def adamw(parameters: Iterable[Tensor]) -> Optimizer:
    return optim.AdamW(parameters, lr=5e-3)


def momentum(parameters: Iterable[Tensor]) -> Optimizer:
    return optim.SGD(parameters, lr=0.1, momentum=0.9)


def lookahead(optimizer: Optimizer, **options: Any) -> Optimizer:
    made: Optimizer = pytest.importorskip("pytorch_optimizer").Lookahead(optimizer, **options)
    return made


# -- a step is what the outermost optimizer did: against the eager reference ---------------------------------------

WRAPPED: dict[str, Make] = {
    "passing": lambda p: Passing(adamw(p)),
    "passing under a usual name": lambda p: Passing(adamw(p), "optimizer"),
    "passing under a private name": lambda p: Passing(adamw(p), "_inner_optimizer"),
    "passing twice": lambda p: Passing(Passing(momentum(p)), "optimizer"),
    "two steps in one": lambda p: Twice(momentum(p)),
    "chained": lambda p: Chained(adamw(p)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_count_once(name: str) -> None:
    Pair(WRAPPED[name]).rounds()


@pytest.mark.parametrize("around", ["nothing", "accelerate", "passing"])
def test_lookahead(around: str) -> None:
    """Of pytorch_optimizer; its slow copy of a subnet that has moved is the new subnet, its count goes on."""
    pair = Pair(adamw)
    pair.optimizer = lookahead(pair.optimizer, k=2)

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        made = lookahead(adamw(parameters), k=2)
        done = pair.reference.steps + bool(pair.reference.steps)  # it is made within a step
        for group in made.param_groups:
            group["counter"] = done % 2
        return made

    for weight in pair.reference.weights.values():
        weight.make = make
        weight.gather()
    outer: Any = pair.optimizer
    if around == "accelerate":
        outer = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(outer)
    elif around == "passing":
        outer = Passing(outer, "wrapped")
    pair.rounds(3, take=outer.step)


def test_the_references_of_trac_are_of_the_new_places() -> None:
    """pytorch_optimizer's keeps them by parameter, in one entry of the state of the optimizer within, and writes
    parameters from them; with a rate of nothing no weight may change."""
    trac: Any = pytest.importorskip("pytorch_optimizer").TRAC
    model, twin = twins(**MOVING)
    optimizer = trac(optim.AdamW(values_of(model), lr=1e-12, weight_decay=0.0))
    for _ in range(8):
        zero(model, twin)
        backward(model, twin)
        optimizer.step()
        twin.follow(subnets_of(model))
    assert len(losia_fx.controller(model).history) >= 2
    assert_one(model, twin)


class OwnMomentum(optim.Optimizer):
    """SGD with a momentum of 0.9, which it keeps beside its state."""

    def __init__(self, parameters: Iterable[nn.Parameter], kept: str) -> None:
        super().__init__(list(parameters), {"lr": 0.02})
        self.order = [p for group in self.param_groups for p in group["params"]]
        buffers = [torch.zeros_like(p) for p in self.order]
        keys = {"by parameter": self.order, "by id": [id(p) for p in self.order]}
        self.buffers: Any = dict(zip(keys[kept], buffers, strict=True)) if kept in keys else buffers
        if kept == "of each group":
            self.buffers = [buffers]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        kept = list(self.buffers.values()) if isinstance(self.buffers, dict) else self.buffers
        for p, buffer in zip(self.order, kept[0] if isinstance(kept[0], list) else kept, strict=True):
            p.sub_(buffer.mul_(0.9).add_(p.grad), alpha=0.02)


@pytest.mark.parametrize("kept", ["in a list", "of each group", "by parameter", "by id"])
def test_moments_that_an_optimizer_keeps_beside_its_state(kept: str) -> None:
    """They start anew where a subnet moves, as those in its state do, and are not taken for copies of weights."""
    model, _ = twins(**MOVING)
    other = copy.deepcopy(model)
    mine, expected = OwnMomentum(values_of(model), kept), optim.SGD(values_of(other), lr=0.02, momentum=0.9)
    for _ in range(8):
        ids = batch()
        for each, optimizer in ((model, mine), (other, expected)):
            each.zero_grad()
            loss_of(each, ids).backward()
            optimizer.step()
    assert len(losia_fx.controller(model).history) >= 2
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        close(one, two, 1e-12, name)


class Kept(optim.SGD):
    """SGD that keeps tensors for its parameters, in a tuple."""

    def __init__(self, parameters: Iterable[nn.Parameter], kept: Iterable[Tensor]) -> None:
        super().__init__(list(parameters), lr=0.02)
        self.kept = tuple(kept)


def test_what_an_optimizer_keeps_that_is_neither_a_moment_nor_a_copy_stays() -> None:
    """A mask for each element, made in the constructor."""
    model, _ = twins(**MOVING)
    optimizer = Kept(values_of(model), [torch.ones_like(v) / 2 for v in values_of(model)])
    for _ in range(7):
        model.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
    assert len(losia_fx.controller(model).history) >= 2
    assert all((mask == 0.5).all() for mask in optimizer.kept)


@pytest.mark.parametrize("views", [False, True], ids=["parameters", "views of them"])
def test_a_model_that_an_optimizer_keeps_for_reference_is_nothing_of_its_own(views: bool) -> None:
    """FedProx: its subnets are no slow weights of the model that is trained."""
    model, _ = twins(**MOVING)
    reference = copy.deepcopy(model)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    optimizer = Kept(values_of(model), [v.detach() if views else v for v in values_of(reference)])
    with warned():
        for _ in range(7):
            model.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()
    assert len(losia_fx.controller(model).history) >= 2
    for name, value in reference.state_dict().items():
        close(value, before[name], 0.0, name)


def test_tensors_that_an_optimizer_makes_later_beside_its_state_are_said() -> None:
    model, _ = twins(**MOVING)
    optimizer = Kept(values_of(model), ())
    with warned() as said:
        for _ in range(7):
            model.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()
            if not optimizer.kept:
                optimizer.kept = tuple(torch.randn_like(v) for v in values_of(model))
    assert len(said) == 1, said
    assert "Kept keeps tensors for the subnets beside its state" in said[0]


def test_several_optimizers_in_one() -> None:
    """The head by descent, the blocks by AdamW, behind one step()."""
    pair = Pair(adamw)
    head = pair.subnets["head.weight"].values
    of_head = pair.reference.weights["head.weight"]
    of_head.make = momentum
    of_head.gather()
    pair.optimizer = Chained(adamw([v for v in pair.values() if v is not head]), momentum([head]))
    pair.rates = lambda name: 0.1 if name == "head.weight" else 5e-3
    pair.rounds()


@pytest.mark.parametrize("name", ["passing", "two steps in one"])
def test_a_wrapper_with_a_closure(name: str) -> None:
    """The closure runs within: once, or once for each step within, as the reference's does."""
    pair = Pair(WRAPPED["passing"] if name == "passing" else lambda p: Passing(momentum(p)))
    for _ in pair.steps():
        ids = batch()

        def closure(ids: Tensor = ids) -> Tensor:
            pair.optimizer.zero_grad()
            loss = pair.losses(ids)[0]
            loss.backward()
            return loss

        pair.losses(ids)[1].backward()
        pair.finish(lambda closure=closure: pair.optimizer.step(closure))


def test_a_wrapper_in_a_scaler() -> None:
    """GradScaler.step(wrapper), some steps left out for an overflow: those do not count."""
    pair = Pair(lambda p: Passing(momentum(p)))
    scaler, left_out = GradScaler("cpu", init_scale=4.0), 0
    for number in pair.steps():
        if number % 3 == 1:
            with torch.no_grad():
                before = {name: s.values.clone() for name, s in pair.subnets.items()}
            scaler.scale(loss_of(pair.model, batch()) * float("inf")).backward()
            scaler.step(pair.optimizer)
            scaler.update()
            pair.model.zero_grad()
            assert all(torch.equal(before[name], s.values) for name, s in pair.subnets.items())
            left_out += 1
        mine, expected = pair.losses(batch())
        scaler.scale(mine).backward()
        expected.backward()

        def take() -> None:
            scaler.step(pair.optimizer)
            scaler.update()

        pair.finish(take)
    assert left_out


# -- against a twin ------------------------------------------------------------------------------------------------


class Run:
    """A model and its twin with an optimizer each; subnets that move start anew with what a constructor gives."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Any], **options: Any) -> None:
        self.make = make
        self.model, self.twin = twins(**options)
        self.mine, self.expected = make(values_of(self.model)), make(self.twin.parameters())
        self.moved: list[str] = []

    def follow(self) -> None:
        """Moves the twin's subnets too. What is kept of each is made again as for a parameter that is new."""
        moved = self.twin.follow(subnets_of(self.model))
        self.moved += moved
        for name in moved:
            value = self.twin.values[name]
            for optimizer, fresh in zip(layers(self.expected), layers(self.make([value])), strict=True):
                optimizer.state.pop(value, None)
                if value in fresh.state:
                    optimizer.state[value] = fresh.state[value]

    def train(self, steps: int, tolerance: float = 1e-9) -> None:
        for _ in range(steps):
            zero(self.model, self.twin)
            backward(self.model, self.twin, tolerance=tolerance)
            for value, own in zip(self.twin.parameters(), values_of(self.model), strict=True):
                value.grad = own.grad.clone()  # a last bit may turn what an optimizer decomposes
            chance = torch.get_rng_state()
            self.mine.step()
            torch.set_rng_state(chance)
            self.expected.step()
            self.follow()


def layers(optimizer: Any) -> list[Any]:
    """An optimizer and those within, outermost first."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return [optimizer, *(each for value in inner for each in layers(value))]


@pytest.mark.parametrize("options", [{}, MOVING], ids=["still", "moving"])
def test_a_lookahead_whose_step_has_no_hooks(options: dict[str, Any]) -> None:
    """What it does after the step within is followed at the next use; steps count once."""
    run = Run(lambda p: TimmLookahead(adamw(p), k=5), **options)
    for number in range(1, 13):
        run.train(1)
        assert losia_fx.controller(run.model).step == number
    assert_one(run.model, run.twin)
    assert bool(run.moved) == bool(options)


@pytest.mark.parametrize("options", [{}, MOVING], ids=["still", "moving"])
@pytest.mark.parametrize("kind", ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"])
def test_a_wrapper_that_is_no_optimizer(kind: str, options: dict[str, Any]) -> None:
    """It swaps other numbers in for the step within, and what it keeps of them it wants back afterwards: a subnet moves
    elsewhere at the next use only."""
    package = pytest.importorskip("schedulefree")

    def make(parameters: Any) -> Any:
        made = getattr(package, kind)(optim.SGD(parameters, lr=0.05), momentum=0.9)
        made.train()
        return made

    model, twin = twins(**options)
    mine, expected = make(values_of(model)), make(twin.parameters())
    for number in range(1, 10):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        expected.step()
        assert losia_fx.controller(model).step == number
        if number % 2:
            for each in (mine, expected):
                each.eval()
        with torch.no_grad():
            model(batch())
        for name in twin.follow(subnets_of(model)):
            expected.base.state.pop(twin.values[name])
        assert_one(model, twin)
        for each in (mine, expected):
            each.train()
    assert bool(losia_fx.controller(model).history) == bool(options)


def sam_of_a_package(parameters: list[nn.Parameter]) -> Any:
    package = pytest.importorskip("pytorch_optimizer")
    return package.SAM(parameters, optim.SGD, rho=0.5, lr=0.1, momentum=0.9)


def sam_by_halves(parameters: list[nn.Parameter]) -> Any:
    return Sam(parameters, optim.SGD, rho=0.5, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("options", [{}, MOVING], ids=["still", "moving"])
@pytest.mark.parametrize("how", ["closure", "halves"])
@pytest.mark.parametrize("make", [sam_of_a_package, sam_by_halves])
def test_sharpness_aware_minimization(make: Any, how: str, options: dict[str, Any]) -> None:
    """The gradient of the second half is taken at the point that the first has climbed to."""
    run = Run(make, **options)
    for number in range(1, 9):
        ids = batch()
        zero(run.model, run.twin)
        backward(run.model, run.twin, ids)
        if how == "closure":
            for optimizer, call in ((run.mine, run.model), (run.expected, run.twin)):

                def closure(optimizer: Any = optimizer, call: Any = call, ids: Tensor = ids) -> Tensor:
                    optimizer.zero_grad()
                    loss = loss_of(call, ids)
                    loss.backward()
                    return loss

                optimizer.step(closure)
        else:
            for optimizer in (run.mine, run.expected):
                optimizer.first_step(zero_grad=True)
            backward(run.model, run.twin, ids)
            for optimizer in (run.mine, run.expected):
                optimizer.second_step(zero_grad=True)
        run.follow()
        assert losia_fx.controller(run.model).step == number
    assert bool(run.moved) == bool(options)
    assert_one(run.model, run.twin)


@pytest.mark.parametrize("schedule", ["async", "sync"])
def test_the_importance_under_sam_is_that_of_the_gradient_it_steps_by(schedule: str) -> None:
    """Of G at the climbed point, and of the W that the step moves: the score is that of plain autograd there."""
    options = {"schedule": schedule, "importance": "mixed", "period": 1000}
    model, twin = twins(**options)
    optimizer = sam_by_halves(values_of(model))
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        ids = batch()
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        before = {name: weight.detach().clone() for name, weight in _weights(model).items()}
        optimizer.first_step(zero_grad=True)
        loss_of(model, ids).backward()
        climbed = twin.solid().requires_grad_(True)
        climbed.load_state_dict({name: value for name, value in model.state_dict().items() if name in before}, False)
        loss_of(climbed, ids).backward()
        for name, weight in before.items():
            product = weight.float() * climbed.get_parameter(name).grad.float()
            seen = (product - product.square() / 2).abs()
            last = expected.get(name, torch.zeros_like(seen))
            expected[name] = 0.85 * last + 0.15 * seen
        optimizer.second_step()
    state = losia_fx.state_dict(model)
    found = [name for name in twin.values if f"{name}:importance" in state]
    assert found
    for name in found:
        close(state[f"{name}:importance"], expected[name], 1e-5, f"importance of {name}")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: subnet.weight for name, subnet in subnets_of(model).items()}


AROUND: dict[str, Callable[[Any, Optimizer], Any]] = {
    "Lookahead": lambda package, inner: package.Lookahead(inner, k=2),
    "OrthoGrad": lambda package, inner: package.OrthoGrad(inner),
    "TRAC": lambda package, inner: package.TRAC(inner),
    "ScheduleFreeWrapper": lambda package, inner: package.ScheduleFreeWrapper(inner),
    "Magma": lambda package, inner: package.Magma(inner),
}


@pytest.mark.parametrize("name", AROUND)
def test_wrappers_of_a_package(name: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    if not hasattr(package, name):
        pytest.skip(f"this pytorch_optimizer has no {name}")
    run = Run(lambda p: AROUND[name](package, momentum(p)))
    for number in range(1, 7):
        for optimizer in (run.mine, run.expected):
            if hasattr(optimizer, "train"):
                optimizer.train()
        run.train(1)
        assert losia_fx.controller(run.model).step == number
        if number % 3 == 0 and hasattr(run.mine, "eval"):
            run.mine.eval()
            run.expected.eval()
            assert_one(run.model, run.twin)
    assert_one(run.model, run.twin)


def test_a_wrapper_that_clips_in_its_step() -> None:
    run = Run(lambda p: Clipping(momentum(p)))
    run.train(5)
    assert losia_fx.controller(run.model).step == 5
    assert_one(run.model, run.twin)


def test_lbfgs_is_refused_within_a_wrapper() -> None:
    model, _ = twins()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_of(model, batch()).backward()
    with pytest.raises(OptimizerError, match="LBFGS"):
        Passing(optim.LBFGS(values_of(model))).step(lambda: loss_of(model, batch()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Decaying(optim.SGD):
    """A subclass that calls its parent's step, which has hooks of its own, and goes on after it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)
        return loss


class DecayingTwice(Decaying):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        super().step(closure)
        return super().step(closure)


@pytest.mark.parametrize("kind", [Decaying, DecayingTwice])
def test_a_subclass_that_calls_its_parents_step(kind: Any) -> None:
    """The hooks run twice for one optimizer: for its own step, and for its parent's within."""
    for parent in (optim.SGD, Decaying):  # torch puts hooks onto a class with its first object
        parent([torch.zeros(1, requires_grad=True)], lr=0.1)
    Pair(lambda p: kind(p, lr=0.1, momentum=0.9)).rounds()


# -- nested by chance ----------------------------------------------------------------------------------------------


def test_a_step_of_another_model_within_a_closure_counts_for_that_model() -> None:
    """As a learned loss is trained: each model has an outermost optimizer of its own."""
    outer, inner = Run(momentum), Run(momentum)
    for number in range(1, 4):
        ids = batch()
        zero(outer.model, outer.twin)

        def closure(ids: Tensor = ids) -> Tensor:
            inner.train(2)
            outer.mine.zero_grad()
            loss = loss_of(outer.model, ids)
            loss.backward()
            return loss

        outer.mine.step(closure)
        loss_of(outer.twin, ids).backward()
        outer.expected.step()
        assert losia_fx.controller(outer.model).step == number
        assert losia_fx.controller(inner.model).step == 2 * number
    assert_one(outer.model, outer.twin)
    assert_one(inner.model, inner.twin)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_that_raises_does_not_count_and_the_next_ones_do(wrapped: bool) -> None:
    """S is left half stepped: as with a plain model, and the forward sees it."""
    model, twin = twins(**MOVING)
    inner, expected = Failing(values_of(model), 0.5), Failing(twin.parameters(), 0.5)
    mine: Optimizer = Passing(inner) if wrapped else inner
    for number in range(1, 8):
        zero(model, twin)
        backward(model, twin)
        if number % 2 == 0:
            for optimizer, failing in ((mine, inner), (expected, expected)):
                failing.fails = ZeroDivisionError()
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
                failing.fails = None
            zero(model, twin)
            backward(model, twin)
        mine.step()
        expected.step()
        twin.follow(subnets_of(model))
        assert losia_fx.controller(model).step == number
    assert_one(model, twin)
    assert len(losia_fx.controller(model).history) == 2


def test_optimizers_that_step_within_the_backward() -> None:
    """One a subnet, run by a hook as its gradient comes: memory-saving recipes have it so."""
    pair = Pair(momentum)
    optimizers = {value: momentum([value]) for value in pair.values()}

    def step(value: nn.Parameter) -> None:
        optimizers[value].step()
        optimizers[value].zero_grad()

    for value in optimizers:
        value.register_post_accumulate_grad_hook(step)
    pair.rounds(take=lambda: None)


# -- who owns a subnet is decided by who has stepped it lately -----------------------------------------------------


def test_a_first_try_that_never_stepped() -> None:
    """An optimizer of a notebook's earlier cell is alive, holds everything and does nothing."""
    pair = Pair(adamw)
    stale = momentum(pair.values())
    pair.rounds()
    assert stale.param_groups


def test_an_optimizer_given_up_for_another() -> None:
    """The first has stepped; the second holds as much. No step is lost, none counts twice."""
    run = Run(momentum, **MOVING)
    run.train(4)
    stale = run.mine
    run.mine, run.expected = momentum(values_of(run.model)), momentum(run.twin.parameters())
    run.train(7)
    assert losia_fx.controller(run.model).step == 11
    assert_one(run.model, run.twin)
    assert stale.param_groups


@pytest.mark.parametrize("tried", [False, True])
def test_an_optimizer_given_up_for_one_that_holds_less(tried: bool) -> None:
    """The head is left as it is from now on; t does not wait for it (but may once, to see)."""
    model, twin = twins(**MOVING)
    stale, expected = momentum(values_of(model)), momentum(twin.parameters())
    if tried:
        backward(model, twin)
        stale.step()
        expected.step()
    held = [name for name in twin.values if name != "head.weight"]
    mine = momentum([subnets_of(model)[name].values for name in held])
    other = momentum([twin.values[name] for name in held])
    with warned():
        for _ in range(12):
            zero(model, twin)
            backward(model, twin)
            mine.step()
            other.step()
            twin.follow(subnets_of(model), other)
    assert 12 + tried - 1 <= losia_fx.controller(model).step <= 12 + tried
    assert len(losia_fx.controller(model).history) >= 3
    assert_one(model, twin)


def test_a_staged_run() -> None:
    """The head first, by an optimizer that stays alive; then the blocks by another; then both."""
    model, twin = twins(**MOVING)
    controller, steps = losia_fx.controller(model), 0
    parts = [["head.weight"], [name for name in twin.values if name != "head.weight"]]
    kept: list[tuple[list[Optimizer], list[Optimizer]]] = []
    for stage in (parts[:1], parts[1:], parts):
        mine = [momentum([subnets_of(model)[name].values for name in part]) for part in stage]
        expected = [momentum([twin.values[name] for name in part]) for part in stage]
        kept.append((mine, expected))
        with warned():
            for _ in range(6):
                zero(model, twin)
                backward(model, twin)
                for optimizer in (*mine, *expected):
                    optimizer.step()
                moved = twin.follow(subnets_of(model))
                for name in moved:
                    for optimizer in expected:
                        optimizer.state.pop(twin.values[name], None)
        assert controller.step >= steps + 5, "t stands still"
        assert controller.step <= steps + 7, "steps count twice"
        steps = controller.step
    assert_one(model, twin)


def test_two_optimizers_by_turns_each_on_its_part() -> None:
    """Alternating minimization: t goes on, nothing is lost, W is right at every forward."""
    model, twin = twins(**MOVING)
    parts = [["head.weight"], [name for name in twin.values if name != "head.weight"]]
    mine = [momentum([subnets_of(model)[name].values for name in part]) for part in parts]
    expected = [momentum([twin.values[name] for name in part]) for part in parts]
    with warned():
        for number in range(16):
            turn = (number // 2) % 2
            zero(model, twin)
            backward(model, twin)
            mine[turn].step()
            expected[turn].step()
            for name in twin.follow(subnets_of(model)):
                for each in expected:
                    each.state.pop(twin.values[name], None)
    assert 4 <= losia_fx.controller(model).step <= 16
    assert_one(model, twin)


def test_two_optimizers_that_hold_the_same_subnets() -> None:
    """One descends, the other pulls towards zero: both step what both hold, and that is one step (after the first)."""
    model, twin = twins()
    made = [(momentum(p), optim.SGD(p, lr=0.01, weight_decay=0.1)) for p in (values_of(model), twin.parameters())]
    with warned():
        for _ in range(9):
            zero(model, twin)
            backward(model, twin)
            for pair in made:
                for optimizer in pair:
                    optimizer.step()
    assert 9 <= losia_fx.controller(model).step <= 10
    assert_one(model, twin)


def test_an_optimizer_of_other_parameters_of_the_model() -> None:
    """Norms that learn in full have an optimizer of their own, which steps more often: it does not count."""
    model, _ = twins(**{**MOVING, "trainable": ("*norm*",)})
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    mine, other = momentum(values_of(model)), momentum(norms)
    for number in range(1, 7):
        for _ in range(2):
            model.zero_grad()
            loss_of(model, batch()).backward()
            other.step()
        model.zero_grad()
        loss_of(model, batch()).backward()
        other.step()
        mine.step()
        assert losia_fx.controller(model).step == number


# -- state that is made at birth -----------------------------------------------------------------------------------


def apollo(parameters: Iterable[Tensor], low_rank: bool = True) -> Any:
    module = pytest.importorskip("apollo_torch")
    low = {"rank": 2, "proj": "random", "scale_type": "channel", "update_proj_gap": 2, "scale": 1, "proj_type": "std"}
    return module.APOLLOAdamW([{"params": list(parameters), **(low if low_rank else {})}], lr=0.02)


@pytest.mark.parametrize("low_rank", [False, True])
def test_apollo(low_rank: bool) -> None:
    """The key that its constructor gives each parameter is there again after a move."""
    run = Run(lambda p: apollo(p, low_rank), **MOVING)
    keys = {name: run.mine.state[s.values]["seed"] for name, s in subnets_of(run.model).items()}

    def follow() -> None:
        for name in run.twin.follow(subnets_of(run.model)):
            run.moved.append(name)
            value = run.twin.values[name]
            run.expected.state[value] = {"seed": keys[name]}
            assert run.mine.state[subnets_of(run.model)[name].values] == {"seed": keys[name]}

    run.follow = follow  # type: ignore[method-assign]
    run.train(10)
    assert run.moved
    assert_one(run.model, run.twin)


class Stateful(Optimizer):
    """Averages gradients in a buffer that its constructor makes, from the parameter itself."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"start": p.detach().clone(), "mean": torch.zeros_like(p), "count": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] += 1
                state["mean"].lerp_(p.grad, 0.5)
                p.sub_(group["lr"] * state["mean"] / (1 - 0.5 ** state["count"]))
                p.lerp_(state["start"], 0.01)


def test_state_that_a_constructor_makes_from_the_parameter() -> None:
    run = Run(Stateful, **MOVING)
    run.train(10)
    assert run.moved
    assert_one(run.model, run.twin)


@pytest.mark.parametrize("pullback", ["none", "pullback"])
@pytest.mark.parametrize("resumed", [False, True], ids=["from the start", "resumed"])
def test_a_lookahead_starts_a_moved_subnet_anew(resumed: bool, pullback: str) -> None:
    """Slow copies that came from a file are known too as what its constructor makes, and so are slow moments."""
    package = pytest.importorskip("pytorch_optimizer")

    def made() -> tuple[nn.Module, Any]:
        model, _ = twins(Toy(layers=1).double(), **MOVING)
        return model, package.Lookahead(momentum(values_of(model)), k=3, pullback_momentum=pullback)

    def train(model: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()

    model, optimizer = made()
    if resumed:
        train(model, optimizer, 2)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), losia_fx.state_dict(model)))
        train(model, optimizer, 1)
        model, optimizer = made()
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        losia_fx.load_state_dict(model, saved[2])
        train(model, optimizer, 1)
    else:
        train(model, optimizer, 3)
    event = losia_fx.controller(model).history[-1]
    moved = [subnet.values for subnet in subnets_of(model).values() if subnet.group == event.group]
    assert moved
    for value in moved:
        assert torch.equal(optimizer.state[value]["slow_params"], value)
        assert value not in optimizer.optimizer.state
        assert pullback == "none" or not optimizer.state[value]["slow_momentum"].any()
    train(model, optimizer, 5)
    assert losia_fx.controller(model).step == 8


def test_what_sam_keeps_of_its_first_half_is_no_earlier_run() -> None:
    """pytorch_optimizer's FriendlySAM keeps an average of gradients that it makes before any step."""
    package = pytest.importorskip("pytorch_optimizer")
    if not hasattr(package, "FriendlySAM"):
        pytest.skip("this pytorch_optimizer has no FriendlySAM")
    run = Run(lambda p: package.FriendlySAM(p, optim.SGD, lr=0.1, momentum=0.9), **MOVING)
    for _ in range(7):
        ids = batch()
        for optimizer, model in ((run.mine, run.model), (run.expected, run.twin)):
            optimizer.zero_grad()
            loss_of(model, ids).backward()
            optimizer.first_step(zero_grad=True)
            loss_of(model, ids).backward()
            optimizer.second_step()
        run.follow()
    assert run.moved
    assert_one(run.model, run.twin)


EVERY = (
    "AdaBelief", "ADOPT", "AdEMAMix", "Adan", "AdamP", "CAME", "DAdaptAdam", "Fromage", "GrokFastAdamW", "LaProp",
    "Lamb", "Lion", "MADGRAD", "MARS", "NovoGrad", "PNM", "Prodigy", "QHAdam", "Ranger", "Ranger21", "SM3", "SOAP",
    "ScalableShampoo", "Shampoo", "StableAdamW", "Tiger", "Yogi", "Kron", "Adai", "AdaSmooth",
)  # fmt: skip
QUICK = ("Adan", "Lion", "MADGRAD", "Ranger", "SOAP")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_optimizers_of_a_package(name: str) -> None:
    """Whatever each keeps, a moved subnet starts as a parameter new to it; what a group counts goes on."""
    package = pytest.importorskip("pytorch_optimizer")
    if not hasattr(package, name):
        pytest.skip(f"this pytorch_optimizer has no {name}")
    kind = getattr(package, name)
    options: dict[str, Any] = {"lr": 0.01} if "lr" in inspect.signature(kind.__init__).parameters else {}
    options |= {"num_iterations": 20} if name == "Ranger21" else {}
    try:
        run = Run(lambda p: kind(p, **options), **MOVING)
        plain_survives(kind([nn.Parameter(value.detach().clone()) for value in run.twin.parameters()], **options))
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{name} does not step a parameter new to it, or not in float64: {error!r}")
    run.train(10)
    assert run.moved
    assert losia_fx.controller(run.model).step == 10
    assert_one(run.model, run.twin)


def plain_survives(optimizer: Optimizer) -> None:
    """Raises where the optimizer itself cannot go on with a parameter whose state is gone."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for number in range(3):
        for p in held:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if number == 1:
            optimizer.state.pop(held[0], None)


# -- a step that is none -------------------------------------------------------------------------------------------


def test_a_fake_step_for_the_state_dict_does_not_count() -> None:
    """torch.distributed.checkpoint has an optimizer make its state by a step with gradients and rates of zero."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    pair = Pair(adamw)
    saved = get_optimizer_state_dict(pair.model, pair.optimizer)
    assert losia_fx.controller(pair.model).step == 0
    other = Pair(adamw)
    set_optimizer_state_dict(other.model, other.optimizer, saved)
    assert losia_fx.controller(other.model).step == 0
    assert_subnets_are_their_blocks(pair.model)


def assert_subnets_are_their_blocks(model: nn.Module) -> None:
    for name, subnet in subnets_of(model).items():
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols]), name


# -- an optimizer that is not ours ---------------------------------------------------------------------------------


def test_a_controller_never_raises_in_the_step_of_another_models_optimizer() -> None:
    """Whatever state a transformed model is in: of two minds, half taken apart, with a weight gone."""
    other = Toy(layers=1).double()
    foreign = optim.SGD(other.parameters(), lr=0.1)
    broken = []
    for how in ("two minds", "weight gone", "subnet gone", "module gone", "another shape"):
        model, twin = twins()
        backward(model, twin)
        with torch.no_grad():
            if how == "two minds":
                model.head.weight.add_(1)
                subnets_of(model)["head.weight"].values.sub_(1)
            elif how == "weight gone":
                del model.head.weight
            elif how == "subnet gone":
                for key in [key for key, p in model.head._parameters.items() if key != "weight" and p is not None]:
                    delattr(model.head, key)
            elif how == "module gone":
                del model.head
            else:
                model.head.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
        broken.append(model)
        other.zero_grad()
        loss_of(other, batch()).backward()
        print(how)
        foreign.step()
        with torch.no_grad():
            other(batch())
        losia_fx.report(losia_fx.transform(Toy(layers=1), compiler="eager"))
    assert len(broken) == 5


def test_two_models_in_one_wrapped_optimizer() -> None:
    first, second = (twins(Toy(layers=1).double()) for _ in range(2))
    mine = Passing(momentum([*values_of(first[0]), *values_of(second[0])]))
    expected = momentum([*first[1].parameters(), *second[1].parameters()])
    for number in range(1, 5):
        for model, twin in (first, second):
            zero(model, twin)
            backward(model, twin)
        mine.step()
        expected.step()
        for model, twin in (first, second):
            assert losia_fx.controller(model).step == number
            assert_subnets(model, twin)
    for model, twin in (first, second):
        assert_one(model, twin)


def test_the_twin_itself() -> None:
    """The oracle is sound: with everything in the subnet it is plain training."""
    plain = Toy(layers=1).double()
    model, twin = twins(copy.deepcopy(plain), rank_factor=1.0, output_rank_factor=1.0)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in twin.values)
    expected = momentum([plain.get_parameter(name) for name in twin.values])
    other = momentum(twin.parameters())
    for _ in range(3):
        ids = batch()
        plain.zero_grad()
        for value in twin.parameters():
            value.grad = None
        loss_of(plain, ids).backward()
        loss_of(twin, ids).backward()
        expected.step()
        other.step()
    with torch.no_grad():
        ids = batch()
        close(logits(twin(ids)), plain(ids), 1e-12, "logits")
    assert isinstance(twin, Twin)
    assert PERIOD == 3
    del model


def test_a_list_of_parameters_that_is_changed_in_place() -> None:
    """Another part of the model learns from then on, and as many parameters."""
    model = losia_fx.transform(Toy(layers=1).double(), compiler="eager", rank_factor=0.25, period=50)
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(values[:2])
    with warned() as said:
        for step in range(6):
            if step == 3:
                optimizer.param_groups[0]["params"][:] = values[2:4]
            loss_of(model, batch()).backward()
            optimizer.step()
            optimizer.zero_grad()
            losia_fx.state_dict(model)
    assert not said
    controller = losia_fx.controller(model)
    (head,) = (state for state in controller.states if state.name == "head.weight")
    assert controller.step == 6
    assert head.profile is not None
    assert head.profile.importance is not None, "its steps were not followed"
