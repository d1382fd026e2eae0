"""Weights that two models share, adapters, weights that are elsewhere (meta, offloaded), and other default devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import losia_fx
from losia_fx import LosiaError, LosiaWarning
from tests.support.pair import Pair
from tests.support.toys import Toy, batch, fingerprint, tiny_llama
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


def sgd(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1, momentum=0.9)


def refusal_of(action: Any, model: nn.Module) -> str:
    """The message of the error of ours that ``action`` ends in, with the model unchanged; "" where it does not."""
    before = fingerprint(model)
    try:
        action()
    except LosiaError as error:
        assert fingerprint(model) == before
        return str(error) or "no message"
    return ""


# -- two models, one weight ----------------------------------------------------------------------------------------


def sharing(what: str) -> tuple[nn.Module, nn.Module]:
    first, second = Toy(layers=1).double(), Toy(layers=1).double()
    if what == "parameter":
        second.head.weight = first.head.weight
        second.layers[0].mix.weight = first.layers[0].mix.weight
    elif what == "module":
        second.head = first.head
    elif what == "block":
        second.layers[0] = first.layers[0]
    else:  # the very memory, under two Parameters
        second.head.weight = nn.Parameter(first.head.weight.detach())
    return first, second


@pytest.mark.parametrize("what", ["parameter", "module", "block"])
def test_two_transformed_models_that_share_a_weight(what: str) -> None:
    """The second transform is refused by name and changes nothing; or both models are right, whichever is trained."""
    first, second = sharing(what)
    plain = copy.deepcopy(first)
    losia_fx.transform(first, **STILL)
    twin = Twin(plain, subnets_of(first))
    shared = {"parameter": "weight", "module": "head", "block": "layers.0"}[what]
    message = refusal_of(lambda: losia_fx.transform(second, **STILL), second)
    if message:
        assert shared in message or "transformed already" in message, message
    mine, expected = sgd(values_of(first)), sgd(twin.parameters())
    for _ in range(3):
        zero(first, twin)
        backward(first, twin)
        mine.step()
        expected.step()
    assert_one(first, twin)
    if message:
        with torch.no_grad():  # the plain one sees what the other has learned
            hidden = torch.randn(2, 3, 16, dtype=torch.float64)
            if what != "block":
                close(second.head(hidden), hidden @ twin.weight("head.weight").T, 1e-9, "output of the shared head")
        return
    again = sgd(values_of(second))
    other = Twin(losia_fx.restore(copy.deepcopy(second)), subnets_of(second))
    third = sgd(other.parameters())
    for _ in range(3):
        zero(second, other)
        backward(second, other)
        again.step()
        third.step()
    assert_one(second, other)
    ids = batch()
    with torch.no_grad():
        whole = losia_fx.restore(copy.deepcopy(first))
        close(first(ids), whole(ids), 1e-9, "the first model, after the second was trained")


@pytest.mark.parametrize("what", ["parameter", "module", "block", "memory"])
def test_a_plain_model_that_shares_a_weight_with_a_transformed_one(what: str) -> None:
    """A teacher or a critic on the same head: the plain model sees what is learned; each optimizer minds its own."""
    first, second = sharing(what)
    plain = copy.deepcopy(first)
    losia_fx.transform(first, **STILL)
    twin = Twin(plain, subnets_of(first))
    mine, expected = sgd(values_of(first)), sgd(twin.parameters())
    rest = sgd([second.embed.weight, second.norm.weight])
    for number in range(1, 4):
        zero(first, twin)
        backward(first, twin)
        mine.step()
        expected.step()
        with warned():  # a weight with a subnet ran in another model
            rest.zero_grad()
            loss_of(second, batch()).backward()
            zero(first, twin)
            rest.step()
            loss_of(first, batch())
        assert losia_fx.controller(first).step == number
    assert_one(first, twin)
    if what != "block":
        with torch.no_grad():
            hidden = torch.randn(2, 3, 16, dtype=torch.float64)
            close(second.head(hidden), hidden @ twin.weight("head.weight").T, 1e-9, "output of the shared head")


def test_a_model_within_a_larger_one_that_is_trained_in_full() -> None:
    """A transformed language model under a plain wrapper with a head of its own, one optimizer for both."""

    class Around(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.extra = inner, nn.Linear(40, 40).double()

        def forward(self, ids: Any) -> Any:
            return self.extra(self.inner(ids))

    torch.manual_seed(1)
    model, twin = twins()
    around = Around(model)
    other = copy.deepcopy(around.extra)
    mine = sgd([*values_of(model), *around.extra.parameters()])
    expected = sgd([*twin.parameters(), *other.parameters()])
    for number in range(1, 4):
        ids = batch()
        mine.zero_grad()
        expected.zero_grad()
        loss = loss_of(around, ids)
        wanted = loss_of(lambda given: other(twin(given)), ids)
        close(loss, wanted, 1e-9, "loss")
        loss.backward()
        wanted.backward()
        mine.step()
        expected.step()
        assert losia_fx.controller(around).step == number
    assert_one(model, twin)
    close(around.extra.weight, other.weight, 1e-9, "the plain layer")


# -- adapters ------------------------------------------------------------------------------------------------------


def test_adapters_do_not_get_subnets_of_their_own() -> None:
    """A PEFT model: refused by name, or its adapters learn in full or not at all; a block of a LoRA matrix is nothing.

    What the report says of them is what happens.
    """
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(layers=1), config)
    with warned():
        message = refusal_of(lambda: losia_fx.transform(model, **STILL), model)
    if message:
        assert "lora" in message.lower() or "peft" in message.lower() or "adapter" in message.lower(), message
        return
    assert not [name for name in subnets_of(model) if "lora_" in name]
    rows = {row.name: row for row in losia_fx.report(model).weights if "lora_" in row.name}
    before = {name: model.get_parameter(name).detach().clone() for name in rows}
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    with warned():
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()
    for name, row in rows.items():
        changed = not torch.equal(before[name], model.get_parameter(name))
        assert changed == (row.trained == "full"), row


def test_adapters_put_onto_a_transformed_model() -> None:
    """PEFT wraps the linears that hold subnets: an error, or a warning, or both still learn exactly."""
    peft = pytest.importorskip("peft")
    model = tiny_llama(layers=1).double()
    losia_fx.transform(model, **STILL)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warned() as said:
        try:
            wrapped = peft.get_peft_model(model, config)
            held = [p for p in wrapped.parameters() if p.requires_grad]
            for parameter in held:  # LoRA's B starts at zero, which hides the gradient to A
                if not parameter.any():
                    nn.init.normal_(parameter)
            plain = losia_fx.restore(copy.deepcopy(wrapped))
            ids = batch()
            loss_of(wrapped, ids).backward()
            plain.requires_grad_(True)
            loss_of(plain, ids).backward()
        except LosiaError:
            return
    if said and not any("ran outside" in message for message in said):
        return
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, subnet in subnets_of(wrapped).items():
        full = next(g for key, g in gradients.items() if key.replace("base_layer.", "").endswith(name))
        assert full is not None
        if subnet.values.requires_grad:  # PEFT freezes what it does not add
            block = full[subnet.rows][:, subnet.cols]
            close(subnet.values.grad, block, 1e-9, f"gradient of {name}")


# -- weights that are elsewhere ------------------------------------------------------------------------------------


def trains_exactly(model: nn.Module, twin: Twin) -> None:
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(3):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        expected.step()
    assert_one(model, twin)


def test_a_meta_model_that_is_filled_later() -> None:
    """Transformed on "meta", made real, loaded: refused by name at some point, or exact from there on."""
    plain = Toy(layers=1).double()
    with torch.device("meta"):
        model = Toy(layers=1).double()

    def filled() -> None:
        losia_fx.transform(model, **STILL)
        model.to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            if name not in dict(plain.named_parameters()):
                nn.init.zeros_(parameter)
        model.load_state_dict(plain.state_dict())
        subnets = subnets_of(model)
        for name, subnet in subnets.items():
            for index, size in ((subnet.rows, subnet.weight.shape[0]), (subnet.cols, subnet.weight.shape[1])):
                assert bool((index[1:] > index[:-1]).all()), f"{name}: indices are garbage"
                assert 0 <= int(index[0]) <= int(index[-1]) < size, f"{name}: indices are garbage"
        trains_exactly(model, Twin(copy.deepcopy(plain), subnets))

    try:
        filled()
    except LosiaError as error:
        message = str(error)
    else:
        message = ""
    assert not message or "meta" in message or "to_empty" in message, message


def test_a_transformed_model_that_is_emptied_and_loaded() -> None:
    """to_empty() leaves garbage in every parameter and buffer; rows and cols are not the checkpoint's to bring back."""
    plain = Toy(layers=1).double()
    model = losia_fx.transform(copy.deepcopy(plain), **STILL)
    places = {name: (s.rows.clone(), s.cols.clone()) for name, s in subnets_of(model).items()}

    def emptied() -> None:
        model.to_empty(device="cpu")
        for name, subnet in subnets_of(model).items():
            subnet.values.data.fill_(float("nan"))
            print(name, subnet.rows)
        model.load_state_dict(plain.state_dict())
        for name, subnet in subnets_of(model).items():
            assert torch.equal(subnet.rows, places[name][0]), f"{name}: rows are garbage"
            assert torch.equal(subnet.cols, places[name][1]), f"{name}: cols are garbage"
        trains_exactly(model, Twin(copy.deepcopy(plain), subnets_of(model)))

    try:
        emptied()
    except LosiaError as error:
        print(error)


