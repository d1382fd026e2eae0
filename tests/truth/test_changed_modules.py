"""Modules that are changed after transform: an error names the weight and what to do, and nothing trains meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations, parametrize, prune

import losia_fx
from losia_fx import LosiaError, StateError
from tests.support.toys import Toy, batch, tiny_llama
from tests.support.twin import (
    STILL,
    Twin,
    assert_one,
    backward,
    close,
    loss_of,
    refused,
    subnets_of,
    twins,
    values_of,
    warned,
    zero,
)

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

NAME = "layers.0.mix.weight"


def sgd(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def owner(model: nn.Module) -> Any:
    return model.get_submodule(NAME.removesuffix(".weight"))


def key_of_subnet(model: nn.Module) -> str:
    values = subnets_of(model)[NAME].values
    return next(key for key, p in owner(model)._parameters.items() if p is values)


def another_module(model: nn.Module) -> None:
    model.layers[0].mix = nn.Linear(16, 16, bias=False).double()


def a_larger_module(model: nn.Module) -> None:
    model.layers[0].mix = nn.Linear(16, 16, bias=True).double()


def another_shape(model: nn.Module) -> None:
    owner(model).weight = nn.Parameter(torch.randn(12, 16, dtype=torch.float64))


def a_shape_transposed_in_place(model: nn.Module) -> None:
    owner(model).weight.data = torch.randn(16, 12, dtype=torch.float64)


def another_block(model: nn.Module) -> None:
    model.layers[0] = type(model.layers[0])(16, 24, False, False).double()


def fewer_blocks(model: nn.Module) -> None:
    model.layers = model.layers[:0]


def gone(model: nn.Module) -> None:
    model.layers[0].mix = nn.Identity()


def no_weight(model: nn.Module) -> None:
    owner(model).weight = None


def weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(owner(model))


def old_weight_norm(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(owner(model))


def spectral_norm(model: nn.Module) -> None:
    parametrizations.spectral_norm(owner(model))


def orthogonal(model: nn.Module) -> None:
    parametrizations.orthogonal(owner(model))


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(owner(model), "weight", Halved())


def pruned(model: nn.Module) -> None:
    prune.random_unstructured(owner(model), "weight", amount=0.5)


def subnet_parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(owner(model), key_of_subnet(model), Halved())


def subnet_pruned(model: nn.Module) -> None:
    prune.random_unstructured(owner(model), key_of_subnet(model), amount=0.5)


def subnet_gone(model: nn.Module) -> None:
    delattr(owner(model), key_of_subnet(model))


def another_subnet(model: nn.Module) -> None:
    """The optimizer goes on with the old one."""
    setattr(owner(model), key_of_subnet(model), nn.Parameter(torch.randn(4, 4, dtype=torch.float64)))


ON_MODULES = (another_module, a_larger_module, another_block, fewer_blocks, gone)
ON_WEIGHTS = (
    another_shape, a_shape_transposed_in_place, no_weight, weight_norm, old_weight_norm, spectral_norm, orthogonal,
    parametrized, pruned,
)  # fmt: skip
ON_SUBNETS = (subnet_parametrized, subnet_pruned, subnet_gone)
CHANGES: dict[str, Callable[[nn.Module], None]] = {f.__name__: f for f in (*ON_MODULES, *ON_WEIGHTS, *ON_SUBNETS)}


def is_told(action: Callable[[], Any], model: nn.Module) -> None:
    """``action`` ends in an error that names a weight of the change and the way out, and changes no parameter."""
    message = refused(action, model, "layers.0.", error=StateError)
    assert "restore" in message, message
    assert "transform" in message, message


def in_training() -> tuple[nn.Module, optim.Optimizer, Twin]:
    model, twin = twins(Toy(layers=1).double(), **{**STILL, "schedule": "async", "importance": "random", "period": 50})
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(2):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        expected.step()
    zero(model, twin)
    backward(model, twin)
    return model, mine, twin


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_forward_and_the_next_step_say_so(name: str) -> None:
    model, optimizer, _ = in_training()
    CHANGES[name](model)
    is_told(lambda: loss_of(model, batch()), model)
    is_told(optimizer.step, model)
    is_told(lambda: loss_of(model, batch()), model)  # again: it is no warning that comes once


@pytest.mark.parametrize("name", CHANGES)
def test_the_step_right_after_a_change_says_so(name: str) -> None:
    """On the gradients that are there: no forward has looked."""
    model, optimizer, _ = in_training()
    CHANGES[name](model)
    is_told(optimizer.step, model)


@pytest.mark.parametrize("name", [*CHANGES, "another_subnet"])
def test_a_changed_model_is_restored_and_transformed_again(name: str) -> None:
    """restore() does not mind what it finds; what is left is an ordinary model that trains, if it can at all."""
    model, optimizer, _ = in_training()
    {**CHANGES, "another_subnet": another_subnet}[name](model)
    assert losia_fx.restore(model) is model
    with pytest.raises(LosiaError):
        losia_fx.controller(model)
    assert not any(hasattr(module, "_losia_subnets") for module in model.modules())
    for parameter in model.parameters():
        parameter.grad = None
    if name in ("another_shape", "a_shape_transposed_in_place", "no_weight", "subnet_parametrized", "subnet_pruned"):
        return  # no model that runs, or one that still holds what was put upon its subnets
    loss_of(model, batch()).backward()
    assert model.head.weight.grad is not None
    for parameter in model.parameters():
        parameter.grad = None
    with warned():  # of what is reparametrised
        losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    again = sgd([p for p in model.parameters() if p.requires_grad])
    start = {name: s.weight.detach().clone() for name, s in subnets_of(model).items()}
    with warned():
        for _ in range(2):
            model.zero_grad()
            loss_of(model, batch()).backward()
            again.step()
    for changed, value in start.items():
        assert not torch.equal(subnets_of(model)[changed].weight, value), f"{changed} has not learned"
    assert losia_fx.controller(model).step == 2
    del optimizer


@pytest.mark.parametrize("name", CHANGES)
def test_the_report_does_not_tell_of_a_subnet_that_is_not_there(name: str) -> None:
    model, _, _ = in_training()
    CHANGES[name](model)
    said, row = "", None
    try:
        row = next((row for row in losia_fx.report(model).weights if row.name == NAME), None)
    except StateError as error:
        said = str(error)
    assert row is None or row.trained != "subnet", row
    assert not said or "layers.0." in said


def test_a_new_subnet_in_the_place_of_the_old_is_not_silent() -> None:
    """Its optimizer holds the old one: an error, or the new one is what the forward sees."""
    model, optimizer, twin = in_training()
    another_subnet(model)
    try:
        ids = batch()
        mine = loss_of(model, ids)
    except StateError:
        return
    with torch.no_grad():
        twin.values[NAME].copy_(subnets_of(model)[NAME].values)
    close(mine, loss_of(twin, ids), 1e-9, "loss")
    assert_one(model, twin)
    del optimizer


def test_a_change_that_is_taken_back_is_none() -> None:
    """A parametrization for an evaluation, a module tried in another's place: afterwards all is as before."""
    model, optimizer, twin = in_training()
    expected = sgd(twin.parameters())
    zero(model, twin)
    with torch.no_grad():
        held = model.layers[0].mix
        model.layers[0].mix = nn.Identity()
        model.layers[0].mix = held
        parametrized(model)
        parametrize.remove_parametrizations(owner(model), "weight", leave_parametrized=False)
    for _ in range(2):
        zero(model, twin)
        backward(model, twin)
        optimizer.step()
        expected.step()
    assert_one(model, twin)


