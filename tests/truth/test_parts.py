"""Parts of a model called by themselves, and what they do with the weights beneath them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import losia_fx
from losia_fx.compile.backend import losia_backend
from tests.support.toys import Toy, batch
from tests.support.twin import close

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")


def attention(encoder: Any, x: Tensor) -> Tensor:
    """Takes the weight of its out_proj, and never calls that."""
    result: Tensor = encoder.layers[0].self_attn(x, x, x, need_weights=False)[0]
    return result


def layer(encoder: Any, x: Tensor) -> Tensor:
    """With gradients off all its weights go into one call, that of its child's out_proj among them."""
    result: Tensor = encoder.layers[0](x)
    return result


def layers(encoder: Any, x: Tensor) -> Tensor:
    for each in encoder.layers:
        x = each(x)
    return x


@torch.no_grad()
def add(values: Tensor) -> None:
    values.add_(0.5)


def add_to_data(values: Tensor) -> None:
    values.data.add_(0.5)


@pytest.mark.parametrize("write", [add, add_to_data])
@pytest.mark.parametrize("learns", [False, True], ids=["evaluated", "learning"])
@pytest.mark.parametrize("part", [attention, layer, layers])
def test_a_part_sees_what_was_written_to_the_subnets_beneath(
    part: Callable[[nn.Module, Tensor], Tensor], learns: bool, write: Callable[[Tensor], None]
) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).double().eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 16, dtype=torch.float64)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, period=1000)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    for _ in range(2):
        for subnet in losia_fx.subnets(model).values():
            write(subnet.values)
        with torch.set_grad_enabled(learns):
            found = part(model, x)
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            close(found.detach(), part(plain, x), 1e-12, "forward")


