"""The models that are measured: Llamas of random weights, and a batch for each."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from losia_fx.errors import ConfigError

SEED = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_COPIES = 1.5
"""The weights once, and half as much again for everything else: with less memory no method runs."""


@dataclass(frozen=True)
class Size:
    """A model and a batch. rounds: how many are measured where nobody says; compiled: which methods are compiled."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    rounds: int = 7
    rank_factor: float = 0.125
    dtype: str = "bfloat16"
    compiled: tuple[str, ...] = ("*",)
    """Patterns of the methods that are measured compiled too."""
    needs_cuda: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        kv = self.hidden // self.heads * self.kv_heads
        block = 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * block + 2 * self.vocabulary * self.hidden + self.hidden

    def with_overrides(self, overrides: Mapping[str, Any]) -> Size:
        """Options that are None leave the size as it is. Raises ConfigError for a value that cannot be."""
        given = {name: value for name, value in overrides.items() if value is not None}
        for name in ("layers", "batch", "length", "rounds"):
            if given.get(name, 1) < 1:
                raise ConfigError(f"--{name} {given[name]}: give a whole number of at least 1")
        if not 0 < given.get("rank_factor", 1) <= 1:
            raise ConfigError(f"--rank-factor {given['rank_factor']}: give a number in (0, 1]")
        return replace(self, **given)


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 64, 160, 4, 4, 2, 256, 2, 32, rounds=3, compiled=("floor", "losia")),
        Size("small", 1024, 2816, 16, 16, 4, 4096, 2, 512),
        Size("large", 2048, 8192, 32, 8, 8, 8192, 1, 512, rounds=5),
        Size("7b", 4096, 11008, 32, 32, 32, 32000, 1, 2048, needs_cuda=True),
    )
}


def check_device(size: Size, device: torch.device) -> None:
    """Raises ConfigError where the size does not run on the device."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; give --device cpu")
    if size.needs_cuda and device.type != "cuda":
        raise ConfigError(f"--size {size.name}: needs a CUDA device; give --device cuda, or a smaller --size")
    need = int(LEAST_COPIES * size.parameters * DTYPES[size.dtype].itemsize)
    if (has := _memory(device)) < need:
        raise ConfigError(
            f"--size {size.name}: takes {need / 2**30:.0f} GiB at least and {device} has {has / 2**30:.0f}; "
            "give fewer --layers or a smaller --size"
        )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Setup:
    """What all methods share: one copy of the weights, and one batch."""

    size: Size
    base: Any
    batch: dict[str, Tensor]

    @classmethod
    def of(cls, size: Size, device: torch.device) -> Setup:
        torch.manual_seed(SEED)
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            vocab_size=size.vocabulary,
            max_position_embeddings=max(2048, size.length),
            tie_word_embeddings=False,
            use_cache=False,
            attention_dropout=0.0,
        )
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=DTYPES[size.dtype], attn_implementation="sdpa")
            ids = torch.randint(size.vocabulary, (size.batch, size.length))
        return cls(size, base.train().requires_grad_(False), {"input_ids": ids, "labels": ids})

    def model(self) -> Any:
        """The model with parameters of its own, all frozen, over the memory of the one copy of the weights.

        What a method writes into it is seen by the others, which changes their numbers and not their time.
        """
        own = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.base.parameters()}
        return copy.deepcopy(self.base, own)


def block_linears(model: Any) -> list[nn.Linear]:
    """The linears inside the blocks: all but the head."""
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
