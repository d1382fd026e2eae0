"""The models that tests run over: tiny, random, from config classes; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.support import toys

VOCABULARY = 64
IMAGE = 16


@dataclass(frozen=True)
class Case:
    """A model and the batches it takes; both in training form, with labels, without dropout."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[..., dict[str, Tensor]]
    linears: int
    """Linear weights inside the blocks, and the output head where it is one of its own."""


class ToyWithLoss(toys.Toy):
    """Quick to compile, for what does not depend on the architecture."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def tokens(size: int = 2, length: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (size, length))
    return {"input_ids": ids, "labels": ids}


def toy_tokens(size: int = 2, length: int = 8) -> dict[str, Tensor]:
    ids = toys.batch(size, length)
    return {"input_ids": ids, "labels": ids}


def masked_tokens(size: int = 2, length: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (size, length))
    return {"input_ids": ids, "labels": torch.randint(VOCABULARY, (size, length))}


def images(size: int = 2, length: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(size, 3, IMAGE, IMAGE), "labels": torch.randint(3, (size,))}


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=False, use_cache=False)
    )


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, use_cache=False)
    )


def gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT, use_cache=False))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**TEXT, **STILL, use_cache=False))


def bert_untied() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**TEXT, **STILL, tie_word_embeddings=False, use_cache=False))


def vit() -> nn.Module:
    config = hf.ViTConfig(**SIZES, **STILL, image_size=IMAGE, patch_size=4, num_labels=3)
    config.problem_type = "single_label_classification"  # else the first forward sets it, and the second is traced anew
    return hf.ViTForImageClassification(config)


def toy() -> nn.Module:
    return ToyWithLoss(bias=True)


TOY = Case("toy", toy, toy_tokens, 7)
LLAMA = Case("llama", llama, tokens, 15)
QWEN3 = Case("qwen3", qwen3, tokens, 15)
GPT_NEOX = Case("gpt_neox", gpt_neox, tokens, 9)
BERT = Case("bert", bert, masked_tokens, 12)
BERT_UNTIED = Case("bert_untied", bert_untied, masked_tokens, 13)
VIT = Case("vit", vit, images, 12)

CASES = (LLAMA, QWEN3, GPT_NEOX, BERT, VIT)


def build(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights at every call, in training mode.

    Biases and norms are drawn too: as zeros and ones they would hide a gradient or a bias that is left out.
    """
    torch.manual_seed(1)
    model = case.build().to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() > 1 else 0.1))
    return model


def batch(case: Case, dtype: torch.dtype = torch.float32, size: int = 2, length: int = 8) -> dict[str, Tensor]:
    made = case.batch(size=size, length=length)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}
