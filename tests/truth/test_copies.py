"""Copies of a transformed model: what is written to the subnets of one is followed, and nothing of it is undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import losia_fx
from tests.support.toys import Toy, batch
from tests.support.twin import (
    Twin,
    assert_one,
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


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def in_place(values: nn.Parameter, to: Tensor) -> None:
    with torch.no_grad():
        values.copy_(to)


def data(values: nn.Parameter, to: Tensor) -> None:
    values.data.copy_(to)


def data_assigned(values: nn.Parameter, to: Tensor) -> None:
    values.data = to


COPIES: list[Callable[[nn.Module], Any]] = [copy.deepcopy, pickled, lambda model: copy.deepcopy(pickled(model))]
USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "training": lambda model, ids: logits(model(ids)).detach(),
    "evaluation": lambda model, ids: logits(torch.no_grad()(model)(ids)),
    "saving": lambda model, ids: logits(_plain(model.state_dict())(ids)).detach(),
}


def _plain(state: dict[str, Tensor]) -> nn.Module:
    plain = Toy(layers=1).double()
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("first", [False, True], ids=["before the first use", "after it"])
@pytest.mark.parametrize("write", [in_place, data, data_assigned])
@pytest.mark.parametrize("made", COPIES, ids=["deepcopy", "pickle", "of a copy"])
def test_a_write_to_the_subnets_of_a_copy(
    made: Callable[[nn.Module], Any], write: Callable[[nn.Parameter, Tensor], None], first: bool, use: str
) -> None:
    model, _ = twins(Toy(layers=1).double())
    mine, ids = made(model), batch()
    if first:
        mine(ids)
    twin = Twin(copy.deepcopy(losia_fx.restore(copy.deepcopy(model))), subnets_of(model))
    for name, subnet in losia_fx.subnets(mine).items():
        to = torch.randn_like(subnet.values)
        write(subnet.values, to.clone())
        twin.values[name].data.copy_(to)
    for _ in range(2):
        close(USES[use](mine, ids), logits(twin(ids)).detach(), 1e-12, "logits")


@pytest.mark.parametrize("unseen", [False, True])
def test_a_teacher_that_averages_what_learns(unseen: bool) -> None:
    """Its W follows its S, whether it is used meanwhile or at the end."""
    model, twin = twins(Toy(layers=1).double())
    teacher = copy.deepcopy(model)
    wanted = {name: value.detach().clone() for name, value in twin.values.items()}
    optimizers = torch.optim.SGD(values_of(model), lr=0.3), torch.optim.SGD(twin.parameters(), lr=0.3)
    for _ in range(4):
        zero(model, twin)
        backward(model, twin)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for mine, value in zip(values_of(teacher), values_of(model), strict=True):
                (mine.data if unseen else mine).lerp_(value, 0.25)
            for name, value in twin.values.items():
                wanted[name].lerp_(value, 0.25)
    for name, value in wanted.items():
        twin.values[name].data.copy_(value)
    ids = batch()
    close(logits(torch.no_grad()(teacher)(ids)), logits(twin(ids)).detach(), 1e-12, "logits")


@pytest.mark.parametrize("made", COPIES, ids=["deepcopy", "pickle", "of a copy"])
def test_a_copy_that_is_first_used_in_inference_mode_trains_in_parts(made: Callable[[nn.Module], Any]) -> None:
    """What was noted of it there is written again outside."""
    model, twin = twins(Toy(layers=1).double())
    mine = made(model)
    with torch.inference_mode():
        mine(batch())
    optimizers = []
    for values in (values_of(mine), twin.parameters()):
        optimizers += [torch.optim.SGD(values[:2], lr=0.1), torch.optim.SGD(values[2:], lr=0.1)]
    for _ in range(3):
        zero(mine, twin)
        backward(mine, twin)
        for optimizer in optimizers:
            optimizer.step()
    ids = batch()
    close(logits(mine(ids)).detach(), logits(twin(ids)).detach(), 1e-12, "logits")


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True])
def test_a_model_is_an_argument_of_a_spawned_process(used: bool) -> None:
    model, _ = twins(Toy(layers=1))
    if used:
        logits(model(batch())).sum().backward()
    process = mp.get_context("spawn").Process(target=losia_fx.subnets, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == 0


def _descend(values: list[nn.Parameter], model: Callable[[Tensor], Any], steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(values, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()


def _descend_in_a_fork(*args: Any) -> None:
    """It has none of the threads that torch, in the process that it is a copy of, computes with."""
    torch.set_num_threads(1)
    _descend(*args)


@pytest.mark.slow
def test_processes_that_train_one_model_in_shared_memory() -> None:
    """Hogwild, one after the other: while no subnet moves, each sees what the others did."""
    model, twin = twins(Toy(layers=1).double())
    model.share_memory()
    _descend(values_of(model), model, 3, seed=0)
    process = mp.get_context("fork").Process(target=_descend_in_a_fork, args=(values_of(model), model, 3, 1))
    process.start()
    process.join()
    assert process.exitcode == 0
    _descend(values_of(model), model, 3, seed=2)
    for seed in range(3):
        _descend(twin.parameters(), twin, 3, seed)
    ids = batch()
    close(logits(model(ids)).detach(), logits(twin(ids)).detach(), 1e-12, "logits")


@pytest.mark.slow
def test_processes_that_train_one_model_at_once() -> None:
    """What one reads while another writes the pair is no tear: S counts, which is what optimizers step."""
    model, _ = twins(Toy(layers=1).double())
    model.share_memory()
    context = mp.get_context("fork")
    processes = [
        context.Process(target=_descend_in_a_fork, args=(values_of(model), model, 60, seed)) for seed in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    model.state_dict()
    for subnet in subnets_of(model).values():
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols])


@pytest.mark.parametrize("share", ["all of it", "what learns"])
@pytest.mark.parametrize("schedule", ["async", "all", "static"])
def test_subnets_that_move_in_shared_memory_are_said_once(schedule: str, share: str) -> None:
    model, _ = twins(Toy(layers=1), schedule=schedule, period=2, importance="random")
    if share == "all of it":
        model.share_memory()
    for values in values_of(model):
        values.share_memory_()
    with warned() as said:
        _descend(values_of(model), model, 8, seed=0)
    assert len(said) == (schedule != "static"), said
    assert all("move in memory that processes share" in text for text in said)


def cloned(module: nn.Module) -> nn.Module:
    """As libraries of meta-learning do it: the tensors are others, all else that is in its __dict__ is the same."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {
        name: p if p is None else nn.Parameter(p.detach() * 2) for name, p in module._parameters.items()
    }
    clone._modules = {name: child and cloned(child) for name, child in module._modules.items()}
    return clone


