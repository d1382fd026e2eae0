"""Writes that no version shows, deep in training, where values are compared but now and then: none is undone unsaid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import losia_fx
from tests.support.optimizers import ClassicLookahead
from tests.support.toys import batch
from tests.support.twin import Twin, assert_one, backward, close, subnets_of, twins, values_of, warned, zero
from tests.truth.test_averages import Run as Averaged
from tests.truth.test_averages import Shadow, assert_sees
from tests.truth.test_wrapped_optimizers import MOVING, Run, adamw

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")


def sgd(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("k", [2, 5])
def test_a_lookahead_without_hooks_that_writes_to_data(k: int) -> None:
    """The classic one, from the first steps on."""
    run = Run(lambda p: ClassicLookahead(adamw(p), k=k))
    run.train(12)
    assert losia_fx.controller(run.model).step == 12
    assert_one(run.model, run.twin)


def test_the_slow_copies_of_a_classic_lookahead_start_anew() -> None:
    """Its dictionary, which no step hook ever sees, has the place of a moved subnet cleared."""
    run = Run(lambda p: ClassicLookahead(adamw(p), k=5), **{**MOVING, "period": 4})
    run.train(13)  # it looks ahead in steps 1, 6 and 11
    assert run.moved
    assert_one(run.model, run.twin)


def deep(steps: int = 20, **options: Any) -> tuple[nn.Module, Twin, optim.Optimizer, optim.Optimizer]:
    """A model after many ordinary steps, the last of them taken."""
    model, twin = twins(**{**MOVING, "period": 1000, **options})
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(steps):
        go_on(model, twin, mine, expected)
    return model, twin, mine, expected


def go_on(model: nn.Module, twin: Twin, mine: optim.Optimizer, expected: optim.Optimizer) -> None:
    zero(model, twin)
    backward(model, twin)
    mine.step()
    expected.step()
    twin.follow(subnets_of(model), expected)


def clamped(model: nn.Module, twin: Twin) -> None:
    """One weight by name, through .data, in place: no version, no storage tells."""
    weight = model.get_parameter("head.weight")
    weight.data.clamp_(-0.1, 0.1)
    twin.write("head.weight", twin.weight("head.weight").clamp(-0.1, 0.1))


def scaled(model: nn.Module, twin: Twin) -> None:
    """S alone."""
    for values in (values_of(model), twin.parameters()):
        for value in values:
            value.data.mul_(-1)


def numpy(model: nn.Module, twin: Twin) -> None:
    """As numpy and other libraries see memory."""
    weight = model.get_parameter("layers.0.mix.weight").detach().numpy()
    weight *= 0.5
    twin.write("layers.0.mix.weight", twin.weight("layers.0.mix.weight") * 0.5)


WRITERS: dict[str, Callable[[nn.Module, Twin], None]] = {f.__name__: f for f in (clamped, scaled, numpy)}


@pytest.mark.parametrize("name", WRITERS)
def test_a_single_write_after_many_steps(name: str) -> None:
    """Between a step and the forward that follows it."""
    model, twin, mine, expected = deep()
    WRITERS[name](model, twin)
    for _ in range(3):
        go_on(model, twin, mine, expected)
    assert_one(model, twin)


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_after_every_step(name: str) -> None:
    """A constraint that people apply so, from the first step on: once it has been found, it is looked for."""
    model, twin, mine, expected = deep(steps=0, period=3)
    for _ in range(12):
        go_on(model, twin, mine, expected)
        WRITERS[name](model, twin)
    with warned() as said:
        assert_one(model, twin)
    # Nobody can tell S so written from an average that was begun before S moved.
    assert ["begun before they moved" in text for text in said] == [True] * (name == "scaled")


def test_a_constraint_that_binds_late() -> None:
    """Nothing is clamped in the first steps; then something is after each."""
    model, twin, mine, expected = deep(steps=0, period=4)
    for number in range(24):
        go_on(model, twin, mine, expected)
        if number >= 9:
            clamped(model, twin)
    assert_one(model, twin)


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_between_micro_batches(name: str) -> None:
    """Accumulation over four backwards: no step comes between them, and by the rule every such forward looks."""
    model, twin, mine, expected = deep(steps=4)
    for number in range(8):
        zero(model, twin)
        for micro in range(4):
            backward(model, twin)
            if (number, micro) == (6, 1):
                WRITERS[name](model, twin)
        mine.step()
        expected.step()
    assert_one(model, twin)


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_between_a_backward_and_its_step(name: str) -> None:
    model, twin, mine, expected = deep()
    zero(model, twin)
    backward(model, twin)
    WRITERS[name](model, twin)
    mine.step()
    expected.step()
    for _ in range(2):
        go_on(model, twin, mine, expected)
    assert_one(model, twin)


def test_a_loop_by_data_that_begins_after_some_forwards() -> None:
    """A notebook: the model is called a few times, to see what it says; then it is trained by hand, through .data."""
    model, twin = twins(**{**MOVING, "period": 1000})
    for _ in range(8):
        model(batch())
    with warned():
        for _ in range(5):
            zero(model, twin)
            backward(model, twin)
            for values in (values_of(model), twin.parameters()):
                for value in values:
                    value.data.sub_(0.5 * value.grad)
        assert_one(model, twin)


def test_an_average_swapped_in_for_a_forward_with_gradients_on() -> None:
    """Validation by people who forget no_grad, through .data: no change of modes tells either."""
    run = Averaged()
    mine, expected = Shadow(run.model.parameters(), "data"), Shadow(run.twin.parameters(), "data")
    run.train(20, lambda: (mine.update(), expected.update()))
    for shadow in (mine, expected):
        shadow.swap()
    assert_sees(run.model, run.twin.weights(), run.twin, gradients=True)
    for shadow in (mine, expected):
        shadow.swap()
    run.train(2)
    assert_one(run.model, run.twin)


def test_a_weight_alone_is_averaged_in_through_data() -> None:
    """W by name, S left as it is: outside of the subnet the average is what was there, so nothing there tells."""
    run = Averaged()
    average = {name: weight.detach().clone() for name, weight in run.twin.weights().items()}

    def each() -> None:
        for name, weight in run.twin.weights().items():
            average[name].lerp_(weight.detach(), 0.25)

    run.train(5, each)
    held = {name: run.model.get_parameter(name).detach().clone() for name in average}
    for name, weight in average.items():
        run.model.get_parameter(name).data.copy_(weight)
    assert_sees(run.model, average, run.twin)
    for name, weight in held.items():
        run.model.get_parameter(name).data.copy_(weight)
    assert_one(run.model, run.twin)
    run.train(2)
    assert_one(run.model, run.twin)


@pytest.mark.parametrize("what", ["block", "row of it", "one element"])
def test_a_weight_written_within_its_subnet_alone(what: str) -> None:
    """Through .data, in the first steps: nothing outside of the subnet has changed."""
    model, twin = twins()
    backward(model, twin)
    name = "layers.0.mlp.up.weight"
    subnet = subnets_of(model)[name]
    rows, cols = {
        "block": (subnet.rows, subnet.cols),
        "row of it": (subnet.rows[:1], subnet.cols),
        "one element": (subnet.rows[:1], subnet.cols[:1]),
    }[what]
    new = twin.weight(name).detach().clone()
    new[rows.unsqueeze(-1), cols] += 1
    model.get_parameter(name).data[rows.unsqueeze(-1), cols] += 1
    twin.write(name, new)
    assert_one(model, twin)


@pytest.mark.parametrize("what", ["row of W", "column of W", "element of S"])
def test_a_few_elements_that_nothing_tells_of(what: str) -> None:
    """Of a subnet too large for every element to be remembered: whole lines are W's, and it is said, once."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512)) for _ in range(2))).double()
    losia_fx.transform(model, rank_factor=0.5, compiler="eager", period=1000)
    name, subnet = next(iter(losia_fx.subnets(model).items()))
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    for _ in range(5):
        model(torch.randn(2, 512, dtype=torch.float64)).sum().backward()
        optimizer.step()
    weight = model.get_parameter(name)
    with warned() as said:
        for line in (3, 5):
            expected = weight.detach().clone()
            if what == "element of S":
                subnet.values.data[line, 3] = 7.0
                expected[subnet.rows[line], subnet.cols[3]] = 7.0
            else:
                at = subnet.rows[line] if what == "row of W" else (slice(None), subnet.cols[line])
                weight.data[at] = expected[at] = 0.0
            close(model.state_dict()[name], expected, 0.0, what)
            close(subnet.values.detach(), expected[subnet.rows][:, subnet.cols], 0.0, what)
    assert len(said) == 1, said
    assert "nothing tells of which" in said[0]


