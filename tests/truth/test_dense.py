"""losia_fx.dense: the whole weight as a tensor whose gradient goes to the subnet, and to what is measured of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import losia_fx
from losia_fx import LosiaError, TransformError
from tests.support.pair import OPTIONS, PERIOD, Pair
from tests.support.toys import Toy, batch, loss_of, tiny_llama
from tests.support.twin import STILL, assert_one, close, subnets_of, twins, values_of, warned, zero
from tests.truth.test_outside_writes import Mixture

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")


def adamw(parameters: Any) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=5e-3)


class Headless(Toy):
    """Gives its hidden states: the head is for the loss to use, as fused cross-entropies do."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def fused_loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """In pieces, as they save memory."""
    pieces = zip(hidden[:, :-1].flatten(0, 1).split(4), ids[:, 1:].flatten().split(4), strict=True)
    losses = [F.cross_entropy(rows @ weight.T, targets, reduction="sum") for rows, targets in pieces]
    return torch.stack(losses).sum() / ids[:, 1:].numel()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_head_used_by_the_loss(compiler: str) -> None:
    """Trajectory, importance and re-selections of the eager reference, whose autograd sees the weight itself."""
    pair = Pair(adamw, Headless(layers=1).double(), compiler=compiler)
    start = {name: value.clone() for name, value in pair.reference.model.state_dict().items()}
    for _ in pair.steps():
        ids = batch()
        mine = fused_loss(pair.model(ids), losia_fx.dense(pair.model, "head.weight"), ids)
        plain = pair.reference.model
        expected = fused_loss(plain(ids), plain.head.weight, ids)
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=0)
        mine.backward()
        expected.backward()
        pair.finish()
    pair.assert_moved(start)
    assert {event.group for event in pair.controller.history} == {0, 1}


def test_a_head_used_by_the_model_and_by_the_loss() -> None:
    """Both uses count, in one backward and in two."""
    pair = Pair(adamw)
    for number in pair.steps():
        ids = batch()
        for call, weight in (
            (pair.model, losia_fx.dense(pair.model, "head.weight")),
            (pair.reference.model, pair.reference.model.head.weight),
        ):
            first, second = loss_of(call, ids), (weight @ weight.T).square().mean()
            if number % 2:
                (first + second).backward()
            else:
                first.backward()
                second.backward()
        pair.finish()


def test_a_penalty_on_every_weight() -> None:
    """Outside of the forward: decay towards zero by the loss, of whole weights, micro-batches and all."""
    pair = Pair(adamw)
    names = list(pair.subnets)

    def penalty(weights: list[Tensor]) -> Tensor:
        return sum(w.square().sum() + w.abs().sum() for w in weights) * 0.01  # type: ignore[return-value]

    for _ in pair.steps():
        for _ in range(2):
            mine, expected = pair.losses(batch())
            (mine + penalty([losia_fx.dense(pair.model, name) for name in names])).backward()
            plain = pair.reference.model
            (expected + penalty([plain.get_parameter(name) for name in names])).backward()
        pair.finish()


def test_a_penalty_alone() -> None:
    """No forward at all: the importance is that of the penalty."""
    pair = Pair(adamw)
    for _ in pair.steps():
        for name in pair.subnets:
            losia_fx.dense(pair.model, name).pow(4).sum().backward()
            pair.reference.model.get_parameter(name).pow(4).sum().backward()
        pair.finish()


def test_the_weight_as_it_is() -> None:
    model, twin = twins()
    for name in twin.values:
        whole, parameter = losia_fx.dense(model, name), model.get_parameter(name)
        assert torch.equal(whole, parameter)
        assert whole.requires_grad
        assert whole.dtype == parameter.dtype
        assert whole.shape == parameter.shape
        whole.sin().sum().backward()
        twin.weight(name).sin().sum().backward()
        close(subnets_of(model)[name].values.grad, twin.values[name].grad, 1e-12, f"gradient of {name}")
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_it_is_no_alias_that_a_step_changes_behind_autograd() -> None:
    """Taken, then a step, then the backward: torch's own error of a changed tensor, or the gradient of then."""
    model, twin = twins()
    name = "head.weight"
    mine, expected = losia_fx.dense(model, name).square().sum(), twin.weight(name).square().sum()
    with torch.no_grad():
        subnets_of(model)[name].values.mul_(2)
        model(batch())
    try:
        mine.backward()
    except RuntimeError as error:
        print(error)
        return
    expected.backward()
    close(subnets_of(model)[name].values.grad, twin.values[name].grad, 1e-12, "gradient")


@pytest.mark.parametrize("what", ["S", "W"])
def test_it_sees_what_was_written(what: str) -> None:
    model, twin = twins()
    name = "layers.0.mlp.up.weight"
    for _ in range(3):
        with torch.no_grad():
            if what == "S":
                subnets_of(model)[name].values.add_(1)
                twin.values[name].add_(1)
            else:
                model.get_parameter(name).mul_(1.5)
                twin.write(name, twin.weight(name) * 1.5)
        with warned():  # S that is written from elsewhere time after time is said
            close(losia_fx.dense(model, name).detach(), twin.weight(name).detach(), 1e-12, name)
    assert_one(model, twin)


