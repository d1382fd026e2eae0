"""Models of one block that a MODEL argument can name (tests.support.tiny:decoder), with inputs for a step of each."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.support.table import STILL, TEXT, masked_tokens, tokens
from tests.support.toys import needs_traced_experts

SEVERAL = ("decoder", "encoder", "experts")
SMALL: dict[str, Any] = {**TEXT, "num_hidden_layers": 1, "tie_word_embeddings": False, "use_cache": False}


def decoder() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)).train(), tokens(4, 16)


def encoder() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, **STILL)).train(), masked_tokens(4, 16)


def experts() -> tuple[nn.Module, Any]:
    needs_traced_experts()
    torch.manual_seed(0)
    config = hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config).train(), tokens(4, 16)


def no_tokens() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