def test_an_average_between_two_evaluations_of_many_subnets() -> None:
    """So many that not all that is remembered of W is looked at before every forward; of S it is."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(130))).double()
    for layer in model:
        nn.init.orthogonal_(layer[0].weight)  # type: ignore[index,arg-type]
    losia_fx.transform(model, rank_factor=0.5, compiler="eager", period=1000)
    x, subnets = torch.randn(2, 8, dtype=torch.float64), list(subnets_of(model).values())
    with torch.no_grad():
        for _ in range(7):
            model(x)
        for turn in range(4):
            expected = x
            for subnet in subnets:
                whole = subnet.weight.clone()
                whole[subnet.rows.unsqueeze(-1), subnet.cols] = subnet.values.data.mul_(1.01)
                expected = expected @ whole.T
            close(model(x), expected, 1e-12, f"turn {turn}")
            for _ in range(70 + turn):  # until no comparison is due any more
                model(x)


def laid_out_by_columns(model: nn.Module) -> None:
    for value in values_of(model):
        value.data = value.data.mT.contiguous().mT
        assert not value.is_contiguous()


def test_subnets_that_were_given_memory_by_columns() -> None:
    model, twin, mine, expected = deep(steps=4, period=3)
    laid_out_by_columns(model)
    for _ in range(8):
        go_on(model, twin, mine, expected)
    scaled(model, twin)
    with warned():
        assert_one(model, twin)


def test_a_weight_written_beside_subnets_by_columns() -> None:
    """W alone: its block is held against what S held, in the order in which S is numbered."""
    model, twin, mine, expected = deep(steps=4)
    laid_out_by_columns(model)
    go_on(model, twin, mine, expected)
    clamped(model, twin)
    for _ in range(2):
        go_on(model, twin, mine, expected)
    assert_one(model, twin)


def test_a_weight_that_is_all_subnet() -> None:
    """With a rank factor of 1 there is no outside; S and W are told apart all the same."""
    for what in ("S", "W"):
        model, twin = twins(rank_factor=1.0, output_rank_factor=1.0)
        mine, expected = sgd(values_of(model)), sgd(twin.parameters())
        go_on(model, twin, mine, expected)
        zero(model, twin)
        backward(model, twin)
        name = "layers.0.mlp.up.weight"
        if what == "S":
            subnets_of(model)[name].values.data.mul_(-1)
            twin.values[name].data.mul_(-1)
        else:
            model.get_parameter(name).data.mul_(-1)
            twin.write(name, -twin.weight(name))
        with torch.no_grad(), warned():
            assert_one(model, twin)
        assert losia_fx.controller(model).step == 1


def test_values_are_compared_at_every_look_for_as_long_as_it_pays() -> None:
    """A weight that was once written through .data, to initialise it, say, costs no comparison ever after."""
    model, twin, mine, expected = deep(steps=0)
    agreement = losia_fx.controller(model).agreement
    clamped(model, twin)
    go_on(model, twin, mine, expected)
    assert agreement.vigilant
    for _ in range(40):
        go_on(model, twin, mine, expected)
    assert not agreement.vigilant
    clamped(model, twin)
    go_on(model, twin, mine, expected)
    assert agreement.vigilant
