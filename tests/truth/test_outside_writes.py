"""S or W written by something else than a followed step: whatever use comes first, it is right, or it raises."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import losia_fx
from losia_fx import StateError
from tests.support.toys import Toy, batch, tiny_llama
from tests.support.twin import (
    STILL,
    Twin,
    assert_one,
    assert_subnets,
    backward,
    close,
    logits,
    loss_of,
    refused,
    subnets_of,
    twins,
    values_of,
    warned,
    zero,
)

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

RATE = 0.5
RANDOM: dict[str, Any] = {"schedule": "async", "importance": "random", "period": 1000}


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)


# -- S is written --------------------------------------------------------------------------------------------------


@torch.no_grad()
def in_place(values: list[nn.Parameter]) -> None:
    for value in values:
        value -= RATE * value.grad


@torch.no_grad()
def foreach(values: list[nn.Parameter]) -> None:
    torch._foreach_add_(values, [value.grad for value in values], alpha=-RATE)


@torch.no_grad()
def from_masters(values: list[nn.Parameter]) -> None:
    masters = [value.clone() for value in values]
    for value, master in zip(values, masters, strict=True):
        value.copy_(master.add_(value.grad, alpha=-RATE))


def one_alone(values: list[nn.Parameter]) -> None:
    with torch.no_grad():
        values[1].neg_()


def data(values: list[nn.Parameter]) -> None:
    for value in values:
        value.data.add_(value.grad, alpha=-RATE)


def data_assigned(values: list[nn.Parameter]) -> None:
    for value in values:
        value.data = value.data - RATE * value.grad


def as_a_vector(values: list[nn.Parameter]) -> None:
    grads = torch.cat([value.grad.flatten() for value in values])
    vector_to_parameters(parameters_to_vector(values).detach() - RATE * grads, values)


def numpy(values: list[nn.Parameter]) -> None:
    for value in values:
        array = value.detach().numpy()
        array -= RATE * value.grad.numpy()


VERSIONED = {f.__name__: f for f in (in_place, foreach, from_masters, one_alone)}
UNVERSIONED = {f.__name__: f for f in (data, data_assigned, as_a_vector, numpy)}
S_WRITERS: dict[str, Callable[[list[nn.Parameter]], None]] = {**VERSIONED, **UNVERSIONED}


# -- the first use after a write -----------------------------------------------------------------------------------


def forward(model: nn.Module, twin: Twin) -> None:
    zero(model, twin)
    backward(model, twin)


@torch.no_grad()
def no_grad(model: nn.Module, twin: Twin) -> None:
    ids = batch()
    close(logits(model(ids)), logits(twin(ids)), 1e-9, "logits")


@torch.inference_mode()
def inference_mode(model: nn.Module, twin: Twin) -> None:
    ids = batch()
    close(logits(model(ids)), logits(twin(ids)), 1e-9, "logits")


@torch.no_grad()
def forward_method(model: nn.Module, twin: Twin) -> None:
    ids = batch()
    close(logits(model.forward(ids)), logits(twin(ids)), 1e-9, "logits")


@torch.no_grad()
def compiled_around(model: nn.Module, twin: Twin) -> None:
    ids = batch()
    close(torch.compile(model, backend="eager")(ids), logits(twin(ids)), 1e-9, "logits")


@torch.no_grad()
def part(model: nn.Module, twin: Twin) -> None:
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    close(model.layers[0].mlp(x), twin.solid().layers[0].mlp(x), 1e-9, "output of the part")
    close(model.layers[0](x), twin.solid().layers[0](x), 1e-9, "output of the block")


@torch.no_grad()
def owner(model: nn.Module, twin: Twin) -> None:
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for name in twin.values:
        module = name.removesuffix(".weight")
        given = x.repeat(1, 1, 2)[..., :24] if name.endswith("down.weight") else x
        close(model.get_submodule(module)(given), twin.solid().get_submodule(module)(given), 1e-9, name)


def part_with_gradients(model: nn.Module, twin: Twin) -> None:
    zero(model, twin)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    name = "layers.0.mlp.up.weight"
    with warned():  # it is said, at the next forward, that the part ran uncompiled
        output = model.layers[0].mlp.up(x)
        model(batch())
    expected = x @ twin.weight(name).T
    close(output, expected, 1e-9, "output of the part")
    output.square().sum().backward()
    expected.square().sum().backward()
    close(subnets_of(model)[name].values.grad, twin.values[name].grad, 1e-9, "gradient of S")


def state_dict(model: nn.Module, twin: Twin) -> None:
    state = model.state_dict()
    for name in twin.values:
        close(state[name], twin.weight(name).detach(), 1e-9, name)


def state_dict_of_a_part(model: nn.Module, twin: Twin) -> None:
    for prefix, child in model.named_children():
        for key, value in child.state_dict().items():
            if (name := f"{prefix}.{key}") in twin.values:
                close(value, twin.weight(name).detach(), 1e-9, name)


def checkpoint(model: nn.Module, twin: Twin) -> None:
    """The LoSiA state first, then the weights: another model goes on from both."""
    loads_elsewhere(losia_fx.state_dict(model), model.state_dict(), twin)


def checkpoint_weights_first(model: nn.Module, twin: Twin) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    loads_elsewhere(losia_fx.state_dict(model), weights, twin)


def loads_elsewhere(state: dict[str, Any], weights: dict[str, Tensor], twin: Twin) -> None:
    bound = ("rank_factor", "output_rank_factor", "period", "schedule", "importance")
    options = {name: state["config"][name] for name in bound}
    other = losia_fx.transform(Toy(layers=1).double(), compiler="eager", seed=9, **options)
    losia_fx.load_state_dict(other, state)
    other.load_state_dict(weights)
    forward(other, twin)
    sgd(values_of(other)).step()  # which raises where state and weights are of two minds
    sgd(twin.parameters()).step()
    assert_one(other, twin)


def deep_copy(model: nn.Module, twin: Twin) -> None:
    assert_one(copy.deepcopy(model), twin)


def saved_whole(model: nn.Module, twin: Twin) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_one(torch.load(file, weights_only=False), twin)


def step(model: nn.Module, twin: Twin) -> None:
    """Of an optimizer made now, on the gradients that are there."""
    sgd(values_of(model)).step()
    sgd(twin.parameters()).step()
    assert_subnets(model, twin)


def select(model: nn.Module, twin: Twin) -> None:
    """Subnets move: what S held stays behind in W."""
    for group in range(len(losia_fx.controller(model).groups)):
        losia_fx.controller(model).select(group)
    assert set(twin.follow(subnets_of(model))) == set(twin.values)
    assert_subnets(model, twin)


def restore(model: nn.Module, twin: Twin) -> None:
    plain = losia_fx.restore(model)
    for name in twin.values:
        close(plain.get_parameter(name), twin.weight(name), 1e-9, name)


def to_float32(model: nn.Module, twin: Twin) -> None:
    model.float()
    with torch.no_grad():
        ids = batch()
        close(model(ids), twin(ids).float(), 1e-5, "logits")


def report(model: nn.Module, twin: Twin) -> None:
    """Looking at it changes nothing."""
    str(losia_fx.report(model))
    assert_one(model, twin)


USES: dict[str, Callable[[nn.Module, Twin], None]] = {
    f.__name__: f
    for f in (
        forward, no_grad, inference_mode, forward_method, compiled_around, part, owner, part_with_gradients, state_dict,
        state_dict_of_a_part, checkpoint, checkpoint_weights_first, deep_copy, saved_whole, step, select, restore,
        to_float32, report,
    )
}  # fmt: skip


def begun(steps: int = 0, **options: Any) -> tuple[nn.Module, Twin]:
    """After that many followed steps, and a backward that none has taken."""
    model, twin = twins(**{**RANDOM, **options})
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(steps):
        backward(model, twin)
        mine.step()
        expected.step()
        zero(model, twin)
    backward(model, twin)
    return model, twin


LAST = ("restore", "to_float32", "checkpoint", "checkpoint_weights_first")
"""Uses that leave model and twin apart: they take new ones for every writer."""


def models(use: str, steps: int) -> Iterator[tuple[nn.Module, Twin]]:
    """The models for one writer after another, each with gradients."""
    model, twin = begun(steps)
    while True:
        yield model, twin
        if use in LAST:
            model, twin = begun(steps)
        else:
            zero(model, twin)
            backward(model, twin)


@pytest.mark.parametrize("use", USES)
def test_whatever_comes_first_sees_what_was_written_to_the_subnets(use: str) -> None:
    for writer, (model, twin) in zip(("in_place", "data", "as_a_vector"), models(use, 2), strict=False):
        print(writer)
        S_WRITERS[writer](values_of(model))
        S_WRITERS[writer](twin.parameters())
        with warned():  # S that is written from elsewhere time after time is said, and rightly
            USES[use](model, twin)


@pytest.mark.parametrize("use", ["forward", "no_grad", "state_dict"])
def test_every_way_of_writing_to_the_subnets(use: str) -> None:
    for writer, (model, twin) in zip(S_WRITERS, models(use, 0), strict=False):
        print(writer)
        S_WRITERS[writer](values_of(model))
        S_WRITERS[writer](twin.parameters())
        with warned():
            USES[use](model, twin)
            assert_one(model, twin)


def test_a_write_right_after_a_followed_step() -> None:
    """Deep in training, where nothing else has been written for long."""
    model, twin = begun(steps=12)
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for writer in (*VERSIONED, "data_assigned", "as_a_vector"):
        print(writer)
        mine.step()
        expected.step()
        S_WRITERS[writer](values_of(model))
        S_WRITERS[writer](twin.parameters())
        zero(model, twin)
        backward(model, twin)
    assert_one(model, twin)


# -- W is written --------------------------------------------------------------------------------------------------

Weights = dict[str, Tensor]


@torch.no_grad()
def copied(model: nn.Module, weights: Weights) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)


def data_copied(model: nn.Module, weights: Weights) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)


def data_set(model: nn.Module, weights: Weights) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).data = weight.clone()


def through_state_dict(model: nn.Module, weights: Weights) -> None:
    for name, value in model.state_dict().items():
        if name in weights:
            value.copy_(weights[name])


def loaded(model: nn.Module, weights: Weights) -> None:
    model.load_state_dict(weights, strict=False)


def assigned(model: nn.Module, weights: Weights) -> None:
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, strict=False, assign=True)


def new_parameters(model: nn.Module, weights: Weights) -> None:
    for name, weight in weights.items():
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, nn.Parameter(weight.clone()))


def deleted_and_registered(model: nn.Module, weights: Weights) -> None:
    for name, weight in weights.items():
        module, _, key = name.rpartition(".")
        owner = model.get_submodule(module)
        delattr(owner, key)
        owner.register_parameter(key, nn.Parameter(weight.clone(), requires_grad=False))


def whole_vector(model: nn.Module, weights: Weights) -> None:
    vector_to_parameters(parameters_to_vector(list(weights.values())), [model.get_parameter(n) for n in weights])


def numpy_copied(model: nn.Module, weights: Weights) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).detach().numpy()[:] = weight.numpy()


def out_of_place(model: nn.Module, weights: Weights) -> None:
    """As initialisers write: through several in-place operations."""
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        nn.init.zeros_(parameter)
        with torch.no_grad():
            parameter.add_(weight)


W_VERSIONED: dict[str, Callable[[nn.Module, Weights], None]] = {
    f.__name__: f for f in (copied, through_state_dict, loaded, out_of_place)
}
W_SWAPPED = {f.__name__: f for f in (data_set, assigned, new_parameters, deleted_and_registered, whole_vector)}
W_WRITERS = {**W_VERSIONED, **W_SWAPPED, **{f.__name__: f for f in (data_copied, numpy_copied)}}


def other_weights(twin: Twin) -> Weights:
    """New values for every weight with a subnet."""
    return {name: w.detach() * 0.9 + 0.05 * torch.randn_like(w) for name, w in twin.weights().items()}


def write(writer: str, model: nn.Module, twin: Twin, weights: Weights | None = None) -> None:
    weights = other_weights(twin) if weights is None else weights
    W_WRITERS[writer](model, weights)
    for name, weight in weights.items():
        twin.write(name, weight)


@pytest.mark.parametrize("use", USES)
def test_whatever_comes_first_sees_what_was_written_to_the_weights(use: str) -> None:
    writers = ("copied", "new_parameters") if use == "step" else ("copied", "data_copied", "new_parameters")
    for writer, (model, twin) in zip(writers, models(use, 2), strict=False):
        print(writer)
        write(writer, model, twin)
        USES[use](model, twin)


def test_training_goes_on_from_written_weights() -> None:
    """Nothing of a write is undone by the steps that follow, and what is new stays frozen."""
    for writer in W_WRITERS:
        print(writer)
        model, twin = begun(steps=2)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        mine, expected = sgd(values_of(model)), sgd(twin.parameters())
        write(writer, model, twin)
        for _ in range(3):
            zero(model, twin)
            backward(model, twin)
            mine.step()
            expected.step()
            assert_subnets(model, twin)
        assert_one(model, twin)
        assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
        assert all(model.get_parameter(name).grad is None for name in twin.values)


def test_weights_written_right_after_a_followed_step() -> None:
    model, twin = begun(steps=12)
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for writer in [*W_VERSIONED, *W_SWAPPED]:
        print(writer)
        mine.step()
        expected.step()
        write(writer, model, twin)
        zero(model, twin)
        backward(model, twin)
    assert_one(model, twin)


def test_weights_written_between_a_backward_and_its_step() -> None:
    model, twin = begun(steps=2)
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for writer in [*W_VERSIONED, *W_SWAPPED]:
        print(writer)
        write(writer, model, twin)
        mine.step()
        expected.step()
        assert_subnets(model, twin)
        zero(model, twin)
        backward(model, twin)
    assert_one(model, twin)


def test_reset_parameters() -> None:
    model, twin = begun(steps=2)
    for name in twin.values:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.reset_parameters()
        twin.write(name, module.weight)
    forward(model, twin)
    assert_one(model, twin)


def test_pruning_by_a_mask_of_ones_own_holds() -> None:
    """As people write it: weights that are zeroed after every step stay zero wherever no subnet learns."""
    model, twin = begun(steps=1)
    masks = {name: (torch.rand_like(weight) < 0.5).double() for name, weight in twin.weights().items()}
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(4):
        mine.step()
        expected.step()
        for name, mask in masks.items():
            with torch.no_grad():
                model.get_parameter(name).mul_(mask)
            twin.write(name, twin.weight(name) * mask)
        zero(model, twin)
        backward(model, twin)
    assert_one(model, twin)
    assert all(not (w.detach() * (1 - masks[name])).any() for name, w in model.named_parameters() if name in masks)


def restrained(how: str, weight: nn.Parameter) -> None:
    with torch.no_grad():
        if how == "no_grad":
            weight.renorm_(2, 0, 0.5)
        else:
            weight.data = weight.data.renorm(2, 0, 0.5)


@pytest.mark.parametrize("how", ["no_grad", "new data"])
def test_a_constraint_on_a_weight_after_every_step(how: str) -> None:
    """Rows are scaled down to a norm, by name: W alone is written, over re-selections too."""
    name = "head.weight"
    model, twin = begun(steps=1, period=3, rewarm=False)
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    moved = 0
    for _ in range(10):
        mine.step()
        expected.step()
        moved += len(twin.follow(subnets_of(model), expected))
        restrained(how, model.get_parameter(name))
        twin.write(name, twin.weight(name).detach().renorm(2, 0, 0.5))
        zero(model, twin)
        backward(model, twin)
    assert moved >= 4
    assert_one(model, twin)


# -- both are written ----------------------------------------------------------------------------------------------

ASKING = (
    "forward", "no_grad", "inference_mode", "part", "owner", "state_dict", "checkpoint", "step", "select",
)  # fmt: skip


def test_two_truths_are_an_error_that_names_the_weight() -> None:
    """At every use, again and again; nothing changes before somebody says which is meant."""
    model, twin = begun(steps=2)
    with torch.no_grad():
        subnets_of(model)["layers.0.mix.weight"].values.neg_()
        model.layers[0].mix.weight.add_(1)
    for use in ASKING:
        print(use)
        message = refused(lambda use=use: USES[use](model, twin), model, "layers.0.mix.weight", error=StateError)
        assert "head.weight" not in message, "only one weight was written"


def test_after_the_error_loading_weights_mends_it() -> None:
    model, twin = begun(steps=2)
    in_place(values_of(model))
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(StateError, match=r"head\.weight"):
        model(batch())
    weights = other_weights(twin)
    model.load_state_dict(weights, strict=False)
    for name, weight in weights.items():
        twin.write(name, weight)
    assert_one(model, twin)


def test_both_written_alike_is_no_error() -> None:
    """As whatever goes over all parameters does: an average of models, a clamp, a restored backup."""
    model, twin = begun(steps=2)
    for factor in (0.5, 2.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor).clamp_(-3, 3)
        for name, weight in twin.weights().items():
            twin.write(name, (weight * factor).clamp(-3, 3))
        twin.plain.load_state_dict({n: p for n, p in model.state_dict().items() if n not in twin.values}, strict=False)
        assert_one(model, twin)


def test_all_parameters_averaged_between_clients() -> None:
    """Federated averaging as it is written most often: over parameters(), of models of one seed, between rounds."""
    torch.manual_seed(0)
    plain = Toy(layers=1).double()
    clients = [twins(copy.deepcopy(plain), **RANDOM) for _ in range(2)]
    optimizers = [(sgd(values_of(model)), sgd(twin.parameters())) for model, twin in clients]
    for _ in range(3):
        for (model, twin), pair in zip(clients, optimizers, strict=True):
            for _ in range(2):
                zero(model, twin)
                backward(model, twin)
                for optimizer in pair:
                    optimizer.step()
        with torch.no_grad():
            for group in zip(*(model.parameters() for model, _ in clients), strict=True):
                mean = sum(group) / 2
                for parameter in group:
                    parameter.copy_(mean)
            for name in plain.state_dict().keys() & clients[0][1].values.keys():
                mean = sum(twin.weight(name) for _, twin in clients) / 2
                for _, twin in clients:
                    twin.write(name, mean)
        for model, twin in clients:
            assert_one(model, twin)


# -- what must not be touched --------------------------------------------------------------------------------------


def bfloat16() -> tuple[nn.Module, Twin]:
    """A model in bfloat16 whose S has bits that W does not hold, and its twin."""
    model, twin = twins(Toy(layers=1).to(torch.bfloat16), **RANDOM)
    mine, expected = (torch.optim.SGD(p, lr=1e-3) for p in (values_of(model), twin.parameters()))
    for _ in range(2):
        zero(model, twin)
        backward(model, twin, tolerance=1e-2)
        for value, own in zip(twin.parameters(), values_of(model), strict=True):
            value.grad = own.grad.clone()
        mine.step()
        expected.step()
    assert any((s.values != s.values.bfloat16().float()).any() for s in subnets_of(model).values())
    return model, twin


@pytest.mark.parametrize("how", ["by one", "elsewhere", "loaded", "a new Parameter"])
def test_bits_that_only_the_subnet_holds_survive_a_write_that_leaves_its_block(how: str) -> None:
    model, twin = bfloat16()
    before = {name: subnet.values.clone() for name, subnet in subnets_of(model).items()}
    if how == "by one":
        with torch.no_grad():
            torch._foreach_mul_([model.get_parameter(name) for name in twin.values], 1.0)
    elif how == "elsewhere":
        for name, subnet in subnets_of(model).items():
            block = twin.weight(name).detach()[subnet.rows][:, subnet.cols]
            with torch.no_grad():
                model.get_parameter(name).add_(1)
                model.get_parameter(name)[subnet.rows.unsqueeze(-1), subnet.cols] = block
    elif how == "loaded":
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    else:
        new_parameters(model, {name: model.state_dict()[name].clone() for name in twin.values})
    ids = batch()
    with torch.no_grad():
        model(ids)
    loss_of(model, ids).backward()
    for name, subnet in subnets_of(model).items():
        assert torch.equal(subnet.values, before[name]), name


def test_a_narrow_weight_written_gives_its_values_to_the_subnet() -> None:
    model, twin = bfloat16()
    weights = {name: (w.detach() * 1.5).contiguous() for name, w in twin.weights().items()}
    copied(model, weights)
    loss_of(model, batch()).backward()
    for name, subnet in subnets_of(model).items():
        assert torch.equal(subnet.values, weights[name][subnet.rows][:, subnet.cols].float()), name
        assert torch.equal(subnet.weight, weights[name]), name


def test_a_narrow_weight_follows_its_wide_subnet() -> None:
    """A change of S too small for bfloat16 stays in S; one that is not reaches W, rounded."""
    model, twin = bfloat16()
    with torch.no_grad():
        for values in (values_of(model), twin.parameters()):
            values[0].add_(1e-6)
            values[1].add_(0.1)
    loss_of(model, batch()).backward()
    for name, subnet in subnets_of(model).items():
        assert torch.equal(subnet.values, twin.values[name]), name
        assert torch.equal(subnet.weight, twin.weight(name)), name


def test_a_plain_run_warns_of_nothing_and_gathers_nothing() -> None:
    """Followed steps, evaluations, saving: S and W are never found apart, and S is the optimizer's to the bit."""
    model, twin = twins(**RANDOM)
    mine, expected = (torch.optim.AdamW(p, lr=0.05) for p in (values_of(model), twin.parameters()))
    with warned() as said:
        for _ in range(6):
            zero(model, twin)
            backward(model, twin)
            for value, own in zip(twin.parameters(), values_of(model), strict=True):
                value.grad = own.grad.clone()
            mine.step()
            expected.step()
            for value, own in zip(twin.parameters(), values_of(model), strict=True):
                assert torch.equal(value, own)
            no_grad(model, twin)
            state_dict(model, twin)
    assert said == []


