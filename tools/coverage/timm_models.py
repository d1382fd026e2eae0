"""Tiny models of timm, one or two a family: those with linear weights inside their blocks."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from ..tiny.model import Recipe, TinyModel, made

BATCH = 2
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PYRAMID: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}
SWIN: dict[str, Any] = {"img_size": 64, "window_size": 4, "depths": (2, 2), "embed_dim": 16, "num_heads": (2, 2)}
TWINS: dict[str, Any] = {"img_size": 64, "embed_dims": (16, 32, 32, 48), "num_heads": (1, 2, 2, 2)}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, VIT),
    "cait_xxs24_224": (32, VIT),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "convit_tiny": (32, {**VIT, "local_up_to_layer": 1}),
    "convnext_tiny": (64, PYRAMID),
    "crossvit_9_240": (240, {"embed_dim": [32, 48], "depth": [[1, 2, 0]] * 2, "num_heads": [2, 2]}),
    "davit_tiny": (64, {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2), "window_size": 4}),
    "deit_tiny_distilled_patch16_224": (32, VIT),
    "edgenext_xx_small": (64, PYRAMID),
    "efficientformer_l1": (224, {}),
    "eva02_tiny_patch14_224": (32, VIT),
    "gcvit_xxtiny": (224, {}),
    "hiera_tiny_224": (64, {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 2, 1), "num_heads": 1}),
    "levit_128s": (64, {"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2,) * 3}),
    "mixer_s32_224": (224, {}),
    "mobilevit_xxs": (64, {}),
    "nest_tiny": (224, {}),
    "pit_ti_224": (224, {}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 48), "num_heads": (1, 2, 2, 2)}),
    "resmlp_12_224": (224, {}),
    "swin_tiny_patch4_window7_224": (64, SWIN),
    "swinv2_cr_tiny_ns_224": (64, SWIN),
    "swinv2_tiny_window8_256": (64, SWIN),
    "test_coatnet": (160, {}),
    "test_mambaout": (64, {}),
    "test_maxvit": (160, {}),
    "test_vit": (160, {}),
    "test_vit_relpos": (160, {}),
    "tiny_vit_5m_224": (224, {}),
    "tnt_s_patch16_224": (
        32,
        {"img_size": 32, "embed_dim": 32, "inner_dim": 8, "depth": 2, "num_heads_outer": 2, "num_heads_inner": 2},
    ),
    "twins_pcpvt_small": (64, {**TWINS, "depths": (1, 1, 2, 1)}),
    "twins_svt_small": (64, {**TWINS, "depths": (2, 2, 2, 2), "wss": (2, 2, 2, 2)}),
    "vit_base_patch16_rope_reg1_gap_256": (32, VIT),
    "xcit_nano_12_p16_224": (32, VIT),
}
"""Side of the picture, and what makes the model small."""


def _recipe(name: str) -> Recipe:
    side, options = SIZES[name]

    def model() -> nn.Module:
        found: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **options)
        return found

    return Recipe(model, lambda: {"x": torch.randn(BATCH, 3, side, side)})


RECIPES = {name: _recipe(name) for name in SIZES}


def names() -> tuple[str, ...]:
    return tuple(RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32) -> TinyModel:
    return made(RECIPES, name, dtype)
