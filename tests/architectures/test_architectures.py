"""Architectures of every family, from config classes: exact against plain autograd, every linear accounted for."""

from __future__ import annotations

import re

import pytest

from losia_fx.tools.coverage.check import EXACT, Result, check

DECODERS = ("llama", "qwen3", "gemma2", "phi", "gpt2", "gpt_neox", "bloom", "opt", "falcon", "cohere", "olmo2")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "xlnet", "modernbert")
ENCODER_DECODERS = ("t5", "bart", "pegasus")
VISION = ("vit", "swin", "convnext", "dinov2", "deit", "segformer")
SPEECH = ("wav2vec2", "whisper", "audio-spectrogram-transformer")
STATE_SPACE = ("mamba", "rwkv", "mamba2")
HYBRIDS = ("lfm2", "falcon_h1")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
PAIRS = ("clip", "siglip")

TABLE = (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *VISION, *SPEECH, *STATE_SPACE, *HYBRIDS, *EXPERTS, *PAIRS)
LIKE_OTHERS = frozenset(
    (
        *("llama", "qwen3", "gpt_neox", "bert", "vit"),  # in test_exact.py, by more compilers
        *("phi", "cohere", "olmo2", "opt"),
        *("roberta", "distilbert", "electra"),
        *("pegasus", "deit", "dinov2", "whisper", "siglip", "qwen3_moe"),
        *("bart", "gemma2", "segformer", "falcon_h1", "clip"),
        *(
            "rwkv",
            "lfm2",
            "gpt_oss",
            "xlnet",
            "deberta-v2",
            "audio-spectrogram-transformer",
            "bloom",
            "falcon",
            "albert",
        ),
        "mamba",  # in test_traced
    )
)
"""Use their weights as another of the table does, or as a form of tests/support/forms.py."""

TRACED = ("mamba", pytest.param("jamba", marks=pytest.mark.slow))
"""Where what AOTAutograd traces has strides of its own: weights on the left, state spaces."""
COMPILED = ("llama", "gpt2", "bert", "t5", "vit", "wav2vec2", "mamba", "mixtral")

TRUE_REASONS = r"\d+ x frozen: tied to an embedding"
"""What may keep a linear inside a block from learning. Anything else is to be looked at."""


def assert_exact(result: Result) -> None:
    assert result.verdict == EXACT, result
    assert result.subnets > 0
    assert result.share is not None
    if result.share < 1:
        assert result.why
        assert all(re.match(TRUE_REASONS, why) for why in result.why.split("; ")), result.why


def test_the_table_is_long_enough() -> None:
    assert len(set(TABLE)) == len(TABLE) >= 40
    assert len(COMPILED) >= 8


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in TABLE]
)
def test_architecture(architecture: str) -> None:
    assert_exact(check(architecture, "eager", "float64"))


@pytest.mark.parametrize("architecture", TRACED)
def test_traced(architecture: str) -> None:
    assert_exact(check(architecture, "aot_eager", "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", COMPILED)
def test_compiled(architecture: str) -> None:
    assert_exact(check(architecture, "inductor", "float32"))
