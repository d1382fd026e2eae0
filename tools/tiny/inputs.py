"""What each input of a tiny model may look like, by the name that its forward gives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .shrink_config import nested
from .size_rules import IMAGE, PATCH

SIZE, LENGTH, TARGET_LENGTH, SAMPLES, FRAMES = 2, 16, 6, 3200, 64
FIRST_WORD, LAST_WORD = 3, 60  # below them pad, begin and end; above them the special tokens
# What a configuration calls the height of a spectrum.
BINS = ("feature_projection_input_dim", "input_size", "num_mel_bins", "n_mels", "feature_size",
        "input_feat_per_channel")  # fmt: skip

Batch = dict[str, Any]


class InputFacts:
    """What a model's configurations and its forward say about its inputs."""

    def __init__(self, model: Any) -> None:
        self.parameters: Mapping[str, inspect.Parameter] = inspect.signature(model.forward).parameters
        self.configs = list(nested(model.config))

    def size(self, *names: str, default: int) -> int:
        """The first of the attributes that any configuration inside has, as one number."""
        for name in names:
            for config in self.configs:
                value = getattr(config, name, None)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    def image(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels = self.size("num_channels", "in_channels", default=3)
        for config in self.configs:
            value = getattr(config, "image_size", None)
            if isinstance(value, (list, tuple)) and len(value) == 2:
                return channels, value[0], value[1]
        side = self.size("image_size", default=IMAGE)
        return channels, side, side


def words(*shape: int) -> Tensor:
    return torch.randint(FIRST_WORD, LAST_WORD, (SIZE, *shape))


def _ids(facts: InputFacts) -> list[Batch]:
    codebooks = facts.size("num_codebooks", default=0)
    shapes = ((), (codebooks + 1,), (codebooks,)) if codebooks else ((),)
    short = {"input_ids": words(TARGET_LENGTH)}  # where there are few positions
    return [*({"input_ids": words(LENGTH, *shape)} for shape in shapes), short]


def _decoder_ids(facts: InputFacts) -> list[Batch]:
    codebooks = facts.size("num_codebooks", "num_channels", default=1)
    shapes = ((TARGET_LENGTH,), (TARGET_LENGTH, codebooks), (codebooks, TARGET_LENGTH))
    return [{"decoder_input_ids": words(*shape)} for shape in shapes]


def _pixels(facts: InputFacts) -> list[Batch]:
    """Images, patches in rows with the grid that they come from, or several images for each text."""
    channels, height, width = facts.image()
    patch, time = facts.size("patch_size", default=PATCH), facts.size("temporal_patch_size", default=1)
    options: list[Batch] = []
    if "image_grid_thw" in facts.parameters:
        rows = torch.randn(SIZE * 16, channels * time * patch * patch)
        options.append({"pixel_values": rows, "image_grid_thw": torch.tensor([[1, 4, 4]] * SIZE)})
    if "spatial_shapes" in facts.parameters:
        rows = torch.randn(SIZE, 16, channels * patch * patch)
        mask, shapes = torch.ones(SIZE, 16, dtype=torch.long), torch.tensor([[4, 4]] * SIZE)
        options.append({"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shapes})
    frames = facts.size("num_frames", "frames_per_clip", default=2)
    for shape in ((), (1,), (2,), (frames,)):
        made: Batch = {"pixel_values": torch.randn(SIZE, *shape, channels, height, width)}
        options.append(made)
        if "image_sizes" in facts.parameters:
            options.append({**made, "image_sizes": torch.tensor([[height, width]] * SIZE)})
    return options


def _videos(facts: InputFacts) -> list[Batch]:
    if "pixel_values" in facts.parameters:  # a model that sees images too: one of them is enough
        return [{}]
    frames = facts.size("num_frames", "frames_per_clip", default=2)
    return [{"pixel_values_videos": torch.randn(SIZE, frames, *facts.image())}]


def _patches(facts: InputFacts) -> list[Batch]:
    """Pix2Struct's rows: where a patch lies, and its pixels."""
    channels, patch = facts.size("num_channels", default=3), facts.size("patch_size", default=PATCH)
    places = torch.stack([torch.arange(1, 9), torch.arange(1, 9)], -1).float().expand(SIZE, -1, -1)
    return [{"flattened_patches": torch.cat((places, torch.randn(SIZE, 8, channels * patch * patch)), -1)}]


def _spectrum(facts: InputFacts) -> list[Batch]:
    bins = facts.size(
        "feature_projection_input_dim",
        "input_size",
        "num_mel_bins",
        "n_mels",
        "feature_size",
        "input_feat_per_channel",
        default=16,
    )
    frames = 2 * facts.size("max_source_positions", default=FRAMES // 2)
    options = []
    window = 2 * facts.size("n_window", default=FRAMES // 4)
    for shape in ((bins, frames), (frames, bins), (FRAMES, bins), (FRAMES // 2, bins), (bins, window)):
        length = shape[1] if shape[0] == bins else shape[0]
        mask = torch.ones(SIZE, length, dtype=torch.long)
        options.append({"input_features": torch.randn(SIZE, *shape), "input_features_mask": mask})
    options.append({"input_features": torch.randn(SIZE, 1, frames, bins)})
    return options


def _wave(facts: InputFacts) -> list[Batch]:
    bins, length = facts.size("num_mel_bins", default=16), facts.size("max_length", default=FRAMES)
    shapes = ((SAMPLES,), (1, SAMPLES), (length, bins), (bins, FRAMES))
    return [{"input_values": torch.randn(SIZE, *shape)} for shape in shapes]


def _series(facts: InputFacts) -> list[Batch]:
    """What was measured; for models of dated series, with what is known of the time that follows."""
    length, channels = facts.size("context_length", default=32), facts.size("num_input_channels", default=1)
    if "past_time_features" not in facts.parameters:
        alone = {"past_values": torch.randn(SIZE, length)}
        padding, kind = torch.zeros(SIZE, length, dtype=torch.long), torch.zeros(SIZE, 1, dtype=torch.long)
        return [
            {"past_values": torch.randn(SIZE, length, channels)},
            {**alone, "past_values_padding": padding, "freq": kind},
        ]
    config = facts.configs[0]
    past, ahead = length + max(config.lags_sequence), config.prediction_length
    return [
        {
            "past_values": torch.randn(SIZE, past),
            "past_time_features": torch.randn(SIZE, past, config.num_time_features),
            "past_observed_mask": torch.ones(SIZE, past),
            "future_values": torch.randn(SIZE, ahead),
            "future_time_features": torch.randn(SIZE, ahead, config.num_time_features),
        }
    ]


def _games(facts: InputFacts) -> list[Batch]:
    """A reinforcement learner's steps: what it saw, what it did, and what came of it."""
    config = facts.configs[0]
    return [
        {
            "states": torch.randn(SIZE, TARGET_LENGTH, config.state_dim),
            "actions": torch.randn(SIZE, TARGET_LENGTH, config.act_dim),
            "rewards": torch.randn(SIZE, TARGET_LENGTH, 1),
            "returns_to_go": torch.randn(SIZE, TARGET_LENGTH, 1),
            "timesteps": torch.arange(TARGET_LENGTH).expand(SIZE, -1),
        }
    ]


def _speech_labels(facts: InputFacts) -> list[Batch]:
    """FastSpeech 2's: how long, how high and how loud each token of a text is, and the spectrum."""
    bins = facts.size("num_mel_bins", default=16)
    return [
        {
            "spectrogram_labels": torch.randn(SIZE, 2 * LENGTH, bins),
            "duration_labels": torch.full((SIZE, LENGTH), 2),
            "pitch_labels": torch.randn(SIZE, LENGTH, 1),
            "energy_labels": torch.randn(SIZE, LENGTH, 1),
        }
    ]


def _questions(facts: InputFacts) -> list[Batch]:
    """Places in one prompt where an option is decided on."""
    return [
        {
            "marks": torch.tensor([[2, 5, 9]] * SIZE),
            "num_options": torch.full((SIZE, 3), 2),
            "question_type_ids": torch.zeros(SIZE, 3, dtype=torch.long),
        }
    ]


def _prompts(facts: InputFacts) -> list[Batch]:
    """An image that is done already, and what was to be done with it."""
    return [{name: torch.randn(SIZE, *facts.image()) for name in ("prompt_pixel_values", "prompt_masks")}]


def _latents(facts: InputFacts) -> list[Batch]:
    """What an encoder of sounds makes of them, channels first or last."""
    widths = {facts.size("latent_dim", "hidden_size", default=64): None, facts.size("hidden_size", default=64): None}
    shapes = [shape for width in widths for shape in ((width, LENGTH), (LENGTH, width))]
    return [{"latents": torch.randn(SIZE, *shape)} for shape in shapes]


def _boxes(facts: InputFacts) -> list[Batch]:
    corners = torch.randint(0, 40, (SIZE, LENGTH, 4))
    return [{"bbox": torch.cat((corners[..., :2], corners[..., :2] + 5), -1)}]


def _regions(facts: InputFacts) -> list[Batch]:
    width = facts.size("visual_feat_dim", default=64)
    return [{"visual_feats": torch.randn(SIZE, 5, width), "visual_pos": torch.rand(SIZE, 5, 4)}]


def _image_positions(facts: InputFacts) -> list[Batch]:
    mask = torch.zeros(SIZE, LENGTH, dtype=torch.long)
    mask[:, 1 : 1 + facts.size("latent_query_num", default=8)] = 1
    return [{"image_embeds_position_mask": mask}]


OPTIONS: dict[str, Callable[[InputFacts], list[Batch]]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _videos,
    "flattened_patches": _patches,
    "input_features": _spectrum,
    "input_values": _wave,
    "past_values": _series,
    "states": _games,
    "latents": _latents,
    "bbox": _boxes,
    "visual_feats": _regions,
    "decoder_input_ids": _decoder_ids,
    "qformer_input_ids": lambda facts: [{"qformer_input_ids": words(LENGTH)}],
    "spectrogram_labels": _speech_labels,
    "marks": _questions,
    "prompt_pixel_values": _prompts,
    "image_attention_mask": lambda facts: [{"image_attention_mask": torch.ones(SIZE, LENGTH, 1, dtype=torch.long)}],
    "image_embeds_position_mask": _image_positions,
    "return_loss": lambda facts: [{"return_loss": True}],
}
"""Name of an input -> what it may be, with what has to come along; the likeliest first."""

HELPERS = (
    "decoder_input_ids",
    "qformer_input_ids",
    "spectrogram_labels",
    "marks",
    "prompt_pixel_values",
    "bbox",
    "visual_feats",
    "image_attention_mask",
    "image_embeds_position_mask",
    "return_loss",
)
"""Inputs that mean nothing by themselves: given wherever forward takes them."""
