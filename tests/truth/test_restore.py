"""restore() gives everything back; a transform or restore that fails leaves nothing, and no controller in the way."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import losia_fx
from losia_fx import LosiaError, OptimizerError, TransformError
from tests.support.toys import Toy, batch, fingerprint
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


def trained(model: nn.Module, twin: Twin, steps: int = 3) -> None:
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    with warned():  # of parts that run uncompiled
        for _ in range(steps):
            zero(model, twin)
            backward(model, twin)
            mine.step()
            expected.step()
        zero(model, twin)


def assert_plain(model: nn.Module, twin: Twin) -> None:
    """An ordinary model with the twin's weights: it computes, learns in full, and no controller follows."""
    ids = batch()
    with torch.no_grad():
        close(model(ids), twin(ids), 1e-9, "logits")
    parameters = dict(model.named_parameters())
    plain = twin.solid().requires_grad_(True)
    loss_of(model, ids).backward()
    loss_of(plain, ids).backward()
    by_plain_name = {name.replace("_orig_mod.", ""): p for name, p in parameters.items()}
    assert by_plain_name.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        close(by_plain_name[name].grad, parameter.grad, 1e-9, f"gradient of {name}")
    optim.SGD(model.parameters(), lr=0.1).step()
    optim.SGD(plain.parameters(), lr=0.1).step()
    for name, parameter in plain.named_parameters():
        close(by_plain_name[name], parameter, 1e-9, name)
    with pytest.raises(LosiaError):
        losia_fx.controller(model)


# -- compiled children, and the user's own compile -----------------------------------------------------------------


def wrapped_child(model: nn.Module) -> None:
    model.layers[0] = torch.compile(model.layers[0], backend="aot_eager")


def wrapped_leaf(model: nn.Module) -> None:
    model.head = torch.compile(model.head, backend="eager")
    model.layers[0].mlp.up = torch.compile(model.layers[0].mlp.up, backend="eager")


def child_in_place(model: nn.Module) -> None:
    model.layers[0].compile(backend="aot_eager")


def wrapped_in_wrapped(model: nn.Module) -> None:
    model.layers[0].mlp = torch.compile(model.layers[0].mlp, backend="eager")
    model.layers[0] = torch.compile(model.layers[0], backend="eager")


CHILDREN: dict[str, Callable[[nn.Module], None]] = {
    f.__name__: f for f in (wrapped_child, wrapped_leaf, child_in_place, wrapped_in_wrapped)
}


@pytest.mark.parametrize("when", ["before transform", "after transform"])
@pytest.mark.parametrize("name", CHILDREN)
def test_compiled_children(name: str, when: str) -> None:
    model = Toy(layers=1).double()
    plain = copy.deepcopy(model)
    if when == "before transform":
        CHILDREN[name](model)
    before = fingerprint(model)
    with warned():  # a head in a wrapper is not known as one
        losia_fx.transform(model, **STILL)
    twin = Twin(plain, subnets_of(model))
    if when == "after transform":
        CHILDREN[name](model)
    trained(model, twin)
    assert losia_fx.restore(model) is model
    if when == "before transform":
        assert fingerprint(model) == before
    assert_plain(model, twin)


@pytest.mark.parametrize("ran", [False, True])
def test_the_users_own_compile_comes_back(ran: bool) -> None:
    """model.compile(), then transform, then restore: it is compiled again, by the user's backend."""
    seen: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return gm.forward

    model = Toy(layers=1).double()
    plain = copy.deepcopy(model)
    model.compile(backend=backend)
    if ran:
        loss_of(model, batch()).backward()
        model.zero_grad()
    own, graphs = model._compiled_call_impl, len(seen)
    losia_fx.transform(model, **STILL)
    twin = Twin(plain, subnets_of(model))
    trained(model, twin)
    assert len(seen) == graphs, "the user's backend ran in place of ours"
    losia_fx.restore(model)
    assert model._compiled_call_impl is own
    assert_plain(model, twin)
    assert len(seen) > graphs, "it does not run again"


