"""A tiny model with the embedded tokenizer, and data of every shape, for runs of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from losia_fx.finetune.settings import EMBEDDED_MODEL


def save_model(folder: Path, template: str | None = None, **more: Any) -> Path:
    """A random checkpoint of one layer and so two groups."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=2048,
        **{"max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0, **sizes, **more},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, local_files_only=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def numbers(count: int = 1500) -> str:
    """A text with a pattern that is quickly learnt."""
    return "".join(f"value_{n} = compute({n % 7})\n" for n in range(count))


def chats(count: int = 24) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What follows {n}?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
            ]
        }
        for n in range(count)
    ]


def completions(count: int = 24) -> list[dict[str, Any]]:
    return [{"prompt": f"my $x{n} =", "completion": f" {n} * shift;"} for n in range(count)]
