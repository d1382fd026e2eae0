"""A second derivative through a weight with a subnet is exact or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import losia_fx
from losia_fx.errors import GradientError
from losia_fx.method.subnet import gather
from losia_fx.runtime.state import states_of
from tests.runtime.test_products import is_named, made, transformed
from tests.support.forms import FORMS, Form
from tests.support.toys import Toy, assert_subnet_gradients, batch, by_string, loss_of, plain_gradients

COMPILERS = ("eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


class Critic(nn.Module):
    """Blocks of linears from numbers to a number, as a gradient penalty has them."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.how == "graph break":
                torch._dynamo.graph_break()
            if self.how == "uncompiled":
                x = torch.compiler.disable(layer)(x)
            elif self.how == "checkpointed":
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = x + layer(x)
        return x.sum(-1) if self.how == "not a view" else x


def gradient_penalty(model: Callable[..., Any], x: Tensor) -> Tensor:
    """Its inner gradient begins at a constant: nothing that arrives in the last product's backward requires grad."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return grad.square().sum()


@pytest.mark.filterwarnings("ignore:losia_fx.*ran outside")
@pytest.mark.parametrize("how", ["plain", "checkpointed", "graph break", "uncompiled", "not a view"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_gradient_penalty_is_refused(compiler: str, how: str) -> None:
    model = losia_fx.transform(Critic(how), compiler=compiler, rank_factor=0.5)
    with pytest.raises(GradientError, match="create_graph=True"):
        gradient_penalty(model, torch.randn(3, 8)).backward()


def test_a_gradient_penalty_is_refused_by_string() -> None:
    with pytest.raises(GradientError, match="create_graph=True"):
        gradient_penalty(by_string(Critic(), rank_factor=0.5), torch.randn(3, 8)).backward()


@pytest.mark.parametrize("derivative", ["hessian", "hvp"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_hessians_are_refused(compiler: str, derivative: str) -> None:
    """By x alone: nothing that the gradient is made of in the last product requires grad."""
    model, x = losia_fx.transform(Critic(), compiler=compiler, rank_factor=0.5), torch.randn(3, 8)
    ask = getattr(torch.autograd.functional, derivative)
    with pytest.raises(GradientError):
        ask(lambda x: model(x).sum(), x, *([x] if derivative == "hvp" else []))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_refused_backward_can_be_taken_again(compiler: str) -> None:
    model, ids = Toy(), batch()
    losia_fx.transform(model, compiler=compiler, rank_factor=0.25, schedule="sync", period=10)
    plain = Toy()
    plain.load_state_dict(model.state_dict())
    loss = loss_of(model, ids)
    with pytest.raises(GradientError):
        loss.backward(create_graph=True)
    model.zero_grad()
    loss.backward()
    assert_subnet_gradients(model, plain_gradients(plain, ids))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert losia_fx.controller(model).left_out == 0


def second_order(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    inputs = [x.detach().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(model(inputs), inputs, create_graph=True)
    return sum((grad.square().sum() for grad in grads), start=torch.zeros(()))


PRODUCTS = ("linear-3d", "addmm", "left-3d", "loop", "bmm", "gathered", "grouped-single", "grouped-torch", "several")
BOTH = ("products-and-more",)
"""Uses of which a part is a product that is rewritten."""


@pytest.mark.parametrize("form", [form for form in FORMS if form.name in PRODUCTS + BOTH], ids=is_named)
def test_every_product_is_refused(form: Form) -> None:
    model, inputs = made(form)
    transformed(model, compiler="eager")
    with pytest.raises(GradientError):
        second_order(model, inputs)


@pytest.mark.parametrize("form", [form for form in FORMS if form.whole and form.name not in BOTH], ids=is_named)
def test_whole_gradients_are_exact(form: Form) -> None:
    """subnet_weight, and G of the subnet that is profiled."""
    model, inputs = made(form)
    plain = copy.deepcopy(model)
    transformed(model, compiler="eager")
    second_order(model, inputs).backward()
    second_order(plain, inputs).backward()
    subnet, (state,) = losia_fx.subnets(model)["layers.0.weight"], states_of(model)
    dense = plain.get_parameter("layers.0.weight").grad
    assert dense is not None
    assert state.profile is not None
    assert state.profile.grad is not None
    torch.testing.assert_close(subnet.values.grad, gather(dense, subnet.rows, subnet.cols))
    torch.testing.assert_close(state.profile.grad, dense, rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(model.get_parameter("layers.0.scale").grad, plain.get_parameter("layers.0.scale").grad)
