"""A tiny, random, trainable model of any architecture that transformers has, and a batch for it; nothing is downloaded.

>>> tiny = build("llama", torch.float64)
>>> tiny.loss(tiny.model(**tiny.batch)).backward()
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, ResNetConfig, TimmBackboneConfig
from transformers.models.auto import modeling_auto

from losia_fx.errors import LosiaError

from .batch import candidates
from .model import ALONE, SEED, TinyModel, check_size, in_dtype, prepared, step
from .shrink_config import common_ratio, nested, shrink
from .size_rules import WIDTH

MOST_BATCHES, MOST_PARTS = 80, 4

# What a class is for, in the order in which one is chosen: the names of transformers' own tables.
HEADS = tuple(
    """
    SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ IMAGE_TEXT_TO_TEXT MULTIMODAL_LM CAUSAL_LM MASKED_LM CTC
    ZERO_SHOT_IMAGE_CLASSIFICATION IMAGE_CLASSIFICATION AUDIO_CLASSIFICATION VIDEO_CLASSIFICATION
    SEQUENCE_CLASSIFICATION TOKEN_CLASSIFICATION QUESTION_ANSWERING VISUAL_QUESTION_ANSWERING
    DOCUMENT_QUESTION_ANSWERING TABLE_QUESTION_ANSWERING SEMANTIC_SEGMENTATION INSTANCE_SEGMENTATION
    UNIVERSAL_SEGMENTATION IMAGE_SEGMENTATION OBJECT_DETECTION ZERO_SHOT_OBJECT_DETECTION DEPTH_ESTIMATION
    KEYPOINT_DETECTION KEYPOINT_MATCHING MASKED_IMAGE_MODELING IMAGE_TO_IMAGE MASK_GENERATION IMAGE_MATTING
    NORMAL_ESTIMATION POINTMAP_ESTIMATION POSE_ESTIMATION RETRIEVAL RNNT TDT TABLE_RECOGNITION TEXT_RECOGNITION
    TEXT_TO_SPECTROGRAM TEXT_TO_WAVEFORM TIME_SERIES_PREDICTION TIME_SERIES_CLASSIFICATION
    TIME_SERIES_REGRESSION AUDIO_FRAME_CLASSIFICATION AUDIO_XVECTOR NEXT_SENTENCE_PREDICTION
    CAUSAL_IMAGE_MODELING PRETRAINING DECISION BASE BACKBONE
    """.split()
)

BY_LAYER = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
# What cannot be had by making everything small: by model type, attributes (of parts, with dots) after shrinking.
OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config.width_coefficient": 0.25,
        "vision_config.depth_coefficient": 0.3,
        "projection_dim": 80,
    },
    "blip-2": {"image_token_index": 98},
    "bros": {"dim_bbox_projection": 16},
    "chameleon": {"vocabulary_map": {"<image>": 98}},
    "cohere_compass": {"text_config.rope_parameters": BY_LAYER},
    "cohere_compass_text": {"rope_parameters": BY_LAYER},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "depth_pro": {"intermediate_hook_ids": [1, 1, 0, 0]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "emu3": {"vocabulary_map": {"<image>": 98, "<|extra_200|>": 97}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [],
        "qformer_config.encoder_hidden_size": 64,
    },
    "instructblip": {"image_token_index": 98},
    "instructblipvideo": {"video_token_index": 98},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "llama4": {"vision_config.intermediate_size": 256},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "omdet-turbo": {"timm_kwargs": {}},
    "perception_lm": {"vision_config.model_args": {"embed_dim": 64}},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 96},
    "qwen4_exp": {"text_config.indexer_budget": 8, "text_config.indexer_compress_ratio": 2},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 2},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (32, 32),
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_buckets": 2,
    },
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32]},  # a tuple by default, which it cannot take
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}


def names() -> tuple[str, ...]:
    """Every model type with a class that can be trained, in alphabetical order; parts of others are left out."""
    parts = set()
    for model_type in _tables():
        for part in (CONFIG_MAPPING[model_type].sub_configs or {}).values():
            parts.add(getattr(part, "model_type", ""))
    whole = [t for t, classes in _tables().items() if t not in parts or set(classes) - {"BASE", "BACKBONE"}]
    return tuple(sorted(whole))


def build(model_type: str, dtype: torch.dtype = torch.float32) -> TinyModel:
    """The same weights and the same batch at every call.

    Raises LosiaError for a model type that transformers does not have, or one that cannot be built so small.
    """
    classes = _tables().get(model_type)
    if classes is None:
        raise LosiaError(f"{model_type!r}: transformers has no such model type with a model class")
    heads: dict[str, str] = {}
    for head in sorted(classes, key=HEADS.index):
        heads.setdefault(classes[head], head)
    small = [_Attempt(model_type, name, head) for name, head in heads.items()]
    errors: dict[str, str] = {}
    found = _first(small, dtype, errors)
    if found is None and (dtype != torch.float64 or _first(small, torch.float32, {}) is None):
        # Not for want of float64, which some have no kernel for: float32 is better than other sizes or a part.
        found = _first(_fitting(small), dtype, errors) or _first(_parts(small), dtype, errors)
    if found is None:
        said = "; ".join(f"{name}: {why}" for name, why in errors.items())
        raise LosiaError(f"{model_type}: cannot be built: {said}")
    return found


@dataclass(frozen=True)
class _Attempt:
    """One way to make a model. ratio: as shrink() takes it; part: a module of it that is taken in its place."""

    model_type: str
    name: str
    head: str
    ratio: int = 0
    part: str = ""

    def model(self) -> nn.Module:
        if self.ratio:
            self._count()
        torch.manual_seed(SEED)
        whole: nn.Module = getattr(transformers, self.name)(_config(self.model_type, self.ratio))
        return whole.get_submodule(self.part)

    def _count(self) -> None:
        """Raises LosiaError where the model would be too large, without the memory for it."""
        try:
            with torch.device("meta"):
                model = getattr(transformers, self.name)(_config(self.model_type, self.ratio))
        except Exception:  # some read numbers of theirs while they are made: only a real one tells
            return
        check_size(model)

    def tiny(self, dtype: torch.dtype) -> TinyModel:
        tried = _with_batch(prepared(self.model(), dtype), self.head, dtype)
        # Some models keep what they saw (running averages, recurrent states): the one handed out has seen nothing.
        return replace(tried, model=prepared(self.model(), dtype))


def _first(attempts: Iterable[_Attempt], dtype: torch.dtype, errors: dict[str, str]) -> TinyModel | None:
    """Of the attempts, the first that can be trained; the first error of each class is put into ``errors``."""
    for attempt in attempts:
        try:
            tiny = attempt.tiny(dtype)
        except Exception as error:  # whatever a model of any kind raises while it is made: the next one may do
            errors.setdefault(attempt.name, " ".join(str(error).split())[:400])
        else:
            return replace(tiny, note=f"its {attempt.part}{ALONE}") if attempt.part else tiny
    return None


def _fitting(small: list[_Attempt]) -> Iterator[_Attempt]:
    """The same with its own widths, divided by what its heads can be divided by, or as they are."""
    with suppress(Exception):  # transformers' own defaults do not fit one another
        ratios = {common_ratio(CONFIG_MAPPING[small[0].model_type]()), 1}
        yield from (replace(attempt, ratio=ratio) for ratio in sorted(ratios, reverse=True) for attempt in small)


def _parts(small: list[_Attempt]) -> Iterator[_Attempt]:
    """Models inside one that does not run by itself (a pipeline of several, or one that wants a session), the one with
    the largest linears first."""
    for attempt in small:
        with suppress(Exception):  # it cannot even be made
            model = attempt.model()
            sizes = {
                path: sum(inner.weight.numel() for inner in part.modules() if isinstance(inner, nn.Linear))
                for path, part in model.named_modules()
                if path and isinstance(part, PreTrainedModel)
            }
            for path in sorted(filter(sizes.get, sizes), key=sizes.__getitem__, reverse=True)[:MOST_PARTS]:
                yield replace(attempt, part=path, head="BASE")


def class_names(head: str) -> Mapping[str, Any]:
    """transformers' table of what is in HEADS: model type -> class or classes. Empty where its version has none, as
    5.17 of DECISION."""
    table = "MODEL_MAPPING_NAMES" if head == "BASE" else f"MODEL_FOR_{head}_MAPPING_NAMES"
    names: Mapping[str, Any] = getattr(modeling_auto, table, {})
    return names


def _tables() -> dict[str, dict[str, str]]:
    """model type -> {what a class is for: its name}."""
    found: dict[str, dict[str, str]] = {}
    for head in HEADS:
        for model_type, name in class_names(head).items():
            name = name[0] if isinstance(name, (list, tuple)) else name
            if model_type in CONFIG_MAPPING:
                found.setdefault(model_type, {})[head] = name
    return found


def _config(model_type: str, ratio: int) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[model_type]()
    for part in nested(config):
        for name, value in list(vars(part).items()):
            if isinstance(value, TimmBackboneConfig) or hasattr(value, "do_pooling"):
                vars(part)[name] = _resnet(value)  # past the check of its type
    shrink(config, ratio)
    for path, value in OVERRIDES.get(model_type, {}).items() if not ratio else ():
        *parts, name = path.split(".")
        setattr(reduce(getattr, parts, config), name, value)
    return config


def _resnet(timm: PretrainedConfig) -> PretrainedConfig:
    """What does as well as a model of timm, which is another package."""
    stages = list(range(5 - len(getattr(timm, "out_indices", None) or (0,)), 5))
    options: dict[str, Any] = {"layer_type": "basic", "out_indices": stages}
    config = ResNetConfig(**options)
    for name, value in {"hidden_size": int(WIDTH), **vars(timm)}.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    return config


def _with_batch(model: nn.Module, head: str, dtype: torch.dtype) -> TinyModel:
    """The first batch with which a plain step gives a finite loss and some gradient."""
    errors: dict[str, None] = {}
    for batch in itertools.islice(candidates(model, head), MOST_BATCHES):
        batch = in_dtype(batch, dtype)
        tiny = TinyModel(model, batch, "labels" in batch or "return_loss" in batch)
        try:
            step(tiny)
        except LosiaError as error:
            errors[str(error)] = None
        except Exception as error:
            errors[f"{_shapes(batch)}: {type(error).__name__}: {error}"[:300]] = None
        else:
            return tiny
    raise LosiaError("no batch fits: " + " | ".join(list(errors)[:2]))


def _shapes(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in batch.items()}
