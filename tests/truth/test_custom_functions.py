"""Weights used by hand in a torch.autograd.Function that no graph sees: first derivatives, no second ones unsaid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx import GradientError
from losia_fx.errors import UnsupportedGraphError
from tests.support.toys import Toy, batch
from tests.support.twin import assert_one, backward, close, loss_of, subnets_of, twins, values_of, zero


class Product(torch.autograd.Function):
    """x W^T, as a fused kernel has it; differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


@torch.compiler.disable
def product(x: Tensor, weight: Tensor) -> Tensor:
    return Product.apply(x, weight)  # type: ignore[no-any-return,no-untyped-call]


class Head(nn.Module):
    """One linear is run by hand, and no other stands between the input and what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"beside": self.first(x.detach()), "given": x, "found": (product(x, self.second.weight),)}


@torch.compiler.disable
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """torch's own products save their factors too."""
    return (x * weight).square()


class Scaled(Head):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"beside": self.first(x.detach()), "given": x, "found": (scaled(x[:1], self.second.weight),)}


class WithHead(Toy):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return product(self.norm(x), self.head.weight)


def penalty(call: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(call(x)["found"][0].square().sum(), x, create_graph=True)
    return found.square().sum()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_optimizers_that_step_within_the_backward(compiler: str) -> None:
    """What is registered on a subnet hears of a gradient that no graph has brought, and may change it."""
    model, twin = twins(WithHead(layers=1).double(), compiler=compiler)
    for values in (values_of(model), twin.parameters()):
        for value in values:
            _step_in_backward(value)
    for _ in range(3):
        ids = batch()
        for each in (model, twin):
            loss_of(each, ids).backward()
    assert_one(model, twin)


def _step_in_backward(value: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([value], lr=0.5, momentum=0.9)

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    value.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
    value.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_first_derivatives(compiler: str) -> None:
    model, twin = twins(WithHead(layers=1).double(), compiler=compiler)
    ids = batch()
    for _ in range(2):
        zero(model, twin)
        loss_of(model, ids).backward()
        loss_of(twin, ids).backward()
        for name, value in twin.values.items():
            close(subnets_of(model)[name].values.grad, value.grad, 1e-9, name)
    assert_one(model, twin)


@pytest.mark.parametrize("kind", [Head, Scaled])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_second_derivatives_are_refused(kind: Any, compiler: str) -> None:
    """Also where the first backward asks for none of the weight's gradient, and so makes none."""
    model, twin = twins(kind().double(), compiler=compiler, target=("first", "second"))
    x = torch.randn(4, 12, dtype=torch.float64)
    penalty(twin, x).backward()
    assert twin.values["second.weight"].grad is not None
    with pytest.raises(GradientError, match="create_graph"):
        penalty(model, x).backward()
    assert all(value.grad is None for value in values_of(model))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_what_the_model_is_given_keeps_its_own_derivatives(compiler: str) -> None:
    """An output that is an input is somebody else's, and so is whatever came before it."""
    model = losia_fx.transform(Head().double(), compiler=compiler, target=("first", "second"), rank_factor=0.5)
    leaf = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    results = model(leaf.square())
    (first,) = torch.autograd.grad(results["given"].sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(second, torch.full_like(leaf, 2.0))


@pytest.mark.parametrize("free_first", [True, False])
def test_weights_that_are_frozen_and_set_free_between_steps(free_first: bool) -> None:
    """A GAN's way. W asks for its gradient otherwise where it requires grad by itself."""
    model, twin = twins(WithHead(layers=1).double())
    weights = [subnet.weight for subnet in subnets_of(model).values()]
    optimizers = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(6):
        for weight in weights:
            weight.requires_grad_(free_first == (step % 4 < 2))
        zero(model, twin)
        backward(model, twin)
        assert all(weight.grad is None for weight in weights)
        for optimizer in optimizers:
            optimizer.step()
    assert_one(model, twin)


class Constrained(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_forward_that_gives_a_weight_other_memory_is_refused(compiler: str) -> None:
    model = Toy(layers=1)
    model.layers[0].mix = Constrained(16, 16)
    losia_fx.transform(model, compiler=compiler, rank_factor=0.25)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UnsupportedGraphError, match=r"layers.0.mix.weight: .*weight.copy_\(...\) under torch.no_grad"):
        loss_of(model, batch())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


class ToItsDtype(nn.Linear):
    """Converts itself in every forward, as SwitchTransformers' routers do (Module.to sets weight.data)."""

    dtype = torch.float64

    def forward(self, x: Tensor) -> Tensor:
        self.to(self.dtype)
        return super().forward(x)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_forward_that_converts_a_weight_to_what_it_is(compiler: str) -> None:
    model = Toy(layers=1).double()
    for layer in model.layers:
        layer.mix = ToItsDtype(16, 16, bias=False).double()
    plain = copy.deepcopy(model)
    losia_fx.transform(model, compiler=compiler, rank_factor=0.25)
    ids = batch()
    loss, expected = loss_of(model, ids), loss_of(plain, ids)
    loss.backward()
    expected.backward()
    close(loss, expected, 1e-12, "loss")
    for name, subnet in losia_fx.subnets(model).items():
        close(subnet.values.grad, plain.get_parameter(name).grad[subnet.rows][:, subnet.cols], 1e-12, name)