def test_a_copy_of_a_model_that_was_compiled() -> None:
    """deepcopy drops compiled calls: the copy restores to a plain, uncompiled model."""
    model = Toy(layers=1).double()
    plain = copy.deepcopy(model)
    model.compile(backend="eager")
    losia_fx.transform(model, **STILL)
    twin = Twin(plain, subnets_of(model))
    trained(model, twin)
    other = copy.deepcopy(model)
    assert losia_fx.restore(other)._compiled_call_impl is None
    assert_plain(other, twin)
    assert_one(model, twin)


def test_transform_and_restore_again_and_again() -> None:
    """Nothing adds up: hooks, attributes, flags, tables; and every round trains on."""
    model = Toy(layers=1).double()
    model.embed.weight.requires_grad_(False)
    before = fingerprint(model)
    for _ in range(4):
        plain = copy.deepcopy(model)
        losia_fx.transform(model, **STILL)
        twin = Twin(plain, subnets_of(model))
        trained(model, twin, steps=2)
        losia_fx.restore(model)
        assert fingerprint(model) == before
        ids = batch()
        with torch.no_grad():
            close(model(ids), twin(ids), 1e-9, "logits")
    with pytest.raises(TransformError):
        losia_fx.restore(model)


def test_restore_takes_the_last_change_of_the_subnets_along() -> None:
    model, twin = twins()
    trained(model, twin)
    with torch.no_grad():
        for values in (values_of(model), twin.parameters()):
            torch._foreach_mul_(values, -1.5)
    losia_fx.restore(model)
    assert_plain(model, twin)