@pytest.mark.parametrize("learns", [False, True], ids=["evaluated", "learning"])
def test_a_write_to_data_after_many_uses_of_parts_alone(learns: bool) -> None:
    """The model itself is never called: no look at it compares values."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: Toy(layers=2) for name in ("actor", "critic")}).double()
    plain = copy.deepcopy(model)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, period=1000)
    x = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that parts run uncompiled
        for _ in range(20):
            model["actor"](x).square().mean().backward()
    for _ in range(3):
        for subnet in losia_fx.subnets(model).values():
            subnet.values.data.add_(0.1)
        with torch.set_grad_enabled(learns):
            found = model["actor"](x).detach()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            close(found, plain["actor"](x), 1e-12, "forward")


def of_input(part: nn.Module, x: Tensor) -> Tensor:
    return grad(lambda z: part(z).square().sum())(x)


def per_sample(part: nn.Module, x: Tensor) -> Tensor:
    """Of the weights by the names that the plain part has; the subnets are in them."""
    weights = {name: value.detach() for name, value in part.named_parameters() if name.endswith("weight")}

    def loss(given: dict[str, Tensor], z: Tensor) -> Tensor:
        result: Tensor = functional_call(part, given, (z,)).square().sum()
        return result

    found = vmap(grad(loss), (None, 0))(weights, x)
    return torch.cat([found[name].flatten() for name in found])


@pytest.mark.parametrize(
    "what",
    [
        lambda part, x: vmap(part)(x),
        lambda part, x: jvp(part, (x,), (x.flip(0),))[1],
        lambda part, x: jacrev(part)(x[0]),
        of_input,
        per_sample,
    ],
    ids=["vmap", "jvp", "jacrev", "grad", "per sample"],
)
@pytest.mark.parametrize("name", ["layers.0", "layers.0.mlp.up"])
def test_a_part_under_torch_func(name: str, what: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Toy().double(), torch.randn(3, 4, 16, dtype=torch.float64)
    plain = copy.deepcopy(model)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, period=1000)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(batch()).square().mean().backward()
    optimizer.step()
    plain.load_state_dict(model.state_dict())
    close(what(model.get_submodule(name), x), what(plain.get_submodule(name), x), 1e-9, name)


def test_gradients_of_what_learns_in_a_part_under_torch_func() -> None:
    """S given to a part by functional_call: its gradient is the block of the whole weight's, and nothing is written."""
    model, x = Toy().double(), torch.randn(3, 4, 16, dtype=torch.float64)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, period=1000)
    part, subnet = model.get_submodule("layers.0.mlp.up"), losia_fx.subnets(model)["layers.0.mlp.up.weight"]
    given = {name: value.detach() + 1 for name, value in part.named_parameters() if value.requires_grad}
    whole = {"weight": subnet.weight.detach().clone()}
    whole["weight"][subnet.rows.unsqueeze(-1), subnet.cols] += 1
    plain = nn.Linear(16, 24, bias=False).double()
    mine = grad(lambda values: functional_call(part, values, (x,)).square().sum())(given)
    dense = grad(lambda values: functional_call(plain, values, (x,)).square().sum())(whole)["weight"]
    (found,) = mine.values()
    close(found, dense[subnet.rows][:, subnet.cols], 1e-12, "gradient")
    close(subnet.weight.detach()[subnet.rows][:, subnet.cols], subnet.values.detach(), 0.0, "weight")


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_come_and_go_in_mid_run(kind: str, compiler: str) -> None:
    """Of a module whose graph is there already."""
    torch.manual_seed(0)
    model, ids = Toy(layers=2).double(), batch()
    plain = copy.deepcopy(model)
    losia_fx.transform(model, compiler=compiler, rank_factor=0.25, period=1000)
    for hooked in (False, True, False, True):
        losses = []
        for each in (model, plain):
            part: Any = each.get_submodule("layers.1.mlp.down")
            before = kind == "register_forward_pre_hook"
            hook = getattr(part, kind)((lambda m, a: (a[0] * 2,)) if before else (lambda m, a, out: out * 2))
            if not hooked:
                hook.remove()
            loss = each(ids).square().mean()
            each.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            hook.remove()
        close(*losses, 1e-12, "loss")
        for name, subnet in losia_fx.subnets(model).items():
            dense = plain.get_parameter(name).grad
            assert dense is not None
            assert subnet.values.grad is not None
            close(subnet.values.grad, dense[subnet.rows][:, subnet.cols], 1e-9, name)


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "results"])
def test_weights_given_to_a_part_get_the_gradient(leaves: bool) -> None:
    """By functional_call, fast weights among them; the model's own subnets get none."""
    model, x = Toy().double(), torch.randn(3, 4, 16, dtype=torch.float64)
    plain = copy.deepcopy(model)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, period=1000)
    found = []
    for each in (model, plain):
        part = each.get_submodule("layers.0")
        given = {name: p.detach() * 1.5 for name, p in part.named_parameters() if name.endswith("weight")}
        first = [value.requires_grad_() for value in given.values()]
        passed = given if leaves else {name: value * 2 for name, value in given.items()}
        functional_call(part, passed, (x,)).square().sum().backward()
        found.append([value.grad for value in first])
    for mine, other in zip(*found, strict=True):
        assert mine is not None
        assert other is not None
        close(mine, other, 1e-9, "gradient")
    assert all(subnet.values.grad is None for subnet in losia_fx.subnets(model).values())


@pytest.mark.parametrize("part", ["layers.0", "layers.0.mlp"])
def test_a_part_that_another_compiler_was_given(part: str) -> None:
    """It runs in eager mode where it learns: its subnets get their gradient."""
    model, x = Toy().double(), torch.randn(3, 4, 16, dtype=torch.float64)
    plain = copy.deepcopy(model)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, period=1000)
    compiled = torch.compile(model.get_submodule(part), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that parts run uncompiled
        compiled(x).square().sum().backward()
    plain.load_state_dict(model.state_dict())
    plain.get_submodule(part)(x).square().sum().backward()
    for name, subnet in losia_fx.subnets(model).items():
        expected = plain.get_parameter(name).grad
        assert (subnet.values.grad is None) == (expected is None), name
        if expected is not None:
            close(subnet.values.grad, expected[subnet.rows][:, subnet.cols], 1e-12, name)
    with torch.no_grad():
        close(compiled(x), plain.get_submodule(part)(x), 1e-12, "forward")


def test_a_backend_of_a_users_around_ours_keeps_its_graphs() -> None:
    graphs: list[int] = []

    def around(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        made: Callable[..., Any] = losia_backend(gm, inputs, options={"compiler": "eager", "rank_factor": 0.25})
        return made

    model = Toy(breaks=True).double()
    compiled = torch.compile(model, backend=around)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(batch()).square().mean().backward()
        optimizer.step()
    before = len(graphs)
    torch._dynamo.reset()
    compiled(batch()).square().mean().backward()
    assert len(graphs) == 2 * before