@pytest.mark.parametrize("size", [48, 32])
def test_resized_token_embeddings(size: int) -> None:
    """transformers puts a new head in place of the old: said, and after restore and transform it trains."""
    model, _ = twins(tiny_llama(layers=1).double())
    optimizer = sgd(values_of(model))
    loss_of(model, batch()).backward()
    optimizer.step()
    model.zero_grad()
    loss_of(model, batch()).backward()
    model.resize_token_embeddings(size)
    ids = torch.randint(0, min(size, 40), (2, 6))
    for action in (lambda: loss_of(model, ids), optimizer.step):
        message = refused(action, model, "lm_head.weight", error=StateError)
        assert "restore" in message
        assert "transform" in message
    losia_fx.restore(model)
    assert model.lm_head.weight.shape == (size, 32)
    model, twin = twins(model)
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(3):
        zero(model, twin)
        backward(model, twin, ids)
        mine.step()
        expected.step()
    with torch.no_grad():
        close(model(ids).logits, twin(ids).logits, 1e-9, "logits")


def test_a_resize_to_the_same_size_is_not_silent() -> None:
    """transformers hands requires_grad of the frozen W on to all of the head, and so to its S: it learns, or is named.

    To the user nothing has happened: no size has changed.
    """
    model, _ = twins(tiny_llama(layers=1), schedule="async", period=2)
    optimizer = sgd(values_of(model))
    model.resize_token_embeddings(40)
    before = model.lm_head.weight.detach().clone()
    with warned() as said:
        for _ in range(5):
            model.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()
    named = [message for message in said if "lm_head.weight" in message]
    assert named or not torch.equal(model.lm_head.weight, before)