def with_another_head(model: nn.Module) -> nn.Module:
    clone = copy.copy(model)
    clone._modules = {**model._modules, "head": nn.Linear(16, 3)}
    return clone


@pytest.mark.parametrize("learns", [False, True], ids=["evaluated", "learning"])
@pytest.mark.parametrize("made", [cloned, with_another_head])
def test_a_shallow_copy_does_not_run_the_original_unsaid(made: Callable[[nn.Module], nn.Module], learns: bool) -> None:
    model, twin = twins()
    clone = made(model)
    with torch.set_grad_enabled(learns):
        refused(lambda: clone(batch()), model, "shallow copy", "copy.deepcopy", "functional_call")
        if made is cloned:
            layers: Any = clone.layers
            refused(lambda: layers[0](torch.randn(2, 3, 16).double()), model, "shallow copy")
    assert_one(model, twin)


MOVING: dict[str, Any] = {"schedule": "async", "importance": "random", "period": 2, "rewarm": False}


def train(model: nn.Module, steps: int = 5) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    for _ in range(steps):
        model.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("first", ["copied", "written"])
def test_an_average_of_several_places_in_a_fresh_copy_is_said_once(first: str) -> None:
    """At each evaluation a new copy, with an average that is kept of what learns."""
    model, _ = twins(**MOVING)
    average = [value.detach().clone() for value in values_of(model)]
    train(model)
    with warned() as said:
        for _ in range(2):
            written = copy.deepcopy(model) if first == "copied" else model
            kept = [value.detach().clone() for value in values_of(written)]
            for value, mean in zip(values_of(written), average, strict=True):
                in_place(value, mean)
            shown = written if first == "copied" else copy.deepcopy(model)
            with torch.no_grad():
                shown(batch())
            for value, before in zip(values_of(written), kept, strict=True):
                in_place(value, before)
    assert len(said) == 1, said
    assert "have been elsewhere in their weights" in said[0]


def test_clients_whose_subnets_went_different_ways() -> None:
    """What learns is averaged between copies that have moved by themselves; the original has not."""
    model, _ = twins(**MOVING)
    clients = [copy.deepcopy(model) for _ in range(2)]
    for client in clients:
        train(client)
    for values in zip(*map(values_of, clients), strict=True):
        mean = torch.stack([value.detach() for value in values]).mean(0)
        for value in values:
            in_place(value, mean)
    with warned() as said, torch.no_grad():
        clients[0](batch())
    assert len(said) == 1, said
    assert "have been elsewhere in their weights" in said[0]


