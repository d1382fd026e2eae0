"""LoSiA-Pro's formula as plain modules, as one would write it by hand: what the passes have to beat."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losia_fx.config import LosiaConfig, subnet_size
from losia_fx.method.subnet import draw, gather

from .methods import Method, Trial, adamw, compiled_in_place
from .sizes import SEED, Setup, block_linears


class _ProLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, values, rows, cols = inputs
        ctx.save_for_backward(x if cols is None else x.index_select(-1, cols), weight, rows)
        ctx.dtype = values.dtype
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        kept, weight, rows = ctx.saved_tensors
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        picked = grad_y.index_select(-1, rows).flatten(0, -2)
        return grad_x, None, (picked.t() @ kept.flatten(0, -2)).to(ctx.dtype), None, None


class ProLinear(nn.Module):
    """A linear without bias that learns W[rows][:, cols]; cols None: by rows alone, as the head does.

    rows (r,) and cols (c,) int64; values (r, c), float32 where W is narrower.
    """

    def __init__(self, linear: nn.Linear, rows: Tensor, cols: Tensor | None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.rows, self.cols = nn.Buffer(rows), None if cols is None else nn.Buffer(cols)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.values = nn.Parameter(gather(self.weight.detach(), rows, cols).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ProLinear.apply(x, self.weight, self.values, self.rows, self.cols)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def write_back(self) -> None:
        new = self.values.to(self.weight.dtype)
        if self.cols is None:
            self.weight[self.rows] = new
        else:
            self.weight[self.rows[:, None], self.cols] = new


def replace_linears(setup: Setup, model: Any) -> list[ProLinear]:
    """Gives every linear of the model its ProLinear; rows and cols are drawn at random, and never change."""
    generator = torch.Generator().manual_seed(SEED)
    names = {module: name for name, module in model.named_modules()}
    made = []
    for linear in (*block_linears(model), model.lm_head):
        head = linear is model.lm_head
        rows_share = LosiaConfig.output_rank_factor if head else setup.size.rank_factor
        cols = linear.in_features if head else subnet_size(setup.size.rank_factor, linear.in_features)
        size = subnet_size(rows_share, linear.out_features), cols
        indices = [index.to(linear.weight.device) for index in draw(tuple(linear.weight.shape), size, generator)]
        made.append(ProLinear(linear, indices[0], None if head else indices[1]))
        model.set_submodule(names[linear], made[-1])
    return made


def _build(setup: Setup, mode: str) -> Trial:
    model = setup.model()
    linears = replace_linears(setup, model)
    optimizer = adamw(model.parameters())
    return Trial(compiled_in_place(model, mode), setup.batch, optimizer, write_back=partial(_write_back, linears))


def _write_back(linears: list[ProLinear]) -> None:
    for linear in linears:
        linear.write_back()


PRO = (Method("losia-pro, plain", _build, note="the formula as nn.Modules; the subnets stay where they are"),)
