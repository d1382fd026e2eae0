"""Tiny models of sentence-transformers: encoders with pooling, dense layers and heads of scores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from ..tiny.model import Recipe, TinyModel, made

WIDTH, VOCABULARY, BATCH, LENGTH = 32, 60, 2, 8
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}


class Encoder(nn.Module):
    """A sentence-transformers model whose inputs stay as they are: each of its modules adds to the dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **features: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.model(dict(features))
        return {name: value for name, value in found.items() if name not in features}


def _transformer(model: Any, config: Any, **options: Any) -> Any:
    """As these models are loaded: from a folder with weights and a tokenizer."""
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *map(str, range(VOCABULARY - 2))])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    with tempfile.TemporaryDirectory() as name:
        model(config).save_pretrained(Path(name))
        tokenizer.save_pretrained(Path(name))
        return Transformer(name, **options)


def _sentences(model: str, config: str, *behind: Callable[[], nn.Module], **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        first = _transformer(getattr(transformers, model), getattr(transformers, config)(**{**SIZES, **sizes}))
        return Encoder(SentenceTransformer(modules=[first, *(module() for module in behind)], device="cpu"))

    return make


def _scores() -> nn.Module:
    config = transformers.BertConfig(**{**SIZES, "num_labels": 1})
    task = "sequence-classification"
    first = _transformer(transformers.BertForSequenceClassification, config, transformer_task=task)
    return Encoder(CrossEncoder(modules=[first], device="cpu"))


def _splade() -> nn.Module:
    first = _transformer(transformers.BertForMaskedLM, transformers.BertConfig(**SIZES), transformer_task="fill-mask")
    return Encoder(SparseEncoder(modules=[first, SpladePooling()], device="cpu"))


def _batch() -> dict[str, Any]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 3 :] = 0
    return {"input_ids": torch.randint(2, VOCABULARY, (BATCH, LENGTH)), "attention_mask": mask}


def _pooled(mode: str | Sequence[str]) -> Callable[[], nn.Module]:
    return lambda: Pooling(WIDTH, mode)


RECIPES = {
    "CrossEncoder, bert": Recipe(_scores, _batch),
    "bert, mean, dense": Recipe(
        _sentences("BertModel", "BertConfig", _pooled("mean"), lambda: Dense(WIDTH, 24), Normalize), _batch
    ),
    "distilbert, first token": Recipe(
        _sentences(
            "DistilBertModel", "DistilBertConfig", _pooled("cls"), dim=WIDTH, hidden_dim=48, n_layers=2, n_heads=4
        ),
        _batch,
    ),
    "llama, last token": Recipe(_sentences("LlamaModel", "LlamaConfig", _pooled("lasttoken"), Normalize), _batch),
    "modernbert, mean and max": Recipe(
        _sentences("ModernBertModel", "ModernBertConfig", _pooled(("mean", "max")), pad_token_id=0), _batch
    ),
    "mpnet, mean": Recipe(_sentences("MPNetModel", "MPNetConfig", _pooled("mean")), _batch),
    "splade, bert": Recipe(_splade, _batch),
    "t5 encoder, mean, dense": Recipe(
        _sentences(
            "T5EncoderModel",
            "T5Config",
            _pooled("mean"),
            lambda: Dense(WIDTH, 24, bias=False),
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
        ),
        _batch,
    ),
}


def names() -> tuple[str, ...]:
    return tuple(RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32) -> TinyModel:
    return made(RECIPES, name, dtype)