# -- flags ---------------------------------------------------------------------------------------------------------


def everything_learns(model: nn.Module, twin: Twin) -> tuple[optim.Optimizer, optim.Optimizer]:
    """Optimizers of all that requires grad: W too, which has no gradient of its own all the same."""
    twin.plain.requires_grad_(True)
    rest = [p for name, p in twin.plain.named_parameters() if name not in twin.values]
    return sgd([p for p in model.parameters() if p.requires_grad]), sgd([*twin.parameters(), *rest])


def assert_the_rest(model: nn.Module, twin: Twin) -> None:
    for name, parameter in twin.plain.named_parameters():
        if name not in twin.values:
            close(model.get_parameter(name), parameter, 1e-9, name)
    assert_one(model, twin)


def test_everything_is_made_to_require_grad() -> None:
    """model.requires_grad_(True) unfreezes what transform froze; a weight with a subnet goes on learning through it."""
    model, twin = twins()
    model.requires_grad_(True)
    mine, expected = everything_learns(model, twin)
    for _ in range(3):
        mine.zero_grad()
        expected.zero_grad()
        backward(model, twin)
        assert all(model.get_parameter(name).grad is None for name in twin.values)
        mine.step()
        expected.step()
    assert_the_rest(model, twin)


def test_flags_that_are_switched_off_and_on() -> None:
    """As a critic's are around the generator's step."""
    model, twin = twins()
    model.requires_grad_(True)
    mine, expected = everything_learns(model, twin)
    for _ in range(3):
        for plain in (model, twin.plain):
            plain.requires_grad_(False)
        for value in twin.parameters():
            value.requires_grad_(False)
        ids, x = batch(), torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
        loss_of(lambda given, x=x: model.head(x), ids).backward()
        found, x.grad = x.grad, None
        loss_of(lambda given, x=x: x @ twin.weight("head.weight").T, ids).backward()
        assert found is not None
        assert x.grad is not None
        close(found, x.grad, 1e-9, "what goes on to the generator")
        for plain in (model, twin.plain):
            plain.requires_grad_(True)
        for value in twin.parameters():
            value.requires_grad_(True)
        mine.zero_grad()
        expected.zero_grad()
        with warned():  # the head ran by itself
            backward(model, twin)
        mine.step()
        expected.step()
    assert_the_rest(model, twin)


