"""Tiny models of x-transformers: its one architecture with the options that change how weights are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from x_transformers import (
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
    ViTransformerWrapper,
    XTransformer,
)

from ..tiny.model import Recipe, TinyModel, made

WIDTH, WORDS, BATCH, LENGTH, PICTURE = 32, 40, 2, 8, 16
SIZES: dict[str, Any] = {"dim": WIDTH, "depth": 2, "heads": 2, "attn_dim_head": 16}


def _text(layers: type[nn.Module] = Decoder, **options: Any) -> Callable[[], nn.Module]:
    return lambda: TransformerWrapper(
        num_tokens=WORDS, max_seq_len=LENGTH, attn_layers=layers(**SIZES, **options), emb_dropout=0.0
    )


def _words(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, WORDS, (BATCH, length))


def _ids() -> dict[str, Any]:
    return {"x": _words()}


def _vision() -> Any:
    return ViTransformerWrapper(image_size=PICTURE, patch_size=4, num_classes=5, attn_layers=Encoder(**SIZES))


def _continuous() -> Any:
    return ContinuousTransformerWrapper(dim_in=12, dim_out=10, max_seq_len=LENGTH, attn_layers=Encoder(**SIZES))


def _both() -> Any:
    sides = {"num_tokens": WORDS, "depth": 2, "heads": 2, "max_seq_len": LENGTH}
    options = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in sides.items()}
    return XTransformer(dim=WIDTH, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "gated": {"ff_glu": True, "ff_swish": True},
    "grouped queries": {"attn_kv_heads": 1},
    "macaron": {"macaron": True},
    "memory": {"attn_num_mem_kv": 2},
    "no bias": {"ff_no_bias": True, "use_rmsnorm": True, "rotary_pos_emb": True},
    "normed queries": {"attn_qk_norm": True},
    "one key head": {"attn_one_kv_head": True},
    "residual attention": {"residual_attn": True},
    "sandwich": {"sandwich_norm": True},
    "talking heads": {"attn_pre_talking_heads": True},
    "value gates": {"attn_gate_values": True},
}
RECIPES = {
    "AutoregressiveWrapper": Recipe(lambda: AutoregressiveWrapper(_text()()), _ids),
    "ContinuousTransformerWrapper": Recipe(_continuous, lambda: {"x": torch.randn(BATCH, LENGTH, 12)}),
    "Decoder": Recipe(_text(), _ids),
    **{f"Decoder, {name}": Recipe(_text(**options), _ids) for name, options in OPTIONS.items()},
    "Encoder": Recipe(_text(Encoder), _ids),
    "ViTransformerWrapper": Recipe(_vision, lambda: {"img": torch.randn(BATCH, 3, PICTURE, PICTURE)}),
    "XTransformer": Recipe(_both, lambda: {"src": _words(), "tgt": _words()}),
}


def names() -> tuple[str, ...]:
    return tuple(RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32) -> TinyModel:
    return made(RECIPES, name, dtype)