def test_under_no_grad() -> None:
    model, twin = twins()
    with torch.no_grad():
        whole = losia_fx.dense(model, "head.weight")
        assert not whole.requires_grad
        close(whole, twin.weight("head.weight"), 0, "W")
    assert losia_fx.dense(model, "head.weight").requires_grad


def test_weights_without_a_subnet_are_the_parameters_themselves() -> None:
    model, _ = twins(trainable=("*norm*",))
    for name in ("embed.weight", "norm.weight", "layers.0.norm.bias"):
        assert losia_fx.dense(model, name) is model.get_parameter(name)


@pytest.mark.parametrize(
    ("name", "close_to"),
    [
        ("head.wieght", "head.weight"),
        ("layers.0.mlp.up", "layers.0.mlp.up.weight"),
        ("layer.0.mix.weight", "layers.0.mix.weight"),
        ("module.head.weight", "head.weight"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_close_ones(name: str, close_to: str) -> None:
    model, _ = twins()
    with pytest.raises(LosiaError) as caught:
        losia_fx.dense(model, name)
    assert name in str(caught.value)
    assert close_to in str(caught.value)


def test_a_name_that_is_like_nothing() -> None:
    model, _ = twins()
    with pytest.raises(LosiaError, match="zzz"):
        losia_fx.dense(model, "zzz")


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(TransformError, match="Toy"):
        losia_fx.dense(Toy(), "head.weight")


def test_wrappers_and_copies() -> None:
    model, twin = twins()
    other = copy.deepcopy(model)
    for around in (torch.compile(model, backend="eager"), nn.Sequential(model), other):
        losia_fx.dense(around, "head.weight").sum().backward()
    twin.weight("head.weight").sum().backward()
    expected = twin.values["head.weight"].grad
    assert expected is not None
    close(subnets_of(model)["head.weight"].values.grad, 2 * expected, 1e-12, "of the model, twice")
    close(subnets_of(other)["head.weight"].values.grad, expected, 1e-12, "of the copy")


def test_both_names_of_a_tied_weight() -> None:
    """The head's name and the embedding's are one weight, through its subnet or as it is."""
    frozen, _ = twins(Toy(layers=1, tied=True).double())
    assert losia_fx.dense(frozen, "head.weight") is frozen.embed.weight
    model, twin = twins(Toy(layers=1, tied=True).double(), train_tied_head=True)
    (name,) = [name for name in twin.values if name in ("embed.weight", "head.weight")]
    for alias in ("embed.weight", "head.weight"):
        zero(model, twin)
        losia_fx.dense(model, alias).cos().sum().backward()
        twin.weight(name).cos().sum().backward()
        close(subnets_of(model)[name].values.grad, twin.values[name].grad, 1e-12, alias)


def test_weights_of_experts() -> None:
    model, twin = twins(Mixture().double(), target=("experts", "head"))
    for name in twin.values:
        losia_fx.dense(model, name).cos().sum().backward()
        twin.weight(name).cos().sum().backward()
        close(subnets_of(model)[name].values.grad, twin.values[name].grad, 1e-12, name)


def test_a_narrow_weight() -> None:
    """bfloat16 as W is, its gradient in S's float32."""
    model, _ = twins(Toy(layers=1).bfloat16())
    name = "layers.0.mix.weight"
    subnet = subnets_of(model)[name]
    whole = losia_fx.dense(model, name)
    assert whole.dtype == torch.bfloat16
    (whole.float() * 3).sum().backward()
    assert subnet.values.grad is not None
    assert subnet.values.grad.dtype == torch.float32
    assert bool((subnet.values.grad == 3).all())


def test_in_a_loss_that_is_compiled() -> None:
    """Taken outside of it, or within."""
    model, twin = twins()

    def outside(weight: Tensor) -> Tensor:
        return weight.tanh().sum()

    def within() -> Tensor:
        return losia_fx.dense(model, "head.weight").tanh().sum()

    for _ in range(2):
        torch.compile(outside, backend="aot_eager")(losia_fx.dense(model, "head.weight")).backward()
        twin.weight("head.weight").tanh().sum().backward()
        close(subnets_of(model)["head.weight"].values.grad, twin.values["head.weight"].grad, 1e-12, "outside")
    zero(model, twin)
    torch.compile(within, backend="aot_eager")().backward()
    twin.weight("head.weight").tanh().sum().backward()
    close(subnets_of(model)["head.weight"].values.grad, twin.values["head.weight"].grad, 1e-12, "within")


def test_autograd_grad_with_respect_to_the_subnet() -> None:
    model, twin = twins()
    own = torch.autograd.grad(losia_fx.dense(model, "head.weight").exp().sum(), values_of(model)[-1])[0]
    expected = torch.autograd.grad(twin.weight("head.weight").exp().sum(), twin.values["head.weight"])[0]
    close(own, expected, 1e-12, "gradient")


def test_weights_of_transformers_stored_transposed() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    model, twin = twins(GPT2LMHeadModel(config).double())
    name = "transformer.h.0.mlp.c_fc.weight"
    losia_fx.dense(model, name).sin().sum().backward()
    twin.weight(name).sin().sum().backward()
    close(subnets_of(model)[name].values.grad, twin.values[name].grad, 1e-12, name)


# -- a weight that is used without it ------------------------------------------------------------------------------


def test_a_head_used_by_hand_without_dense_is_named_with_what_to_do() -> None:
    """No gradient reaches its S: it is named, and it alone, once, within a slot or two."""
    model = losia_fx.transform(Headless(layers=1).double(), **{**STILL, "schedule": "async", "period": PERIOD})
    optimizer = adamw(values_of(model))
    with warned() as said:
        for _ in range(4 * PERIOD):
            model.zero_grad()
            ids = batch()
            fused_loss(model(ids), model.head.weight, ids).backward()
            optimizer.step()
    assert len(said) == 1, said  # and not that the head's group keeps its place
    assert "head.weight" in said[0]
    assert "mix.weight" not in said[0]
    assert "dense" in said[0]


def test_a_group_without_a_gradient_is_named_whatever_the_schedule() -> None:
    """A block that the forward leaves out, under every schedule: its weights are named once."""
    for schedule in ("async", "sync", "static"):
        torch.manual_seed(0)
        model = losia_fx.transform(Toy(layers=2), **{**OPTIONS, "schedule": schedule, "compiler": "eager"})
        optimizer = adamw(values_of(model))
        skipped = model.layers[1]
        skipped.forward = lambda x: x
        with warned() as said:
            for _ in range(6 * PERIOD):
                model.zero_grad()
                loss_of(model, batch()).backward()
                optimizer.step()
        named = [message for message in said if "layers.1" in message]
        assert len(named) == 1, (schedule, said)
        assert not [message for message in said if "layers.0" in message or "head.weight" in message]


def test_a_part_in_the_graph_of_another_compiler_is_named() -> None:
    model = losia_fx.transform(Toy(layers=2).double(), **{**OPTIONS, "compiler": "eager", "importance": "random"})
    optimizer = adamw(values_of(model))
    parts = [torch.compile(lambda x: model.layers[0](x), backend="eager"), model.layers[1]]
    with warned() as said:
        for _ in range(6 * PERIOD):
            model.zero_grad()
            ids = batch()
            x = model.embed(ids)
            for part in parts:
                x = part(x)
            F.cross_entropy(model.head(model.norm(x))[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
    named = [message for message in said if "no gradient" in message]
    assert len(named) == 1, said
    assert "layers.0" in named[0]
    assert "another compiler runs" in named[0]
    assert "layers.1" not in named[0]


def test_a_weight_that_the_optimizer_does_not_hold_is_not_named() -> None:
    """A head left out of the optimizer on purpose."""
    model = losia_fx.transform(Toy(layers=1), **{**OPTIONS, "compiler": "eager", "importance": "random"})
    optimizer = adamw([s.values for name, s in subnets_of(model).items() if name != "head.weight"])
    with warned() as said:
        for _ in range(6 * PERIOD):
            model.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()
    assert not [message for message in said if "no gradient" in message or "do not learn" in message], said


def test_a_weight_that_is_idle_now_and_then_is_not_named() -> None:
    """Layer drop: no gradient in some steps, one within every slot."""
    model = losia_fx.transform(Toy(layers=2), **{**OPTIONS, "compiler": "eager", "importance": "random", "period": 4})
    optimizer = adamw(values_of(model))
    whole = type(model.layers[1]).forward
    for number in range(16):
        model.layers[1].forward = (lambda x: x) if number % 4 else whole.__get__(model.layers[1])
        model.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
    assert losia_fx.controller(model).step == 16


def test_a_llama_trained_by_a_fused_loss() -> None:
    """The base model's hidden states, the head by dense: as the whole model's own loss."""
    model, twin = twins(tiny_llama(layers=1).double())
    mine, expected = adamw(values_of(model)), adamw(twin.parameters())
    for _ in range(4):
        ids = batch()
        zero(model, twin)
        with warned():  # the base model is a part, called by itself: it runs uncompiled
            hidden = model.model(ids).last_hidden_state
            loss = fused_loss(hidden, losia_fx.dense(model, "lm_head.weight"), ids)
            loss.backward()
            other = fused_loss(
                twin(ids, output_hidden_states=True).hidden_states[-1], twin.weight("lm_head.weight"), ids
            )
            other.backward()
            close(loss, other, 1e-9, "loss")
            mine.step()
        expected.step()
    assert_one(model, twin)