@pytest.mark.parametrize("still", [False, True], ids=["moving", "still"])
def test_gradients_taken_by_position_from_a_copy_that_was_trained(still: bool) -> None:
    """Reptile: exact while no subnet moves, and else said, once."""
    model, _ = twins(**({**MOVING, "schedule": "static"} if still else MOVING))
    optimizer = torch.optim.SGD(values_of(model), lr=0.5)
    with warned() as said:
        for _ in range(3):
            fast = copy.deepcopy(model)
            train(fast)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            for mine, other in zip(values_of(model), values_of(fast), strict=True):
                mine.grad = mine.detach() - other.detach()
            optimizer.step()
            if still:
                for name, value in model.state_dict().items():
                    close(value, (before[name] + fast.state_dict()[name]) / 2, 1e-12, name)
    assert len(said) == (0 if still else 1), said
    assert still or "Reptile" in said[0]


@pytest.mark.parametrize("write", [in_place, data])
@pytest.mark.parametrize("made", [copy.deepcopy, pickled])
@pytest.mark.parametrize("of", ["", "layers", "layers.0", "layers.0.mlp.up"])
def test_the_weights_of_a_copy_are_right_before_any_use(
    of: str, made: Callable[[nn.Module], nn.Module], write: Callable[[nn.Parameter, Tensor], None]
) -> None:
    """Whoever copies to convert (quantize_dynamic) takes them from there, also of a part."""
    model, _ = twins()
    optimizer = train(model, 6)
    for _ in range(2):
        name, subnet = "layers.0.mlp.up.weight", subnets_of(model)["layers.0.mlp.up.weight"]
        expected = model.get_parameter(name).detach().clone()
        new = subnet.values.detach() * 1.5 + 1
        expected[subnet.rows.unsqueeze(-1), subnet.cols] = new.to(expected.dtype)
        write(subnet.values, new)
        copied = made(model.get_submodule(of))
        close(copied.get_parameter(name.removeprefix(f"{of}.")).detach(), expected, 0.0, name)
        close(model.get_parameter(name).detach(), expected, 0.0, name)
    loss_of(model, batch()).backward()
    optimizer.step()


@pytest.mark.parametrize("still", [False, True], ids=["moved", "still"])
def test_what_learns_written_by_hand_into_a_model_made_anew(still: bool) -> None:
    """Of a run whose subnets have moved: said, once. Where they have not, it is right, and nothing is."""
    torch.manual_seed(0)
    model, _ = twins(**({**MOVING, "schedule": "static"} if still else MOVING))
    train(model, 4)
    torch.manual_seed(0)
    fresh, _ = twins(**MOVING)
    with warned() as said, torch.no_grad():
        for value, saved in zip(values_of(fresh), values_of(model), strict=True):
            value.copy_(saved)
        ids = batch()
        found = logits(fresh(ids))
        fresh.state_dict()
    if still:
        close(found, logits(model(ids)).detach(), 1e-9, "logits")
    assert len(said) == (0 if still else 1), said
    assert still or "nothing like those at their places" in said[0]


@pytest.mark.parametrize("made", [copy.deepcopy, pickled])
def test_a_copy_whose_parameters_are_copied_before_the_model(made: Callable[[Any], Any]) -> None:
    """Of an optimizer, say: the copy's weights were taken before what was written to the subnets was in them."""
    model, _ = twins()
    optimizer = train(model)
    for value in values_of(model):
        in_place(value, value.detach() * 1.5 + 1)
    copied = made({"optimizer": optimizer, "model": model})["model"]
    for mine, other in zip(values_of(model), values_of(copied), strict=True):
        close(other.detach(), mine.detach(), 0.0, "S")
    for (name, mine), other in zip(model.state_dict().items(), copied.state_dict().values(), strict=True):
        close(other, mine, 0.0, name)


def test_a_model_trains_on_after_a_copy_of_it_was_trained_and_nothing_is_said() -> None:
    """With a closure, and with two optimizers after one backward: no forward comes right before each step."""
    model, _ = twins(**MOVING)
    train(copy.deepcopy(model))
    first, *others = values_of(model)
    closed, by_turns = (
        torch.optim.SGD(values_of(model), lr=0.1),
        [torch.optim.SGD(v, lr=0.1) for v in ([first], others)],
    )

    def closure() -> float:
        model.zero_grad()
        loss = loss_of(model, batch())
        loss.backward()
        return float(loss)

    for _ in range(3):
        closed.step(closure)
    closed.param_groups.clear()
    for _ in range(3):
        closure()
        for optimizer in by_turns:
            optimizer.step()