def offloaded(how: str, model: nn.Module, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))  # type: ignore[no-any-return]
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))  # type: ignore
    return accelerate.dispatch_model(  # type: ignore[no-any-return]
        model, {"embed": "cpu", "layers": "disk", "norm": "cpu", "head": "cpu"}, main_device="cpu",
        offload_dir=str(folder), force_hooks=True,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["cpu", "disk", "some to disk"])
def test_an_offloaded_model(how: str, tmp_path: Path) -> None:
    """accelerate keeps its weights on "meta" and brings them for each forward: refused by name, nothing changed."""
    model = offloaded(how, Toy(layers=1), tmp_path)
    message = refusal_of(lambda: losia_fx.transform(model, **STILL), model)
    assert message, "transformed a model whose weights are not there"
    assert "meta" in message or "offload" in message, message
    assert "weight" in message
    with torch.no_grad():
        assert model(batch()).isfinite().all()


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_a_transformed_model_that_is_offloaded(how: str, tmp_path: Path) -> None:
    """An error of ours at the first forward; or the forward is right, and either learns or says that it does not."""
    model, twin = twins()
    with warned() as said:
        try:
            around = offloaded(how, model, tmp_path)
            ids = batch()
            loss = loss_of(around, ids)
        except LosiaError:
            return
        close(loss, loss_of(twin, ids), 1e-9, "loss")
        loss.backward()
        loss_of(twin, ids).backward()
    if said:
        return
    for name, subnet in subnets_of(model).items():
        close(subnet.values.grad, twin.values[name].grad, 1e-9, f"gradient of {name}")


