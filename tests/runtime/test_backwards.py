"""Backwards in any order, and none: subnet gradients and the importance behind the next subnets are plain autograd's.

Each pattern of forwards and backwards runs at every optimizer step of two rounds, on the transformed model and on the
eager reference (tests/reference.py) alike: what plain autograd makes of it is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import losia_fx
from losia_fx.ops.localization import tapped_bytes
from losia_fx.runtime.state import states_of
from tests.support import toys
from tests.support.reference import Reference

PERIOD = 2
slow = pytest.mark.slow
Pattern = Callable[[nn.Module, list[Tensor]], None]


def backward(model: nn.Module, ids: Tensor, retain_graph: bool = False) -> None:
    toys.loss_of(model, ids).backward(retain_graph=retain_graph)


def one(model: nn.Module, batches: list[Tensor]) -> None:
    backward(model, batches[0])


def same_order(model: nn.Module, batches: list[Tensor]) -> None:
    losses = [toys.loss_of(model, ids) for ids in batches]
    for loss in losses:
        loss.backward()


def reverse_order(model: nn.Module, batches: list[Tensor]) -> None:
    losses = [toys.loss_of(model, ids) for ids in batches]
    for loss in reversed(losses):
        loss.backward()


def joined(model: nn.Module, batches: list[Tensor]) -> None:
    """Two forwards, one backward through both."""
    losses = [toys.loss_of(model, ids) for ids in batches]
    (losses[0] + 2 * losses[1]).backward()


def twice(model: nn.Module, batches: list[Tensor]) -> None:
    loss = toys.loss_of(model, batches[0])
    loss.backward(retain_graph=True)
    loss.backward()


def twice_around_another(model: nn.Module, batches: list[Tensor]) -> None:
    loss = toys.loss_of(model, batches[0])
    loss.backward(retain_graph=True)
    backward(model, batches[1])
    loss.backward()


def two_losses(model: nn.Module, batches: list[Tensor]) -> None:
    """Two losses of one forward, each with a backward of its own."""
    logits = model(batches[0])
    F.cross_entropy(logits.flatten(0, 1), batches[0].flatten()).backward(retain_graph=True)
    logits.logsumexp(-1).square().mean().backward()


def dropped(model: nn.Module, batches: list[Tensor]) -> None:
    backward(model, batches[0])
    model.zero_grad()
    backward(model, batches[1])


def dropped_in_place(model: nn.Module, batches: list[Tensor]) -> None:
    """The gradients stay, as zeros."""
    backward(model, batches[0])
    model.zero_grad(set_to_none=False)
    backward(model, batches[1])
    backward(model, batches[0])


def dropped_retained(model: nn.Module, batches: list[Tensor]) -> None:
    """The gradient is dropped between two backwards of one graph."""
    loss = toys.loss_of(model, batches[0])
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()


def forward_alone(model: nn.Module, batches: list[Tensor]) -> None:
    """A forward with its graph, and no backward: kept over the next backward, and thrown away."""
    kept = toys.loss_of(model, batches[1])
    toys.loss_of(model, batches[0])
    backward(model, batches[0])
    del kept


def evaluated_between(model: nn.Module, batches: list[Tensor]) -> None:
    loss = toys.loss_of(model, batches[0])
    with torch.no_grad():
        toys.loss_of(model, batches[1])
    loss.backward()


PATTERNS: tuple[Pattern, ...] = (
    one,
    same_order,
    reverse_order,
    joined,
    twice,
    twice_around_another,
    two_losses,
    dropped,
    dropped_in_place,
    dropped_retained,
    forward_alone,
    evaluated_between,
)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def begin(model: nn.Module, compiler: str) -> tuple[nn.Module, torch.optim.Optimizer, Reference]:
    plain = copy.deepcopy(model)
    model = losia_fx.transform(model, rank_factor=0.25, output_rank_factor=0.25, period=PERIOD, compiler=compiler)
    subnets = {name: (subnet.rows, subnet.cols) for name, subnet in losia_fx.subnets(model).items()}
    groups = losia_fx.controller(model).groups
    reference = Reference(plain, subnets, groups, sgd, lambda steps: 0.1, period=PERIOD)
    return model, sgd(list(model.parameters())), reference


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0, "nothing to compare"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


def hold(model: nn.Module, optimizer: torch.optim.Optimizer, reference: Reference, pattern: Pattern) -> None:
    """One optimizer step under the pattern, and what must hold before and after it."""
    batches = [toys.batch(), toys.batch()]
    pattern(model, batches)
    pattern(reference.model, batches)
    subnets = losia_fx.subnets(model)
    for name, weight in reference.weights.items():
        grad = weight.weight.grad
        assert grad is not None
        assert subnets[name].values.grad is not None
        close(subnets[name].values.grad, grad[weight.rows][:, weight.cols])
        assert subnets[name].weight.grad is None
    profiled = {name for group in reference.profiled() for name in reference.groups[group]}
    gradients = {state.name: state.profile.grad for state in states_of(model) if state.profile is not None}
    assert set(gradients) == profiled
    for name, grad in gradients.items():
        close(grad, reference.weights[name].weight.grad)
    optimizer.step()
    optimizer.zero_grad()
    reference.step()
    for name, weight in reference.weights.items():
        assert torch.equal(subnets[name].rows, weight.rows), name
        assert torch.equal(subnets[name].cols, weight.cols), name
        close(subnets[name].weight, weight.weight)
    assert tapped_bytes() == 0


def follow(model: nn.Module, compiler: str, patterns: Iterator[Pattern] | tuple[Pattern, ...], rounds: int = 2) -> None:
    model, optimizer, reference = begin(model, compiler)
    for pattern in patterns:
        for _ in range(rounds * PERIOD * len(reference.groups)):
            hold(model, optimizer, reference, pattern)
    history = [(event.step, event.group) for event in losia_fx.controller(model).history]
    assert history == reference.reselections
    assert len(history) >= rounds * len(reference.groups)
    assert losia_fx.controller(model).left_out == 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=slow)])
def test_pattern(compiler: str, pattern: Pattern) -> None:
    follow(toys.Toy(bias=True), compiler, (pattern,))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
def test_pattern_checkpointed(pattern: Pattern) -> None:
    follow(toys.Toy(bias=True, checkpointed=True), "aot_eager", (pattern,), rounds=1)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_patterns_one_after_another(compiler: str, checkpointed: bool) -> None:
    """In one compiled model."""
    follow(toys.Toy(bias=True, checkpointed=checkpointed), compiler, PATTERNS, rounds=1)


class Twice(nn.Module):
    """A block that calls one linear two times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.other = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(torch.tanh(self.linear(torch.tanh(self.linear(x)))))


