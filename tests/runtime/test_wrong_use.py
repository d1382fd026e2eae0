"""Wrong use answers with a clear error, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import losia_fx
from losia_fx import ConfigError, LosiaError, OptimizerError, TransformError
from tests.support.toys import Toy, assert_subnet_gradients, batch, by_string, fingerprint, loss_of, plain_gradients
from tests.support.twin import warned

OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25}


class NoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


def unchanged_by(model: nn.Module, action: Callable[[], Any], error: type[Exception], *texts: str) -> None:
    before, weights = fingerprint(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error) as caught:
        action()
    for text in texts:
        assert text in str(caught.value)
    assert fingerprint(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"rank_factor": 0}, ("rank_factor", "0", "(0, 1]")),
        ({"rank_factor": 1.5}, ("rank_factor", "1.5", "(0, 1]")),
        ({"rank_factor": -0.1}, ("rank_factor", "-0.1")),
        ({"rank_factor": float("nan")}, ("rank_factor", "nan")),
        ({"output_rank_factor": -1}, ("output_rank_factor", "-1")),
        ({"period": 0}, ("period", "0")),
        ({"period": 2.5}, ("period", "2.5")),
        ({"schedule": "asinc"}, ("schedule", "asinc", "async", "sync", "static")),
        ({"importance": "magic"}, ("importance", "magic", "mixed")),
        ({"compiler": "gcc"}, ("compiler", "gcc", "inductor")),
        ({"target": ("no_such_layer",)}, ("target", "no_such_layer")),
        ({"target": ("mix", "no_such_layer")}, ("target", "no_such_layer")),
        ({"exclude": ("no_such_layer",)}, ("exclude", "no_such_layer")),
        ({"trainable": ("no_such_norm",)}, ("trainable", "no_such_norm")),
        ({"rank_facter": 0.1}, ("rank_facter", "rank_factor")),
        ({"exclude": ("layers", "head")}, ("learn",)),
    ],
)
def test_transform_refuses(options: dict[str, Any], texts: tuple[str, ...]) -> None:
    model = Toy()
    unchanged_by(model, lambda: losia_fx.transform(model, **options), LosiaError, *texts)
    with pytest.raises(TransformError):
        losia_fx.controller(model)
    ids = batch()
    loss_of(model, ids).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_transform_refuses_a_model_without_linears() -> None:
    model = NoLinears()
    unchanged_by(model, lambda: losia_fx.transform(model), TransformError, "NoLinears", "Linear")


def test_transform_refuses_a_second_time() -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    controller = losia_fx.controller(model)
    unchanged_by(model, lambda: losia_fx.transform(model), TransformError, "restore")
    assert losia_fx.controller(model) is controller
    expected = plain_gradients(_plain(model), ids := batch())
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)


@pytest.mark.parametrize("part", ["layers.0", "layers.0.mlp", "head"])
def test_transform_refuses_a_part_of_a_transformed_model(part: str) -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    unchanged_by(model, lambda: losia_fx.transform(model.get_submodule(part)), TransformError)


def test_transform_refuses_a_model_with_a_transformed_part() -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    whole = nn.Sequential(model)
    unchanged_by(whole, lambda: losia_fx.transform(whole), TransformError)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_transform_refuses_a_wrapper(wrap: Callable[[nn.Module], Any]) -> None:
    wrapped = wrap(Toy())
    unchanged_by(wrapped, lambda: losia_fx.transform(wrapped, **OPTIONS), TransformError, "before")


@pytest.mark.parametrize("wrong", [None, 3, "model", lambda x: x])
def test_transform_refuses_what_is_no_module(wrong: Any) -> None:
    with pytest.raises(TransformError, match=type(wrong).__name__):
        losia_fx.transform(wrong)


def test_transform_refuses_a_config_that_is_none() -> None:
    model: nn.Module = Toy()
    wrong: Any = {"period": 3}
    unchanged_by(model, lambda: losia_fx.transform(model, wrong), ConfigError, "LosiaConfig")


def test_restore_refuses_a_plain_model() -> None:
    model = Toy()
    unchanged_by(model, lambda: losia_fx.restore(model), TransformError, "Toy")


# -- the backend string --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"rank_facter": 0.1}, ("rank_facter", "rank_factor")),
        ({"rank_factor": 2.0}, ("rank_factor", "2.0")),
        ({"period": 0}, ("period", "0")),
        ({"schedule": "asinc"}, ("schedule", "asinc")),
    ],
)
def test_wrong_options_reach_the_user_by_name(options: dict[str, Any], texts: tuple[str, ...]) -> None:
    model, ids = Toy(), batch()
    call = by_string(model, **options)
    unchanged_by(model, lambda: loss_of(call, ids), Exception, *texts)


@pytest.mark.parametrize("option", ["target", "exclude", "trainable"])
def test_patterns_that_match_nothing_by_string(option: str) -> None:
    model, ids = Toy(), batch()
    call = by_string(model, **{option: ("no_such_layer",)})
    unchanged_by(model, lambda: loss_of(call, ids), Exception, "no_such_layer")


def test_a_model_without_linears_by_string_runs_or_says_so() -> None:
    """Block compile hands over graphs without linears in good faith, so this is no error; the gradients are right."""
    model, ids = NoLinears(), batch()
    expected = plain_gradients(model, ids)
    loss_of(by_string(model), ids).backward()
    torch.testing.assert_close(model.embed.weight.grad, expected["embed.weight"])


def test_a_mode_is_refused_by_string() -> None:
    from losia_fx.compile.backend import losia_backend

    model = Toy()
    call: Any = torch.compile(model, backend=losia_backend, mode="max-autotune")
    unchanged_by(model, lambda: loss_of(call, batch()), Exception, "mode")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["compile then wrap", "wrap then compile", "compile in place"])
def test_ddp_is_refused_by_string(one_process: None, order: str) -> None:
    from losia_fx.compile.backend import losia_backend

    model, call = Toy(), None
    if order == "compile then wrap":
        call = DistributedDataParallel(by_string(model))
    elif order == "wrap then compile":
        call = by_string(DistributedDataParallel(model))
    else:
        model.compile(backend=losia_backend, options={"compiler": "aot_eager"})
        call = DistributedDataParallel(model)
    unchanged_by(model, lambda: loss_of(call, batch()), Exception, "losia_fx.transform", "DistributedDataParallel")


# -- optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_made_before_transform_is_refused(kind: Any) -> None:
    model = Toy()
    optimizer = kind(model.parameters(), lr=0.1)
    losia_fx.transform(model, **OPTIONS)
    optimizer.zero_grad()
    loss_of(model, batch()).backward()
    step = losia_fx.controller(model).step
    unchanged_by(model, optimizer.step, OptimizerError, kind.__name__, "before", "mix.weight")
    assert losia_fx.controller(model).step == step
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # and the right one works
    assert losia_fx.controller(model).step == step + 1


@pytest.mark.parametrize("frozen", [False, True])
def test_an_optimizer_of_all_but_the_subnets_is_said_once(frozen: bool) -> None:
    """As after get_peft_model, which freezes what it finds and whose adapters alone learn then."""
    model = losia_fx.transform(Toy(), **OPTIONS, trainable=("norm",))
    subnets = [subnet.values for subnet in losia_fx.subnets(model).values()]
    for values in subnets:
        values.requires_grad_(not frozen)
    held = {id(values) for values in subnets}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad and id(p) not in held], lr=0.1)
    with warned() as said:
        for _ in range(50):
            loss_of(model, batch()).backward()
            optimizer.step()
    (text,) = said
    assert "no optimizer has stepped" in text
    assert "mix.weight" in text
    assert ("get_peft_model" in text) == frozen


def test_optimizers_that_take_turns_are_no_cause_to_worry() -> None:
    model = losia_fx.transform(Toy(), **OPTIONS, trainable=("norm",))
    held = {id(subnet.values) for subnet in losia_fx.subnets(model).values()}
    learning = [p for p in model.parameters() if p.requires_grad]
    beside = torch.optim.SGD([p for p in learning if id(p) not in held], lr=0.1)
    ours = torch.optim.SGD([p for p in learning if id(p) in held], lr=0.1)
    with warned() as said:
        for number in range(60):
            loss_of(model, batch()).backward()
            (ours if number % 6 == 5 else beside).step()
    assert said == []


def test_an_optimizer_of_another_model_is_none_of_our_business() -> None:
    model, other = Toy(), Toy()
    losia_fx.transform(model, **OPTIONS)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(other, batch()).backward()
    optimizer.step()
    assert losia_fx.controller(model).step == 0


@pytest.mark.parametrize("way", ["transform", "string"])
def test_lbfgs_is_refused(way: str) -> None:
    model, ids = Toy(), batch()
    call: Any = model
    if way == "transform":
        losia_fx.transform(model, **OPTIONS)
    else:
        call = by_string(model, rank_factor=0.25)
        loss_of(call, ids).backward()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(call, ids)
        loss.backward()
        return float(loss)

    step: Any = optimizer.step
    unchanged_by(model, lambda: step(closure), OptimizerError, "LBFGS")


# -- the controller ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [-1, 3, 99])
def test_select_refuses_a_group_that_does_not_exist(group: int) -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    unchanged_by(model, lambda: losia_fx.controller(model).select(group), LosiaError, str(group))


def test_select_refuses_a_group_that_was_not_profiled() -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    unchanged_by(model, lambda: losia_fx.controller(model).select(1), LosiaError, "1", "profiled")
    assert not losia_fx.controller(model).history


@pytest.mark.parametrize("steps", [1, 2])
def test_select_refuses_a_group_that_was_not_profiled_right_after_a_slot(steps: int) -> None:
    model = Toy()
    losia_fx.transform(model, period=steps, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
    events = len(losia_fx.controller(model).history)
    with pytest.raises(LosiaError):
        losia_fx.controller(model).select(2)
    assert len(losia_fx.controller(model).history) == events == 1


def _plain(model: nn.Module) -> nn.Module:
    twin = Toy()
    twin.load_state_dict(model.state_dict())
    return twin