# -- default devices and dtypes ------------------------------------------------------------------------------------


@pytest.fixture
def default_device() -> Iterator[Any]:
    yield torch.set_default_device
    torch.set_default_device(None)


def test_another_default_device(default_device: Any) -> None:
    """Tensors made without a device go elsewhere: ours say where they are made."""
    pair = Pair(lambda parameters: optim.SGD(parameters, lr=0.1))
    batches = [batch() for _ in pair.steps()]
    default_device("meta")
    for ids in batches:
        pair.step(ids=ids)
    assert pair.controller.history


def test_a_transform_under_another_default_device(default_device: Any) -> None:
    plain = Toy(layers=1).double()
    ids = [batch() for _ in range(4)]
    default_device("meta")
    model, twin = twins(plain, schedule="async", importance="random", period=2, rewarm=False)
    mine, expected = (optim.SGD(p, lr=0.1) for p in (values_of(model), twin.parameters()))
    for number in range(4):
        zero(model, twin)
        backward(model, twin, ids[number])
        mine.step()
        expected.step()
        twin.follow(subnets_of(model))
    state = losia_fx.state_dict(model)
    losia_fx.load_state_dict(model, state)
    default_device(None)
    assert_one(model, twin)


def test_another_default_dtype() -> None:
    """float64 by default: what is float32 by definition stays so, and the path is the same."""
    paths = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        plain = Toy(layers=1).float()
        torch.set_default_dtype(dtype)
        try:
            model, _ = twins(plain, schedule="async", period=2)
            optimizer = optim.SGD(values_of(model), lr=0.1)
            torch.manual_seed(5)
            for _ in range(5):
                model.zero_grad()
                loss_of(model, batch()).backward()
                optimizer.step()
            paths.append(losia_fx.state_dict(model))
        finally:
            torch.set_default_dtype(torch.float32)
    assert paths[0].keys() == paths[1].keys()
    for key, value in paths[0].items():
        other = paths[1][key]
        same = value.dtype == other.dtype and torch.equal(value, other) if torch.is_tensor(value) else value == other
        assert same, key


def test_the_refusals_change_nothing() -> None:
    """The helpers of this file notice a change."""
    model = Toy(layers=1)

    def spoil() -> None:
        model.extra = nn.Linear(2, 2)
        raise LosiaError("spoiled")

    with pytest.raises(AssertionError):
        refusal_of(spoil, model)
    refused(lambda: losia_fx.controller(model), model)
    assert issubclass(LosiaWarning, UserWarning)