class ByHand(nn.Module):
    """Uses its weight where neither a graph nor F.linear sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16, bias=False)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return x + x @ torch.tanh(self.mix.weight).T


def test_a_weight_used_by_hand_that_is_frozen_after_transform() -> None:
    toy = Toy(layers=2).double()
    toy.layers = nn.ModuleList(ByHand().double() for _ in range(2))
    model, twin = twins(toy)
    model.layers[1].requires_grad_(False)
    learns = [name for name in twin.values if not name.startswith("layers.1.")]
    mine, expected = sgd(values_of(model)), sgd([twin.values[name] for name in learns])
    for _ in range(3):
        ids = batch()
        model.zero_grad()
        expected.zero_grad()
        loss_of(twin, ids).backward()
        expected.step()
        with warned():  # outside of a graph
            loss_of(model, ids).backward()
            assert subnets_of(model)["layers.1.mix.weight"].values.grad is None
            mine.step()
    assert_one(model, twin)


def test_a_block_that_is_frozen_after_transform() -> None:
    """Its subnets are left alone, and nothing else minds."""
    model, twin = twins(Toy(layers=2).double())
    frozen = [name for name in twin.values if name.startswith("layers.1.")]
    model.layers[1].requires_grad_(False)
    held = [name for name in twin.values if name not in frozen]
    mine = sgd([subnets_of(model)[name].values for name in held])
    expected = sgd([twin.values[name] for name in held])
    for number in range(1, 4):
        ids = batch()
        model.zero_grad()
        expected.zero_grad()
        loss_of(model, ids).backward()
        loss_of(twin, ids).backward()
        assert all(subnets_of(model)[name].values.grad is None for name in frozen)
        mine.step()
        expected.step()
        assert losia_fx.controller(model).step == number
    assert_one(model, twin)


def test_weights_tied_after_transform() -> None:
    """One Parameter now serves the embedding as well: its block learns from both uses, or it is refused."""
    model, twin = twins()
    with torch.no_grad():
        model.head.weight = model.embed.weight
    ids, said = batch(), ""
    try:
        loss_of(model, ids).backward()
    except LosiaError as error:
        said = str(error)
    if said:
        assert "head.weight" in said
        return
    plain = twin.solid().requires_grad_(True)
    plain.head.weight = plain.embed.weight
    loss_of(plain, ids).backward()
    subnet = subnets_of(model)["head.weight"]
    block = plain.head.weight.grad[subnet.rows][:, subnet.cols]
    close(subnet.values.grad, block, 1e-9, "gradient of both uses")


def test_other_parts_of_a_model_may_change() -> None:
    """What holds no subnet is the user's own affair: a norm, a bias, another embedding, dropout put in between."""
    model, twin = twins(Toy(layers=1, bias=True).double())
    for plain in (model, twin.plain):
        torch.manual_seed(3)
        plain.norm = nn.LayerNorm(16, elementwise_affine=False).double()
        plain.embed = nn.Embedding(40, 16).double().requires_grad_(False)
        plain.layers[0].mix.bias = None
        plain.layers[0].mlp = nn.Sequential(plain.layers[0].mlp, nn.Tanh())
    ids = batch()
    try:
        mine = loss_of(model, ids)
    except StateError:
        return  # a module with subnets has another name now: to refuse that is right too
    close(mine, _loss_of_renamed(twin, ids), 1e-9, "loss")


def _loss_of_renamed(twin: Twin, ids: Tensor) -> Tensor:
    weights = {name.replace("layers.0.mlp.", "layers.0.mlp.0."): w for name, w in twin.weights().items()}
    return loss_of(lambda given: torch.func.functional_call(twin.plain, weights, (given,)), ids)


def test_a_changed_model_does_not_trouble_another() -> None:
    model, optimizer, _ = in_training()
    weight_norm(model)
    with pytest.raises(StateError):
        optimizer.step()
    other, twin = twins()
    mine, expected = sgd(values_of(other)), sgd(twin.parameters())
    for _ in range(2):
        zero(other, twin)
        backward(other, twin)
        mine.step()
        expected.step()
    assert_one(other, twin)
