"""Gradients of gradients: right, or an error with a message; never something else without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import losia_fx
from tests.support.toys import batch
from tests.support.twin import Twin, assert_one, close, loss_of, subnets_of, twins, values_of, zero

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

COMPILERS = ("eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


def penalty_on_inputs(call: Any, x: Tensor) -> Tensor:
    """The squared norm of the gradient to the input, as critics are regularized by it."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    return gradient.square().sum()


class Critic(nn.Module):
    """Takes vectors; everything in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def says(raised: str) -> None:
    """torch's message, of a compiled graph, or ours."""
    assert "double backward" in raised or "create_graph" in raised, raised


def right_or_refused(mine: Any, expected: Any, model: nn.Module, twin: Twin) -> None:
    """``mine()`` leaves the gradients on S that ``expected()`` leaves on the twin's, or raises, and says of what."""
    expected()
    try:
        mine()
    except (losia_fx.LosiaError, RuntimeError) as error:
        raised = str(error)
    else:
        raised = ""
    if raised:
        says(raised)
        return
    for name, subnet in subnets_of(model).items():
        assert subnet.values.grad is not None, f"{name} has no gradient"
        close(subnet.values.grad, twin.values[name].grad, 1e-9, f"gradient of {name}")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_gradient_penalty(compiler: str) -> None:
    model, twin = twins(Critic().double(), compiler=compiler)
    x = torch.randn(4, 12, dtype=torch.float64)
    right_or_refused(
        lambda: penalty_on_inputs(model, x).backward(), lambda: penalty_on_inputs(twin, x).backward(), model, twin
    )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_penalty_on_the_gradient_of_the_subnets(compiler: str) -> None:
    """The norm of dL/dS, as sharpness is measured."""
    model, twin = twins(compiler=compiler)
    ids = batch()

    def penalty(call: Any, values: list[nn.Parameter]) -> Tensor:
        gradients = torch.autograd.grad(loss_of(call, ids), values, create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    right_or_refused(
        lambda: penalty(model, values_of(model)).backward(),
        lambda: penalty(twin, twin.parameters()).backward(),
        model,
        twin,
    )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_hessian_times_a_vector(compiler: str) -> None:
    model, twin = twins(compiler=compiler)
    ids, vectors = batch(), [torch.randn_like(value) for value in twin.parameters()]

    def product(call: Any, values: list[nn.Parameter]) -> None:
        gradients = torch.autograd.grad(loss_of(call, ids), values, create_graph=True)
        found = torch.autograd.grad(gradients, values, vectors)
        for value, part in zip(values, found, strict=True):
            value.grad = part

    right_or_refused(lambda: product(model, values_of(model)), lambda: product(twin, twin.parameters()), model, twin)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_graph_that_is_only_kept_costs_nothing(compiler: str) -> None:
    """create_graph without a second backward is what some optimizers ask for always."""
    model, twin = twins(compiler=compiler)
    mine, expected = (optim.SGD(p, lr=0.1) for p in (values_of(model), twin.parameters()))
    for _ in range(2):
        zero(model, twin)
        ids = batch()
        loss = loss_of(model, ids)
        try:
            loss.backward(create_graph=True)
        except (losia_fx.LosiaError, RuntimeError) as error:
            raised = str(error)
        else:
            raised = ""
        if raised:
            says(raised)
            return
        loss_of(twin, ids).backward()
        for value, own in zip(twin.parameters(), values_of(model), strict=True):
            close(own.grad.detach(), value.grad, 1e-9, "gradient")
        mine.step()
        expected.step()
    zero(model, twin)
    assert_one(model, twin)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_training_goes_on_after_the_error(compiler: str) -> None:
    """Whatever came of it, an ordinary step is an ordinary step, and nothing of it is in what is measured."""
    options = {"schedule": "sync", "importance": "mixed", "period": 50}
    model, twin = twins(Critic().double(), compiler=compiler, **options)
    x = torch.randn(4, 12, dtype=torch.float64)
    try:
        penalty_on_inputs(model, x).backward()
    except (losia_fx.LosiaError, RuntimeError):
        pass
    zero(model, twin)
    mine, expected = (optim.SGD(p, lr=0.1) for p in (values_of(model), twin.parameters()))
    for _ in range(2):
        zero(model, twin)
        for call in (model, twin):
            call(x).square().sum().backward()
        plain = twin.solid().requires_grad_(True)
        plain(x).square().sum().backward()
        state = losia_fx.state_dict(model)
        for name in twin.values:
            close(state[f"{name}:grad"].double(), plain.get_parameter(name).grad, 1e-5, f"G of {name}")
        mine.step()
        expected.step()
    with torch.no_grad():
        close(model(x), twin(x), 1e-9, "output")


def test_a_plain_forward_of_the_same_weights() -> None:
    """functional_call with dense(): nothing of the forward is rewritten there."""
    model, twin = twins(Critic().double())
    x = torch.randn(4, 12, dtype=torch.float64)

    def by_functional_call() -> None:
        weights = {name: losia_fx.dense(model, name) for name in twin.values}
        penalty_on_inputs(lambda given: torch.func.functional_call(model, weights, (given,)), x).backward()

    right_or_refused(by_functional_call, lambda: penalty_on_inputs(twin, x).backward(), model, twin)


def test_the_oracle_has_second_derivatives() -> None:
    model, twin = twins(Critic().double())
    penalty_on_inputs(twin, torch.randn(4, 12, dtype=torch.float64)).backward()
    assert all(value.grad is not None and value.grad.any() for value in twin.parameters())
    assert losia_fx.controller(model).step == 0
