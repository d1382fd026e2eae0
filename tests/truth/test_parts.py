"""Parts of a model called by themselves, and what they do with the weights beneath them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
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