class Shared(nn.Module):
    """As ALBERT: the same block again and again, beside one of its own; each call checkpointed where asked for."""

    def __init__(self, depth: int, checkpointed: bool, reentrant: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(toys.VOCABULARY, 16)
        self.layers = nn.ModuleList([Twice(16), Twice(16)])
        self.head = nn.Linear(16, toys.VOCABULARY)
        self.depth, self.checkpointed, self.reentrant = depth, checkpointed, reentrant

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in [self.layers[0]] * self.depth + [self.layers[1]]:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if self.checkpointed else layer(x)
        return self.head(x)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_weight_used_many_times(compiler: str, checkpointed: bool) -> None:
    follow(Shared(2, checkpointed), compiler, (one, same_order), rounds=1)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_no_x_outlives_its_backward(compiler: str, checkpointed: bool) -> None:
    """Copies of x exist between a profiled forward and its backward, and at no other time."""
    model, optimizer, _ = begin(toys.Toy(checkpointed=checkpointed), compiler)
    groups = len(losia_fx.controller(model).groups)
    seen = set()
    for _ in range(PERIOD * groups):
        for _ in range(3):  # accumulation piles nothing up
            loss = toys.loss_of(model, toys.batch())
            seen.add(tapped_bytes())
            loss.backward()
            assert tapped_bytes() == 0
        toys.loss_of(model, toys.batch())  # forward alone: its graph is gone, and so are its taps
        assert tapped_bytes() == 0
        optimizer.step()
        optimizer.zero_grad()
    # AOTAutograd takes the tap of a recomputed or a saved x into the backward, where it lives for one op.
    assert max(seen) > 0 or (compiler, checkpointed) == ("aot_eager", True)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_kept_graph_holds_x_till_the_step_at_most(compiler: str) -> None:
    model, optimizer, _ = begin(toys.Toy(), compiler)
    kept = toys.loss_of(model, toys.batch())
    one(model, [toys.batch()])
    assert compiler != "eager" or tapped_bytes() > 0
    optimizer.step()
    assert tapped_bytes() == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()  # as in plain torch: the weights that it needs have moved on


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_idle_groups_keep_no_x(compiler: str) -> None:
    """Bytes tapped while a group is profiled are its own inputs and no more."""
    model, optimizer, reference = begin(toys.Toy(layers=3), compiler)
    ids = toys.batch(3, 7)
    tokens = ids.numel()
    for group in [*range(len(reference.groups)), 0]:
        assert losia_fx.controller(model).active == group
        loss = toys.loss_of(model, ids)
        wide = sum(losia_fx.subnets(model)[name].weight.shape[1] for name in reference.groups[group])
        head = reference.groups[group] == ["head.weight"]  # its x is saved whole: a compiler taps it in the backward
        assert tapped_bytes() == (0 if head and compiler != "eager" else 4 * tokens * wide)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        one(model, [ids])
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_static_and_random_never_tap(compiler: str) -> None:
    for options in ({"schedule": "static"}, {"importance": "random"}):
        model = losia_fx.transform(toys.Toy(), rank_factor=0.25, period=PERIOD, compiler=compiler, **options)
        loss = toys.loss_of(model, toys.batch())
        assert tapped_bytes() == 0
        loss.backward()


def test_skipped_step_leaves_nothing() -> None:
    """A loop that skips a step (a loss that is no number) zeroes the gradients and goes on: G starts at zero again."""

    def skipped(model: nn.Module, batches: list[Tensor], set_to_none: bool) -> None:
        (toys.loss_of(model, batches[1]) * float("nan")).backward()
        model.zero_grad(set_to_none=set_to_none)
        backward(model, batches[0])

    for set_to_none in (True, False):
        follow(toys.Toy(), "eager", (partial(skipped, set_to_none=set_to_none),), rounds=1)
