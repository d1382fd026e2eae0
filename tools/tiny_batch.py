"""Batches that a tiny model could take, the fullest first: told by what its forward calls its inputs."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .shrink_config import IMAGE, PATCH, nested

SIZE, LENGTH, SAMPLES, FRAMES = 2, 16, 3200, 64
FIRST_WORD, LAST_WORD = 3, 60  # below them pad, begin and end; above them the special tokens

Batch = dict[str, Any]


def candidates(model: Any, head: str) -> Iterator[Batch]:
    """Batches with labels (where forward takes any) and without, to be tried in this order."""
    facts = Facts(model)
    for inputs in facts.inputs():
        for labels in facts.labels(inputs, head):
            yield {**inputs, **labels}


class Facts:
    """What the inputs of one model look like."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = inspect.signature(model.forward).parameters
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

    def image(self) -> tuple[int, int]:
        for config in self.configs:
            value = getattr(config, "image_size", None)
            if isinstance(value, (list, tuple)) and len(value) == 2:
                return value[0], value[1]
        side = self.size("image_size", default=IMAGE)
        return side, side

    def inputs(self) -> Iterator[Batch]:
        """Everything but labels."""
        seen = []
        for names in self._wanted():
            options = [OPTIONS[name](self) for name in names if name in OPTIONS]
            if not options:
                continue
            for parts in itertools.islice(itertools.product(*options), 32):
                batch = {key: value for part in parts for key, value in part.items() if key in self.parameters}
                described = str({key: getattr(value, "shape", value) for key, value in batch.items()})
                for made in (*self._with_features(batch), batch):
                    if made and (described, id(made)) not in seen:
                        seen.append((described, id(made)))
                        yield made

    def _wanted(self) -> Iterator[list[str]]:
        """Names of inputs, from everything that we can make to the main one alone."""
        takes = [name for name in OPTIONS if name in self.parameters]
        required = [name for name, p in self.parameters.items() if p.default is p.empty and name in OPTIONS]
        main = self.model.main_input_name
        main = [main] if isinstance(main, str) else list(main)
        helpers = [name for name in takes if name in HELPERS]
        yield takes
        yield list(dict.fromkeys([*required, *main, *helpers]))
        yield [name for name in takes if name in ("input_ids", *HELPERS, *required)]
        for name in takes:
            if name not in HELPERS:
                yield list(dict.fromkeys([*required, name, *helpers]))

    def _with_features(self, batch: Batch) -> Iterator[Batch]:
        """The batch with as many placeholder tokens as its images and sounds have features, where it needs any."""
        if "input_ids" not in batch:
            return
        ids, told = batch["input_ids"], False
        for getter, token, names in FEATURES:
            number = self._token(token)
            function = getattr(self.model, getter, None)
            if number is None or function is None or names[0] not in batch:
                continue
            taken = inspect.signature(function).parameters
            with torch.no_grad():
                try:
                    found = function(**{name: batch[name] for name in names if name in batch and name in taken})
                except Exception:  # a candidate that this model does not take; the next one may fit
                    return
            count = _features(found)
            if count is None or count % SIZE:
                return
            tokens = torch.full((SIZE, count // SIZE), number)
            ids, told = torch.cat((ids[:, :2], tokens, ids[:, 2:]), 1), True
        if told:
            made = {**batch, "input_ids": ids}
            if "mm_token_type_ids" in self.parameters:
                made["mm_token_type_ids"] = (ids == (self._token("image") or -1)).long()
            if "token_type_ids" in batch:
                made["token_type_ids"] = (ids == (self._token("image") or -1)).long()
            yield made

    def _token(self, kind: str) -> int | None:
        config = self.model.config
        for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_token"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
        return None

    def labels(self, inputs: Batch, head: str) -> Iterator[Batch]:
        if "labels" in self.parameters:
            tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
            if tokens is not None and head in WRITERS:
                yield {"labels": torch.randint(FIRST_WORD, LAST_WORD, tokens.shape)}
            if head == "CTC":
                yield {"labels": torch.randint(FIRST_WORD, 9, (SIZE, 2))}
            if head in CLASSIFIERS:
                yield {"labels": torch.randint(2, (SIZE,))}
            if head in ("SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM"):
                yield {"labels": torch.randint(FIRST_WORD, LAST_WORD, (SIZE, 6))}
        yield {}


WRITERS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "CAUSAL_LM",
    "MASKED_LM",
    "PRETRAINING",
)
CLASSIFIERS = (
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
)
HELPERS = (
    "decoder_input_ids",
    "bbox",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    "return_loss",
    "image_attention_mask",
    "image_embeds_position_mask",
)
FEATURES = (
    ("get_image_features", "image", ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")),
    ("get_video_features", "video", ("pixel_values_videos", "video_grid_thw")),
    ("get_audio_features", "audio", ("input_features", "input_features_mask", "feature_attention_mask")),
)


def _features(output: Any) -> int | None:
    """How many rows of features an output of get_..._features has."""
    if not isinstance(output, (Tensor, list, tuple)):
        output = getattr(output, "pooler_output", None)
    if isinstance(output, (list, tuple)):
        counts = [_features(item) for item in output]
        return None if None in counts else sum(c for c in counts if c is not None)
    return None if not isinstance(output, Tensor) else output.numel() // output.shape[-1]


def _ids(facts: Facts) -> list[Batch]:
    return [{"input_ids": torch.randint(FIRST_WORD, LAST_WORD, (SIZE, LENGTH))}]


def _decoder_ids(facts: Facts) -> list[Batch]:
    return [{"decoder_input_ids": torch.randint(FIRST_WORD, LAST_WORD, (SIZE, 6))}]


def _pixels(facts: Facts) -> list[Batch]:
    channels, (height, width) = facts.size("num_channels", "in_channels", default=3), facts.image()
    frames = facts.size("num_frames", "frames_per_clip", default=2)
    patch, time = facts.size("patch_size", default=PATCH), facts.size("temporal_patch_size", default=1)
    options: list[Batch] = []
    if "image_grid_thw" in facts.parameters:
        flat = torch.randn(SIZE * 16, channels * time * patch * patch)
        options.append({"pixel_values": flat, "image_grid_thw": torch.tensor([[1, 4, 4]] * SIZE)})
    sizes = torch.tensor([[height, width]] * SIZE)
    for shape in ((), (1,), (2,), (frames,)):
        made: Batch = {"pixel_values": torch.randn(SIZE, *shape, channels, height, width)}
        options.append(made)
        if "image_sizes" in facts.parameters:
            options.append({**made, "image_sizes": sizes})
    return options


def _features_of_sound(name: str) -> Callable[[Facts], list[Batch]]:
    def make(facts: Facts) -> list[Batch]:
        bins = facts.size("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", default=16)
        frames = 2 * facts.size("max_source_positions", default=FRAMES // 2)
        return [
            {name: torch.randn(SIZE, bins, frames)},
            {name: torch.randn(SIZE, frames, bins)},
            {name: torch.randn(SIZE, FRAMES, bins)},
        ]

    return make


def _wave(name: str) -> Callable[[Facts], list[Batch]]:
    def make(facts: Facts) -> list[Batch]:
        bins = facts.size("num_mel_bins", default=16)
        length = facts.size("max_length", default=FRAMES)
        return [
            {name: torch.randn(SIZE, SAMPLES)},
            {name: torch.randn(SIZE, 1, SAMPLES)},
            {name: torch.randn(SIZE, length, bins)},
            {name: torch.randn(SIZE, bins, FRAMES)},
        ]

    return make


def _boxes(facts: Facts) -> list[Batch]:
    corners = torch.randint(0, 40, (SIZE, LENGTH, 4))
    return [{"bbox": torch.cat((corners[..., :2], corners[..., :2] + 5), -1)}]


def _image_positions(facts: Facts) -> list[Batch]:
    count = facts.size("latent_query_num", default=8)
    mask = torch.zeros(SIZE, LENGTH, dtype=torch.long)
    mask[:, 1 : 1 + count] = 1
    return [{"image_embeds_position_mask": mask}]


def _noise(name: str, *shape: int) -> Callable[[Facts], list[Batch]]:
    return lambda facts: [{name: torch.randn(*shape)}]


def _ones(name: str, *shape: int) -> Callable[[Facts], list[Batch]]:
    return lambda facts: [{name: torch.ones(*shape, dtype=torch.long)}]


OPTIONS: dict[str, Callable[[Facts], list[Batch]]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features_of_sound("input_features"),
    "input_values": _wave("input_values"),
    "bbox": _boxes,
    "decoder_input_ids": _decoder_ids,
    "image_attention_mask": lambda facts: [{"image_attention_mask": torch.ones(SIZE, LENGTH, 1, dtype=torch.long)}],
    "image_embeds_position_mask": _image_positions,
    "return_loss": lambda facts: [{"return_loss": True}],
}
