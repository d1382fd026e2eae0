"""Tiny models of what torch.nn itself has with linear weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..tiny.model import Recipe, TinyModel, made

WIDTH, HEADS, INNER, BATCH, LENGTH, MEMORY = 32, 4, 48, 2, 7, 5
SIZES: dict[str, Any] = {"dim_feedforward": INNER, "dropout": 0.0}


class Stack(nn.Module):
    """Two of a module in a row, each of which may take a memory beside x."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x) if memory is None else layer(x, memory)
        return x


class Attention(nn.Module):
    """x plus what it attends to in a memory, whose keys and values may have other widths."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        widths = [options.get(name, WIDTH) for name in ("kdim", "vdim")]
        self.keys, self.values = (nn.Linear(WIDTH, width) for width in widths)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        attended, weights = self.attention(x, self.keys(memory), self.values(memory))
        summed: Tensor = x + attended + weights.square().sum(-1, keepdim=True)
        return summed


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """torch's recurrent layers keep their weights to themselves; the linears between them learn."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.recurrent(x)[0])  # type: ignore[no-any-return]


def _floats(length: int) -> Tensor:
    return torch.randn(BATCH, length, WIDTH)


def _alone() -> dict[str, Any]:
    return {"x": _floats(LENGTH)}


def _source() -> dict[str, Any]:
    return {"src": _floats(LENGTH)}


def _masked() -> dict[str, Any]:
    return {
        **_source(),
        "mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
        "src_key_padding_mask": torch.arange(LENGTH).expand(BATCH, -1) >= LENGTH - 2,
    }


def _pair(first: str, second: str) -> Callable[[], dict[str, Any]]:
    return lambda: {first: _floats(LENGTH), second: _floats(MEMORY)}


def _encoder(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True, **SIZES, **options)
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    return make


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, batch_first=True, **SIZES), 2)


def _transformer(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Transformer(WIDTH, HEADS, 2, 2, batch_first=True, **SIZES, **options)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, INNER), nn.ReLU(), nn.Linear(INNER, 3))


RECIPES = {
    "GRU": Recipe(lambda: Stack(Recurrent), _alone),
    "MultiheadAttention": Recipe(lambda: Stack(SelfAttention), _alone),
    "MultiheadAttention, batch second": Recipe(lambda: Stack(lambda: SelfAttention(batch_first=False)), _alone),
    "MultiheadAttention, biased": Recipe(lambda: Stack(lambda: Attention(add_bias_kv=True)), _pair("x", "memory")),
    "MultiheadAttention, crossed": Recipe(lambda: Stack(Attention), _pair("x", "memory")),
    "MultiheadAttention, widths": Recipe(lambda: Stack(lambda: Attention(kdim=24, vdim=40)), _pair("x", "memory")),
    "Sequential": Recipe(_mlp, lambda: {"input": _floats(LENGTH)}),
    "Transformer": Recipe(_transformer(), _pair("src", "tgt")),
    "Transformer, norm first": Recipe(_transformer(norm_first=True, activation="gelu"), _pair("src", "tgt")),
    "TransformerDecoder": Recipe(_decoder, _pair("tgt", "memory")),
    "TransformerEncoder": Recipe(_encoder(), _source),
    "TransformerEncoder, masked": Recipe(_encoder(activation="gelu"), _masked),
    "TransformerEncoder, norm first": Recipe(_encoder(norm_first=True, bias=False), _source),
}


def names() -> tuple[str, ...]:
    return tuple(RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32) -> TinyModel:
    return made(RECIPES, name, dtype)
