"""Weights that were cut up over processes, before a transformation or after it: refused by name, nothing learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import losia_fx
from losia_fx import StateError, TransformError
from tests.support.toys import Toy, batch, loss_of
from tests.support.twin import STILL, snapshot
from tests.truth.test_refused import trained, transformed

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*reduction"),
    pytest.mark.filterwarnings("error::losia_fx.LosiaWarning"),
]


def sharded(*names: str) -> Callable[[nn.Module], None]:
    def shard(model: nn.Module) -> None:
        for name in names:
            fully_shard(model.get_submodule(name), mesh=init_device_mesh("cpu", (1,)))

    return shard


def distributed(*placements: Any) -> Callable[[nn.Module], None]:
    def distribute(model: nn.Module) -> None:
        linear: Any = model.get_submodule("layers.1.mlp.up")
        pieces = distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (1,)), placements)
        linear.weight = nn.Parameter(pieces, requires_grad=False)

    return distribute


PIECES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "fully_shard": (sharded("layers.0", "layers.1", ""), "layers.0.mix.weight, "),
    "fully_shard of the whole": (sharded(""), "layers.0.mix.weight, "),
    "one block": (sharded("layers.1"), "layers.1.mix.weight, layers.1.mlp.up.weight, "),
    "one DTensor": (distributed(Shard(0)), "layers.1.mlp.up.weight: sharded"),
    "one that is whole": (distributed(Replicate()), "layers.1.mlp.up.weight: sharded"),
}


def local(model: nn.Module) -> dict[str, Any]:
    return {name: getattr(value, "to_local", lambda v=value: v)().clone() for name, value in snapshot(model).items()}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("way", PIECES)
def test_weights_in_pieces_after_transform(way: str, steps: int) -> None:
    """Nothing learns, the head included: which is said at the forward, and at the step if it had come so far."""
    spread, name = PIECES[way]
    model = transformed()
    for _ in range(steps):
        trained(model)
    spread(model)
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = local(model)
    for use in (lambda: loss_of(model, batch()), lambda: losia_fx.state_dict(model), lambda: losia_fx.subnets(model)):
        with pytest.raises(StateError) as caught:
            use()
        assert name in str(caught.value)
        assert "DistributedDataParallel" in str(caught.value)
    for subnet in list(model.parameters()):
        subnet.grad = torch.ones_like(subnet) if subnet.requires_grad else None
    with pytest.raises(StateError, match="sharded"):
        optimizer.step()
    assert losia_fx.controller(model).step == steps
    for key, value in local(model).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("way", PIECES)
def test_weights_in_pieces_before_transform(way: str) -> None:
    spread, name = PIECES[way]
    model = Toy(layers=2)
    spread(model)
    asked = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    with pytest.raises(TransformError) as caught:
        losia_fx.transform(model, **STILL)
    assert name in str(caught.value)
    assert "DistributedDataParallel" in str(caught.value)
    assert asked == {key: parameter.requires_grad for key, parameter in model.named_parameters()}