# -- other kinds of models -----------------------------------------------------------------------------------------


def test_generate_after_a_write() -> None:
    model, twin = twins(tiny_llama().eval())
    prompt = torch.randint(1, 40, (2, 4))
    for _ in range(2):
        with torch.no_grad():
            for values in (values_of(model), twin.parameters()):
                for value in values:
                    value.mul_(-1.5)
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        mine = model.generate(prompt, **options)
        expected = twin.solid().generate(prompt, **options)
        close(torch.stack(mine.logits), torch.stack(expected.logits), 1e-4, "logits")
        assert torch.equal(mine.sequences, expected.sequences)


def test_save_pretrained_after_a_write(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, twin = twins(tiny_llama())
    with torch.no_grad():
        for values in (values_of(model), twin.parameters()):
            for value in values:
                value.add_(1)
    model.save_pretrained(tmp_path)
    state = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name in twin.values:
        close(state[name], twin.weight(name).detach(), 1e-6, name)


def test_a_delta_holds_what_was_written_to_the_subnets(tmp_path: Path) -> None:
    model, twin = twins(**RANDOM, track_delta=True)
    base = twin.solid()
    backward(model, twin)
    step(model, twin)
    for _ in range(2):
        in_place(values_of(model))
        in_place(twin.parameters())
    losia_fx.save_delta(model, tmp_path / "delta")
    losia_fx.load_delta(base, tmp_path / "delta")
    for name in twin.values:
        close(base.get_parameter(name), model.get_parameter(name), 0, name)
        close(base.get_parameter(name), twin.weight(name), 1e-9, name)


def test_a_delta_that_is_loaded_after_a_write_is_checked_against_what_is_there(tmp_path: Path) -> None:
    """The subnets have left the base, whose delta therefore does not apply."""
    model, twin = twins(**RANDOM, track_delta=True)
    untouched = losia_fx.transform(twin.solid(), **{**STILL, **RANDOM})
    backward(model, twin)
    step(model, twin)
    losia_fx.save_delta(model, tmp_path / "delta")
    with torch.no_grad():
        for value in values_of(untouched):
            value.add_(1)
    with pytest.raises(losia_fx.DeltaError):
        losia_fx.load_delta(untouched, tmp_path / "delta")


class Mixture(nn.Module):
    """A block of experts in one weight (E, out, in), as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Experts()])
        self.head = nn.Linear(8, 6, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.experts:
            x = layer(x)
        return self.head(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.up = nn.Parameter(torch.randn(3, 12, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        up = torch.bmm(self.mix(x).expand(3, -1, -1), self.up.transpose(1, 2)).tanh()
        return x + torch.bmm(up, self.down.transpose(1, 2)).sum(0)


@pytest.mark.parametrize("what", ["S", "W"])
def test_experts(what: str) -> None:
    model, twin = twins(Mixture().double(), target=("experts", "head"))
    assert any(subnet.values.dim() == 3 for subnet in subnets_of(model).values()), "no weight of experts"
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(3):
        if what == "S":
            with torch.no_grad():
                for values in (values_of(model), twin.parameters()):
                    for value in values:
                        value.mul_(-1)
        else:
            write("copied", model, twin)
        x = torch.randn(5, 8, dtype=torch.float64)
        close(model(x), twin(x), 1e-9, "output")
        for loss in (model(x).square().sum(), twin(x).square().sum()):
            loss.backward()
        mine.step()
        expected.step()
        zero(model, twin)
        assert_subnets(model, twin)


@pytest.mark.parametrize("what", ["S", "W"])
def test_a_tied_head_and_a_weight_of_two_modules(what: str) -> None:
    model, twin = twins(Toy(layers=1, tied=True).double(), train_tied_head=True)
    if what == "S":
        with torch.no_grad():
            for values in (values_of(model), twin.parameters()):
                for value in values:
                    value.add_(0.5)
    else:
        write("copied", model, twin)
    ids = batch()
    with torch.no_grad():
        close(model.embed(ids), twin.solid().embed(ids), 1e-9, "the embedding, by itself")
    assert_one(model, twin)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["S", "W"])
def test_compiled_graphs_see_what_was_written(what: str, compiler: str) -> None:
    model, twin = twins(**{**RANDOM, "compiler": compiler})
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(4):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        expected.step()
        if what == "S":
            in_place(values_of(model))
            in_place(twin.parameters())
        else:
            write("copied", model, twin)
        no_grad(model, twin)
    assert_one(model, twin)


@pytest.mark.parametrize("what", ["S", "W"])
def test_a_checkpointed_model(what: str) -> None:
    """The recomputation in the backward sees what the forward saw."""
    model, twin = twins(Toy(layers=1, checkpointed=True).double())
    twin.plain.checkpointed = False
    for _ in range(3):
        zero(model, twin)
        backward(model, twin)
        if what == "S":
            in_place(values_of(model))
            in_place(twin.parameters())
        else:
            write("copied", model, twin)
    assert_one(model, twin)


@pytest.mark.parametrize("write", ["in_place", "data"])
def test_a_load_of_other_weights_undoes_no_write_to_a_subnet(write: str) -> None:
    model, twin = begun(steps=1)
    for values in (values_of(model), twin.parameters()):
        for value in values:
            value.grad = torch.ones_like(value)
        S_WRITERS[write](values)
    loaded = {"norm.weight": torch.rand(16, dtype=torch.float64)}
    model.load_state_dict(loaded, strict=False)
    twin.plain.load_state_dict(loaded, strict=False)
    assert_one(model, twin)


@pytest.mark.parametrize("target", ["*.up", "*.mlp.*"])
@pytest.mark.parametrize("write", ["in_place", "data"])
def test_a_write_to_subnets_before_the_model_is_cast(write: str, target: str) -> None:
    model, twin = twins(Toy(layers=2 if target == "*.mlp.*" else 1), target=(target,), output_rank_factor=0)
    for _ in range(5):  # the first of them compare values in any case
        model.float()
    for values in (values_of(model), twin.parameters()):
        for value in values:
            value.grad = torch.ones_like(value)
        S_WRITERS[write](values)
    model.double()
    for name, weight in twin.weights().items():
        close(model.get_parameter(name).detach(), weight.detach().double(), 1e-9, name)
