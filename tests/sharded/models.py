"""Small models for the scenarios of worker.py: experts, checkpoints of all kinds, weights used by hand."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.support.toys import Block, Toy, tiny_llama
from tests.truth.test_custom_functions import Product


class Mixture(nn.Module):
    """Experts (E, in, out), each with a share of every token."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.up = nn.Parameter(torch.randn(experts, width, inner) / 4)
        self.down = nn.Parameter(torch.randn(experts, inner, width) / 4)
        self.router = nn.Linear(width, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        each = torch.bmm(F.gelu(torch.bmm(tokens.expand(self.num_experts, *tokens.shape), self.up)), self.down)
        return torch.einsum("etw,te->tw", each, self.router(tokens).softmax(-1)).view_as(x)


class MixtureBlock(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mixture = Mixture(experts, 16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixture(self.norm(x))


class SkippingBlock(Block):
    """Leaves its MLP out where it is told to."""

    skips = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x.cumsum(1) / 4)
        return x if self.skips else x + self.mlp(self.norm(x))


class Reentrant(Toy):
    """Its embedding has to learn, or nothing that goes into a block would ask for a gradient."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)  # type: ignore[assignment]
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Selective(Toy):
    """Keeps products with a weight, and makes the rest anew."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, context_fn=kept)  # type: ignore[assignment]
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def wrapped() -> nn.Module:
    model = Toy()
    model.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in model.layers)
    return model


def reentrant_llama() -> Any:
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return model.train()


@torch.compiler.disable
def product(x: Tensor, weight: Tensor) -> Tensor:
    return Product.apply(x, weight)  # type: ignore[no-any-return,no-untyped-call]


class ByHandBlock(Block):
    """Takes a weight of one of its modules by hand as well, where no graph sees it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + product(x, self.mix.weight) / 4  # type: ignore[no-any-return]


class WeightsByHand(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ByHandBlock(16, 24, False, False) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.head(x) + product(x, self.head.weight)  # type: ignore[no-any-return]


def skipping() -> nn.Module:
    model = Toy(layers=1)
    model.layers.append(SkippingBlock(16, 24, False, False))
    return model


def mixture(experts: int) -> nn.Module:
    model = Toy()
    model.layers = nn.ModuleList(MixtureBlock(experts) for _ in range(2))
    return model


MODELS = {
    "skipping": skipping,
    "experts": lambda: mixture(4),
    "three experts": lambda: mixture(3),
    "toy": lambda: Toy(),
    "three layers": lambda: Toy(layers=3),
    "eighths": lambda: Toy(inner=32),
    "large": lambda: Toy(width=128, inner=256),
    "uneven": lambda: Toy(width=18, inner=21, bias=True),
    "checkpointed": lambda: Toy(checkpointed=True),
    "tied": lambda: Toy(tied=True),
    "llama": tiny_llama,
    "reentrant": lambda: Reentrant(),
    "selective": lambda: Selective(),
    "checkpoint_wrapper": wrapped,
    "reentrant llama": reentrant_llama,
    "weights by hand": lambda: WeightsByHand(),
}
