"""Narrow weights with a wide subnet, and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from tests.support.toys import Toy, batch, by_string, loss_of, plain_gradients

OPTIONS: dict[str, Any] = {"compiler": "aot_eager", "rank_factor": 0.25, "output_rank_factor": 0}


class Constant(nn.Module):
    """dL/dW is 1 everywhere, so an SGD step moves every learning weight by exactly the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8, bias=False))])
        nn.init.ones_(self.layers[0][0].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize("way", ["transform", "string"])
def test_updates_below_the_resolution_of_bfloat16_add_up(way: str) -> None:
    """At 1.0 bfloat16 steps by 2^-8 downwards; 100 updates of 2^-11 are lost one by one and 0.049 together."""
    lr, steps = 2.0**-11, 100
    model, x = Constant().bfloat16(), torch.ones(1, 8, dtype=torch.bfloat16)
    plain = copy.deepcopy(model)
    call: Any = model
    if way == "transform":
        losia_fx.transform(model, schedule="static", **OPTIONS)
    else:
        call = by_string(model, schedule="static", **OPTIONS)
    (plain_w,) = plain.parameters()
    optimizer = torch.optim.SGD([*model.parameters(), plain_w], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (call(x).sum() + plain(x).sum()).backward()
        optimizer.step()
    (subnet,) = losia_fx.subnets(model).values()
    assert subnet.weight.dtype == torch.bfloat16
    assert subnet.values.dtype == torch.float32
    assert torch.all(plain_w == 1.0)  # without the master copy nothing moves
    assert torch.all(subnet.values == 1.0 - steps * lr)
    block = subnet.weight[subnet.rows][:, subnet.cols]
    assert torch.equal(block, subnet.values.bfloat16())
    assert torch.all(block < 0.96)
    assert int((subnet.weight != 1.0).sum()) == block.numel() == 4


def test_re_selection_of_a_narrow_weight_gathers_what_the_weight_holds() -> None:
    model = Toy().bfloat16()
    losia_fx.transform(model, period=1, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
    assert len(losia_fx.controller(model).history) == 4
    assert losia_fx.controller(model).left_out == 0
    for subnet in losia_fx.subnets(model).values():
        assert torch.equal(subnet.values.bfloat16(), subnet.weight[subnet.rows][:, subnet.cols])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast_gradients_are_as_close_as_dense_autocasts(compiler: str, dtype: torch.dtype) -> None:
    model, ids = Toy(bias=True), batch(4, 12)
    truth = plain_gradients(model, ids)
    dense = copy.deepcopy(model)
    with torch.autocast("cpu", dtype):
        loss = loss_of(dense, ids)
    loss.backward()
    losia_fx.transform(model, trainable=("*bias",), **{**OPTIONS, "compiler": compiler, "output_rank_factor": 0.5})
    with torch.autocast("cpu", dtype):
        mine = loss_of(model, ids)
    mine.backward()
    torch.testing.assert_close(mine, loss, rtol=1e-3, atol=1e-3)
    for name, subnet in losia_fx.subnets(model).items():
        assert subnet.values.grad is not None
        assert subnet.values.grad.dtype == torch.float32
        exact, theirs = truth[name], dense.get_parameter(name).grad
        assert theirs is not None
        rows, cols = subnet.rows, subnet.cols
        error = (subnet.values.grad - exact[rows][:, cols]).norm()
        allowed = (theirs - exact)[rows][:, cols].norm()
        assert allowed > 0
        assert error <= 2 * allowed + 1e-6, f"{name}: {error} against {allowed}"
    for name, parameter in model.named_parameters():
        if name.endswith("mix.bias"):
            theirs = dense.get_parameter(name).grad
            assert parameter.grad is not None
            assert theirs is not None
            assert (parameter.grad - truth[name]).norm() <= 2 * (theirs - truth[name]).norm() + 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_changes_nothing_and_a_skipped_step_leaves_nothing(fused: bool) -> None:
    """Scaled and unscaled runs take the same path; an overflow is no step."""
    models = [Toy() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batches = [batch() for _ in range(6)]
    options = {**OPTIONS, "output_rank_factor": 0.25}
    for scaled, model in zip((False, True), models, strict=True):
        losia_fx.transform(model, period=2, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for index, ids in enumerate(batches):
            if scaled and index == 3:  # a step that overflows
                optimizer.zero_grad()
                scaler.scale(loss_of(model, ids) * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            scaler.scale(loss_of(model, ids)).backward()
            scaler.step(optimizer)
            scaler.update()
    one, two = (losia_fx.controller(model) for model in models)
    assert one.step == two.step == 6
    assert one.left_out == two.left_out == 0
    for name, subnet in losia_fx.subnets(models[0]).items():
        other = losia_fx.subnets(models[1])[name]
        assert torch.equal(subnet.rows, other.rows), name
        assert torch.equal(subnet.cols, other.cols), name
        torch.testing.assert_close(subnet.weight, other.weight, rtol=1e-4, atol=1e-5)
