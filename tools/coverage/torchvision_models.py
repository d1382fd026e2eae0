"""Tiny models of torchvision: those with linear weights inside their blocks."""

from __future__ import annotations

from typing import Any

import torch
import torchvision.models as tv
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

from ..tiny.model import Recipe, TinyModel, made

BATCH, SIDE, CLASSES = 2, 32, 5
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "num_classes": CLASSES}


def _convnext() -> Any:
    return tv.ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=CLASSES)


def _vit() -> Any:
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
    return tv.VisionTransformer(image_size=SIDE, patch_size=8, num_classes=CLASSES, **sizes)


def _maxvit() -> Any:
    return tv.MaxVit(
        (SIDE, SIDE),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32],
        block_layers=[1, 2],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )


def _mvit() -> Any:
    blocks = [
        MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return MViT((SIDE, SIDE), 4, blocks, num_classes=CLASSES, **options)


def _video_swin() -> Any:
    return SwinTransformer3d(patch_size=[2, 4, 4], window_size=[2, 4, 4], stochastic_depth_prob=0.0, **SWIN)


def _swin(**options: Any) -> Any:
    return tv.SwinTransformer(patch_size=[4, 4], window_size=[4, 4], stochastic_depth_prob=0.0, **SWIN, **options)


def _picture() -> dict[str, Any]:
    return {"x": torch.randn(BATCH, 3, SIDE, SIDE)}


def _video() -> dict[str, Any]:
    return {"x": torch.randn(BATCH, 3, 4, SIDE, SIDE)}


RECIPES = {
    "ConvNeXt": Recipe(_convnext, _picture),
    "MViT": Recipe(_mvit, _video),
    "MaxVit": Recipe(_maxvit, _picture),
    "SwinTransformer": Recipe(_swin, _picture),
    "SwinTransformer3d": Recipe(_video_swin, _video),
    "SwinTransformerV2": Recipe(lambda: _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), _picture),
    "VisionTransformer": Recipe(_vit, _picture),
}


def names() -> tuple[str, ...]:
    return tuple(RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32) -> TinyModel:
    return made(RECIPES, name, dtype)
