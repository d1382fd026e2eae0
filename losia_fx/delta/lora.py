"""A delta as a LoRA adapter in PEFT's format: for servers that hold many adapters over one base model.

A LoRA of rank N holds the N largest singular values of what training changed. The change through subnets is of high
rank, so something is lost; how much is said for every weight.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from losia_fx.errors import DeltaError
from losia_fx.method.visits import walk

from .load import Target, flip
from .read import DeltaFile

LARGEST_EXACT = 1024  # an exact SVD of a larger change takes minutes, hundreds of them hours
OVERSAMPLING = 16
ITERATIONS = 4


@dataclass(frozen=True)
class Factors:
    """B A in place of the change of a linear weight: A (rank, in), B (out, rank), float32."""

    name: str
    module: str
    stored_transposed: bool
    a: Tensor
    b: Tensor
    energy: float
    """Sum of the squares of the change."""
    lost: float
    """The same of what B A misses."""


@dataclass(frozen=True)
class NotHeld:
    """A changed weight that no LoRA can hold."""

    name: str
    why: str


def factorize(
    model: nn.Module, delta: DeltaFile, targets: Sequence[Target], rank: int
) -> tuple[list[Factors], list[NotHeld]]:
    """Low-rank factors of every change of the base ``model``, and the weights for which there are none."""
    factors: list[Factors] = []
    left: list[NotHeld] = []
    for record, parameter in targets:
        module_name, _, key = record.name.rpartition(".")
        module = model.get_submodule(module_name)
        if key != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
            left.append(NotHeld(record.name, f"{key} of a {type(module).__name__}"))
            continue
        tuned = parameter.detach().cpu().clone()
        for piece, place in walk(delta.pieces(record)):
            flip(tuned, place, piece.values)
        change = tuned.float() - parameter.detach().cpu().float()
        if not torch.isfinite(change).all():
            raise DeltaError(f"{delta.path}: {record.name}: its change is not finite, so no adapter can hold it")
        transposed = isinstance(module, Conv1D)
        a, b = truncate(change.t() if transposed else change, rank)
        missed = (change.t() if transposed else change) - b @ a
        energy, lost = float(change.double().square().sum()), float(missed.double().square().sum())
        factors.append(Factors(record.name, module_name, transposed, a, b, energy, lost))
    return factors, left


def truncate(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), float32, whose product is nearest to ``change`` (out, in), float32.

    Only rows and columns that changed are decomposed. Where even these are many, the singular values come from random
    projections (Halko, Martinsson, Tropp 2011, with power iterations): near the best, and always the same.
    """
    rows, cols = change.any(1).nonzero()[:, 0], change.any(0).nonzero()[:, 0]
    block = change[rows][:, cols]
    kept = min(rank, *block.shape)
    if min(block.shape) <= LARGEST_EXACT:
        u, s, vh = torch.linalg.svd(block, full_matrices=False)
        v = vh.t()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(block, q=min(kept + OVERSAMPLING, *block.shape), niter=ITERATIONS)
    scale = s[:kept].sqrt()
    a, b = change.new_zeros(rank, change.shape[1]), change.new_zeros(change.shape[0], rank)
    a[:kept, cols] = (v[:, :kept] * scale).t()
    b[rows, :kept] = u[:, :kept] * scale
    return a, b


def write_adapter(folder: Path, base: Path, model: nn.Module, factors: Sequence[Factors], rank: int) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT names what they hold. lora_alpha = r: a scale of 1."""
    tensors: dict[str, Tensor] = {}
    for part in factors:
        tensors[f"base_model.model.{part.module}.lora_A.weight"] = part.a.contiguous()
        tensors[f"base_model.model.{part.module}.lora_B.weight"] = part.b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [part.module for part in factors],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(part.stored_transposed for part in factors),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
