"""A tiny model in training form and a batch for it: what a check of any library's models runs over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losia_fx.errors import LosiaError

SEED = 1
MOST_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class TinyModel:
    """A model in training mode, and a batch for it."""

    model: nn.Module
    batch: dict[str, Any]
    labelled: bool
    """Whether the batch has labels, so that the output has a loss."""

    def loss(self, output: Any) -> Tensor:
        """() the model's own loss, or, where it has none, a fixed smooth function of all floating outputs."""
        if self.labelled:
            loss = output["loss"] if isinstance(output, dict) else output.loss
            return torch.as_tensor(loss).sum()
        generator = torch.Generator().manual_seed(SEED)
        terms = []
        for tensor in _tensors(output):
            if tensor.is_floating_point():  # without a gradient too: what is frozen must not change the loss
                weights = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
                finite = tensor.masked_fill(~tensor.isfinite(), 0)  # logits of masked tokens are -inf
                terms.append((weights * finite.square()).mean())
        if not terms:
            raise LosiaError("no floating output")
        return torch.stack([term.double() for term in terms]).sum()


def prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` itself in ``dtype`` and training mode, every parameter drawn.

    As zeros and ones, biases and norms would hide a gradient that is left out.
    Raises LosiaError where it is too large to be called tiny.
    """
    size = sum(p.numel() for p in model.parameters())
    if size > MOST_PARAMETERS:
        raise LosiaError(f"{size:,} parameters after shrinking")
    model = model.to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() > 1 else 0.1))
    return model


def in_dtype(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``batch`` with its floating tensors in ``dtype``."""
    return {name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in batch.items()}


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