def test_an_optimizer_left_over_changes_nothing() -> None:
    """Its parameters are no longer of any model; its steps move them, which is said once."""
    model, twin = twins()
    optimizer = sgd(values_of(model))
    backward(model, twin)
    losia_fx.restore(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warned() as said:
        for _ in range(3):
            optimizer.step()
    assert len(said) == 1, said
    assert "losia_fx.restore has taken off" in said[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("beside", [False, True])
def test_an_optimizer_of_the_subnets_before_these_is_refused(beside: bool) -> None:
    """A Trainer keeps its optimizer over restore() and transform(). beside: it holds what learns in full too."""
    options = {**STILL, "trainable": ("norm",)} if beside else STILL
    model = losia_fx.transform(Toy(layers=1), **options)
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    losia_fx.transform(losia_fx.restore(model), **options)
    loss_of(model, batch()).backward()
    refused(optimizer.step, model, "SGD", "losia_fx.restore took off", "new Trainer", error=OptimizerError)
    optimizer.add_param_group({"params": values_of(model)})  # of both it steps those that are
    optimizer.step()
    assert losia_fx.controller(model).step == 1


def test_a_state_left_over_is_freed() -> None:
    """Nothing process-wide keeps a restored model, or a dropped one, alive."""
    model, twin = twins()
    trained(model, twin)
    controller, weight = weakref.ref(losia_fx.controller(model)), weakref.ref(model.head.weight)
    losia_fx.restore(model)
    gc.collect()
    assert controller() is None
    del model, twin
    gc.collect()
    assert weight() is None


# -- what fails leaves nothing -------------------------------------------------------------------------------------


def broken_at(function: str, module: Any, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That call of a function of a module raises, once."""
    original, count = getattr(module, function), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise MemoryError("no memory left")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, failing)


PLACES = [
    ("register_parameter", nn.Module, 1),
    ("register_parameter", nn.Module, 3),
    ("register_buffer", nn.Module, 2),
    ("register_buffer", nn.Module, 7),
    ("register_state_dict_post_hook", nn.Module, 2),
    ("register_load_state_dict_post_hook", nn.Module, 4),
    ("randperm", torch, 2),
    ("requires_grad_", torch.Tensor, 4),
]


@pytest.mark.parametrize(("function", "module", "call"), PLACES)
def test_a_transform_that_fails_midway_leaves_the_model_as_it_was(
    function: str, module: Any, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out, or Ctrl-C comes: no attribute, no hook, no flag, no controller is left; a second try works."""
    model = Toy(layers=1).double()
    model.norm.weight.requires_grad_(False)
    plain, before = copy.deepcopy(model), fingerprint(model)
    with monkeypatch.context() as patch:
        broken_at(function, module, call, patch)
        try:
            losia_fx.transform(model, **STILL)
        except MemoryError:
            failed = True
        else:
            failed = False
    if not failed:
        pytest.skip(f"transform has no {call} calls of {function}")
    assert fingerprint(model) == before
    with pytest.raises(LosiaError):
        losia_fx.controller(model)
    other = Toy(layers=1).double()
    loss_of(other, batch()).backward()
    optim.SGD(other.parameters(), lr=0.1).step()  # which no controller minds
    ids = batch()
    loss_of(model, ids).backward()
    optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.zero_grad()
    model.load_state_dict(plain.state_dict())
    losia_fx.transform(model, **STILL)
    twin = Twin(plain, subnets_of(model))
    trained(model, twin)
    assert_one(model, twin)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_transform_that_torch_refuses(dtype: torch.dtype) -> None:
    """A weight in float8: said by us, with nothing left behind."""
    model = Toy(layers=1)
    before = fingerprint(model)
    model.layers[0].mix.weight = nn.Parameter(model.layers[0].mix.weight.detach().to(dtype), requires_grad=False)
    broken = fingerprint(model)
    try:
        with warned():
            losia_fx.transform(model, **STILL)
    except LosiaError as error:
        message = str(error)
    else:
        message = ""
        assert "layers.0.mix.weight" not in subnets_of(model)
        losia_fx.restore(model)
    assert not message or "float8" in message
    assert fingerprint(model) == broken
    assert before.keys() == broken.keys()
    other = Toy(layers=1)
    loss_of(other, batch()).backward()
    optim.SGD(other.parameters(), lr=0.1).step()


REMOVALS = [
    ("remove", torch.utils.hooks.RemovableHandle, 1),
    ("remove", torch.utils.hooks.RemovableHandle, 4),
    ("requires_grad_", torch.Tensor, 3),
    ("__delattr__", nn.Module, 2),
]


@pytest.mark.parametrize(("function", "module", "call"), REMOVALS)
def test_a_restore_that_fails_midway_can_be_finished(
    function: str, module: Any, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Toy(layers=1).double()
    plain, before = copy.deepcopy(model), fingerprint(model)
    losia_fx.transform(model, **STILL)
    twin = Twin(plain, subnets_of(model))
    trained(model, twin)
    with monkeypatch.context() as patch:
        broken_at(function, module, call, patch)
        try:
            losia_fx.restore(model)
        except MemoryError:
            failed = True
        else:
            failed = False
    if failed:
        other = Toy(layers=1).double()
        loss_of(other, batch()).backward()
        optim.SGD(other.parameters(), lr=0.1).step()
        losia_fx.restore(model)
    assert fingerprint(model) == before
    assert_plain(model, twin)


def test_a_model_whose_attributes_cannot_be_set() -> None:
    """Transform fails at once, in a way that leaves it as it was, or works."""

    class Locked(Toy):
        locked = False

        def __setattr__(self, name: str, value: Any) -> None:
            if self.locked:
                raise AttributeError(f"{name}: this model is locked")
            super().__setattr__(name, value)

    model = Locked(layers=1)
    Locked.locked = True
    before = fingerprint(model)
    try:
        losia_fx.transform(model, **STILL)
    except (AttributeError, LosiaError):
        pass
    else:
        loss_of(model, batch()).backward()
        losia_fx.restore(model)
    assert fingerprint(model) == before
    with pytest.raises(LosiaError):
        losia_fx.controller(model)


# -- a model that was torn apart -----------------------------------------------------------------------------------


def test_restore_of_a_model_whose_part_was_taken_away() -> None:
    """A head cut off, a block moved to another model: what is left is restored, what went has lost its subnets too."""
    model, twin = twins(Toy(layers=2).double())
    trained(model, twin)
    block = model.layers[1]
    model.layers = model.layers[:1]
    head = model.head
    model.head = nn.Identity()
    losia_fx.restore(model)
    for part in (model, block, head):
        assert not any("_losia" in key for module in part.modules() for key in module.__dict__)
        names = [name for name, _ in part.named_parameters()]
        assert not [name for name in names if "subnet" in name], names
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        close(head(x), x @ twin.weight("head.weight").T, 1e-9, "the head by itself")


def test_a_part_of_a_restored_model_is_plain_too() -> None:
    model, twin = twins()
    trained(model, twin)
    losia_fx.restore(model.layers[0])  # the model of which it is a part
    assert_plain(model, twin)
