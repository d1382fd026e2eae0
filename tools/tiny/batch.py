"""Batches that a tiny model could take, the fullest first."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .inputs import FIRST_WORD, HELPERS, OPTIONS, SIZE, TARGET_LENGTH, Batch, InputFacts, words

# Heads (as in architectures.HEADS) that are given labels of the shape of their tokens.
WRITERS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM", "MASKED_LM",
           "PRETRAINING")  # fmt: skip
CLASSIFIERS = ("IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")
FEATURES = (
    ("get_image_features", "image", ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")),
    ("get_video_features", "video", ("pixel_values_videos", "video_grid_thw")),
    ("get_audio_features", "audio", ("input_features", "input_features_mask")),
)
MOST = 16
"""Combinations of inputs that are tried for one set of them."""


def candidates(model: Any, head: str) -> Iterator[Batch]:
    """Batches with labels (where forward takes any) and without, to be tried in this order."""
    facts = InputFacts(model)
    seen = set()
    for names in _wanted(facts, model.main_input_name):
        options = [OPTIONS[name](facts) for name in names]
        for parts in itertools.islice(itertools.product(*options), MOST):
            batch = {key: value for part in parts for key, value in part.items() if key in facts.parameters}
            described = str({key: getattr(value, "shape", value) for key, value in batch.items()})
            if described in seen or not batch:
                continue
            seen.add(described)
            for inputs in (*_with_features(model, facts, batch), batch):
                for labels in _labels(facts, inputs, head):
                    yield {**inputs, **labels}


def _wanted(facts: InputFacts, main: str | list[str]) -> Iterator[list[str]]:
    """Names of inputs, from everything that can be made to the main one alone."""
    takes = [name for name in OPTIONS if name in facts.parameters]
    required = [name for name in takes if facts.parameters[name].default is inspect.Parameter.empty]
    helpers = [name for name in takes if name in HELPERS]
    mains = [name for name in ([main] if isinstance(main, str) else main) if name in takes]
    yield takes
    yield list(dict.fromkeys([*required, *mains, *helpers]))
    yield list(dict.fromkeys([name for name in takes if name == "input_ids"] + required + helpers))
    for name in takes:
        if name not in HELPERS:
            yield list(dict.fromkeys([*required, name, *helpers]))
    yield mains


def _with_features(model: Any, facts: InputFacts, batch: Batch) -> Iterator[Batch]:
    """The batch with as many placeholder tokens as its images and sounds have features, if the model wants any."""
    if "input_ids" not in batch or batch["input_ids"].dim() != 2:
        return
    ids = batch["input_ids"]
    for getter, kind, names in FEATURES:
        token, function = _token(model.config, kind), getattr(model, getter, None)
        if token is None or function is None or names[0] not in batch:
            continue
        count = _count_features(function, {name: batch[name] for name in names if name in batch})
        if count is None or count % SIZE:
            return
        ids = torch.cat((ids[:, :2], torch.full((SIZE, count // SIZE), token), ids[:, 2:]), 1)
    if ids is batch["input_ids"]:
        return
    made = {**batch, "input_ids": ids}
    if "mm_token_type_ids" in facts.parameters:
        made["mm_token_type_ids"] = (ids == _token(model.config, "image")).long()
    yield made


def _count_features(function: Any, inputs: Batch) -> int | None:
    taken = inspect.signature(function).parameters
    try:
        with torch.no_grad():
            return _rows(function(**{name: value for name, value in inputs.items() if name in taken}))
    except Exception:  # inputs that this model does not take; the next ones may fit
        return None


def _rows(output: Any) -> int | None:
    """How many rows of features an output of get_..._features has."""
    if not isinstance(output, (Tensor, list, tuple)):
        pooled = getattr(output, "pooler_output", None)
        output = getattr(output, "last_hidden_state", None) if pooled is None else pooled
    if isinstance(output, (list, tuple)):
        counts = [_rows(item) for item in output]
        return None if None in counts else sum(count for count in counts if count is not None)
    return output.numel() // output.shape[-1] if isinstance(output, Tensor) else None


def _token(config: Any, kind: str) -> int | None:
    """The token that stands for a feature of an image, a video or a sound."""
    for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_token"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _labels(facts: InputFacts, inputs: Batch, head: str) -> Iterator[Batch]:
    if "labels" in facts.parameters:
        tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if tokens is not None and head in WRITERS:
            yield {"labels": words(*tokens.shape[1:])}
        if head in WRITERS:
            yield {"labels": words(TARGET_LENGTH)}
        if head == "CTC":
            yield {"labels": torch.randint(FIRST_WORD, 9, (SIZE, 2))}
        if head in CLASSIFIERS:
            yield {"labels": torch.randint(2, (SIZE,))}
    yield {}
