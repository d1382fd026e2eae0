"""What stands around a transformed model and cannot train its subnets: refused by name, with nothing changed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import losia_fx
from losia_fx import LosiaError, TransformError
from tests.support.toys import Toy, batch, loss_of
from tests.support.twin import STILL, refused, snapshot

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*reduction"),
    pytest.mark.filterwarnings("error::losia_fx.LosiaWarning"),
]


def transformed(layers: int = 2) -> nn.Module:
    return losia_fx.transform(Toy(layers=layers), **STILL)


def trained(model: nn.Module, call: Callable[..., Any] | None = None) -> None:
    loss_of(model if call is None else call, batch()).backward()
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    optimizer.zero_grad()


class OverTwo(nn.DataParallel[nn.Module]):
    """As DataParallel is over two devices, as far as a CPU can tell."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids = [0, 1]

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


class DeepSpeedEngine(nn.Module):
    """Has the name, the place and the attribute of deepspeed's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, and a process that has imported deepspeed."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    engine = types.ModuleType("deepspeed.runtime.engine")
    engine.DeepSpeedEngine = DeepSpeedEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, engine.__name__, engine)


def fsdp(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp_of_a_block(model: Any) -> nn.Module:
    model.layers[0] = fsdp(model.layers[0])
    return model  # type: ignore[no-any-return]


AROUND: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DataParallel": (OverTwo, "DataParallel"),
    "DeepSpeed": (DeepSpeedEngine, "DeepSpeed"),
    "within another": (lambda model: nn.Sequential(OverTwo(model)), "DataParallel"),
    "FSDP1": (fsdp, "FullyShardedDataParallel"),
    "FSDP1 of a block": (fsdp_of_a_block, "FullyShardedDataParallel"),
}


@pytest.mark.parametrize("way", AROUND)
def test_a_wrapper_is_refused_at_the_first_forward_that_learns(others: None, way: str) -> None:
    wrap, name = AROUND[way]
    model = transformed()
    ids = batch()
    with torch.no_grad():
        expected = model(ids)
    wrapped = wrap(model)
    message = refused(lambda: loss_of(wrapped, ids), wrapped, "DistributedDataParallel", error=TransformError)
    assert message.startswith(f"{name} and a transformed model: ")
    assert losia_fx.controller(model).step == 0
    assert all(parameter.grad is None for parameter in wrapped.parameters())
    with torch.no_grad():
        if way == "FSDP1":  # the weights that it puts into their places are of nobody
            refused(lambda: wrapped(ids), wrapped, name, error=TransformError)
        else:
            torch.testing.assert_close(wrapped(ids), expected)


@pytest.mark.parametrize("kind", [OverTwo, DeepSpeedEngine])
def test_a_wrapper_of_another_model_concerns_nobody(others: None, kind: Any) -> None:
    model, other = transformed(1), kind(Toy(layers=1))
    trained(model)
    assert losia_fx.controller(model).step == 1
    assert other(batch()) is not None


def test_data_parallel_on_one_device_is_the_model_itself() -> None:
    model = transformed(1)
    trained(model, nn.DataParallel(model))
    assert losia_fx.controller(model).step == 1


def test_the_road_that_the_messages_name_works() -> None:
    model = transformed(1)
    before = snapshot(model)
    trained(model, DistributedDataParallel(model))
    moved = {name for name, value in snapshot(model).items() if not torch.equal(before[name], value)}
    assert losia_fx.subnets(model).keys() <= moved


def renormed() -> nn.Module:
    model = Toy(layers=1)
    model.embed = nn.Embedding(*model.embed.weight.shape, max_norm=1.0)
    model.head.weight = model.embed.weight
    return model


def test_a_trained_head_whose_embedding_rewrites_it_in_every_forward() -> None:
    model = renormed()
    texts = ("embed.weight", "max_norm", "train_tied_head")
    refused(lambda: losia_fx.transform(model, **STILL, train_tied_head=True), model, *texts, error=TransformError)


@pytest.mark.parametrize("way", ["transform", "string"])
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_whose_gradient_somebody_waits_for(hook: str, way: str) -> None:
    """A mask of gradients, or an optimizer that steps in the backward: nothing would ever come of it."""
    model = Toy(layers=2)
    weight: Any = model.layers[1].mlp.up.weight  # type: ignore[union-attr]
    getattr(weight, hook)(lambda given: None)
    compiled: Any = torch.compile(model, backend="losia", options={"compiler": "eager"})
    ways = {"transform": lambda: losia_fx.transform(model, **STILL), "string": lambda: compiled(batch())}
    texts = ("layers.1.mlp.up.weight", "hooks on its gradient", "exclude")
    refused(ways[way], model, *texts, error=(TransformError, BackendCompilerFailed))


def test_hooks_that_were_taken_off_or_are_of_a_weight_that_stays_frozen() -> None:
    model = Toy(layers=2)
    model.layers[1].mlp.up.weight.register_hook(lambda grad: grad).remove()  # type: ignore[operator,union-attr]
    model.layers[0].mlp.up.weight.register_hook(lambda grad: grad)  # type: ignore[operator,union-attr]
    losia_fx.transform(model, **STILL, exclude=["layers.0.mlp.up"])
    assert "layers.1.mlp.up.weight" in losia_fx.subnets(model)


class LooksUpItsHead(Toy):
    """Takes the head's weight for its embedding, in the forward alone."""

    def __init__(self, by: str) -> None:
        super().__init__(layers=1)
        self.by = by

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.head.weight
        if self.by == "embedding":
            looked_up = F.embedding(ids, table, max_norm=1.0)
        elif self.by == "position":
            looked_up = F.embedding(ids, table, None, 1.0)
        else:
            bags = F.embedding_bag(ids.reshape(-1, 1), table, max_norm=1.0)
            looked_up = bags.unflatten(0, ids.shape)
        for layer in self.layers:
            looked_up = layer(looked_up)
        return self.head(self.norm(looked_up))


@pytest.mark.parametrize("by", ["embedding", "position", "embedding_bag"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_trained_head_that_the_forward_looks_up_and_rewrites(by: str, compiler: str) -> None:
    model = losia_fx.transform(LooksUpItsHead(by), **{**STILL, "compiler": compiler})
    with pytest.raises(LosiaError, match=r"head\.weight: an embedding with max_norm rewrites it .* in exclude"):
        trained(model)


def test_an_embedding_that_is_renormed_and_does_not_learn() -> None:
    """Torch writes to it in the forward, which is the model's own affair."""
    model = losia_fx.transform(renormed(), **STILL)
    before = model.embed.weight.detach().clone()
    trained(model)
    assert not torch.equal(before, model.embed.weight)


class Constrained(nn.Linear):
    """Keeps its rows short by itself, as constraints of networks for EEG do."""

    max_norm = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, p=2, dim=0, maxnorm=self.max_norm))
        return super().forward(x)


def test_a_linear_with_a_max_norm_of_its_own_is_none_of_an_embedding() -> None:
    model = Toy(layers=1)
    width = model.layers[0].mix.in_features
    model.layers[0].mix = Constrained(width, width)
    trained(losia_fx.transform(model, **STILL))
    assert (model.layers[0].mix.weight.norm(dim=1) < 1.1).all()
