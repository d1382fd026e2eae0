"""Two processes under DistributedDataParallel that do what its users do beside training; as tests/loop/ddp_worker.py.

python ddp_worker.py RESULTS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import losia_fx
from tests.loop.ddp_worker import adamw, joined_batches, mine, model_of, outcome, run
from tests.support.pair import PERIOD
from tests.support.toys import Toy, batch, loss_of

STEPS = PERIOD + 2
Beside = Callable[[nn.Module, Tensor], Any]


def steps(
    model: nn.Module, optimizer: optim.Optimizer, before: Beside | None = None, between: Beside | None = None
) -> Any:
    ddp = DistributedDataParallel(model)
    for ids in joined_batches(STEPS):
        if before is not None:
            before(model, ids)
        loss_of(ddp, mine(ids)).backward()
        if between is not None:
            between(model, ids)
        optimizer.step()
        optimizer.zero_grad()
    return {**outcome(model), "left_out": losia_fx.controller(ddp).left_out}


def a_bare_forward() -> Any:
    """Of the module itself, with gradients on: to log something, before the step and after it."""
    model = model_of()
    return steps(model, adamw(model), loss_of, loss_of)


def a_bare_forward_on_one_rank() -> Any:
    def shown(model: nn.Module, ids: Tensor) -> None:
        if dist.get_rank() == 0:
            loss_of(model, ids)

    model = model_of()
    return steps(model, adamw(model), shown, shown)


def an_evaluation_on_one_rank() -> Any:
    def shown(model: nn.Module, ids: Tensor) -> None:
        if dist.get_rank() == 0:
            with torch.no_grad():
                loss_of(model.eval(), ids)
            model.train()

    model = model_of()
    return steps(model, adamw(model), shown, shown)


def a_second_wrapper() -> Any:
    """Another model, plain, under a DistributedDataParallel of its own, is run between the backward and the step."""
    other = DistributedDataParallel(Toy(layers=1).double())
    model = model_of()
    return steps(model, adamw(model), between=lambda _, ids: loss_of(other, ids).backward())


def zero_redundancy() -> Any:
    model = model_of()
    learning = [p for p in model.parameters() if p.requires_grad]
    return steps(model, ZeroRedundancyOptimizer(learning, optim.AdamW, lr=5e-3))


def zero_redundancy_in_one_bucket() -> Any:
    model = model_of()
    learning = [p for p in model.parameters() if p.requires_grad]
    return steps(model, ZeroRedundancyOptimizer(learning, optim.AdamW, parameters_as_bucket_view=True, lr=5e-3))


class Product(torch.autograd.Function):
    """A product that only autograd sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


class ByHand(nn.Linear):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight)  # type: ignore[no-any-return,no-untyped-call]


def an_unseen_product() -> Any:
    """DistributedDataParallel cannot average its gradient, and with unused parameters allowed it would not say so."""
    model = Toy(layers=1)
    model.layers[0].mlp.up = ByHand(16, 24, bias=False)
    ddp = DistributedDataParallel(losia_fx.transform(model, compiler="eager"), find_unused_parameters=True)
    try:
        loss_of(ddp, batch()).backward()
    except losia_fx.GradientError as error:
        return {"error": str(error)}


def uneven_batches() -> Any:
    """Join: a rank without batches would be waited for where importance is measured."""
    ddp = DistributedDataParallel(losia_fx.transform(Toy(layers=1), compiler="eager"))
    try:
        with Join([ddp]):
            loss_of(ddp, batch())
    except losia_fx.TransformError as error:
        return {"error": str(error)}


def uneven_batches_of_still_subnets() -> Any:
    model = losia_fx.transform(Toy(layers=1).double(), schedule="static", compiler="eager")
    ddp, optimizer = DistributedDataParallel(model), adamw(model)
    with Join([ddp]):
        for ids in joined_batches(STEPS + dist.get_rank()):
            loss_of(ddp, mine(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
    values = {name: subnet.values.detach().clone() for name, subnet in losia_fx.subnets(model).items()}
    return {"state_dict": model.state_dict(), "values": values}


class Counting(Toy):
    """Has a buffer of its own."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 0 * self.seen


def buffers() -> Any:
    """What DistributedDataParallel sends round before a forward."""
    model: Any = losia_fx.transform(Counting().double(), compiler="eager")
    ddp: Any = DistributedDataParallel(model)
    model.seen.fill_(dist.get_rank() + 1)
    loss_of(ddp, batch()).backward()
    held = {id(buffer) for buffer in ddp.modules_buffers}
    sent = [name for name, buffer in model.named_buffers() if id(buffer) in held]
    losia_fx.restore(model)
    left = [name for name in vars(model) if "ignore" in name]
    return {"sent": sent, "seen": float(model.seen), "left": left}


if __name__ == "__main__":
    sys.exit(
        run(
            [
                a_bare_forward, a_bare_forward_on_one_rank, an_evaluation_on_one_rank, a_second_wrapper,
                zero_redundancy, zero_redundancy_in_one_bucket, buffers, an_unseen_product,
                uneven_batches_of_still_subnets, uneven_batches,
            ]
        )
    )  # fmt: skip
