"""Inputs of a step, of another batch size and another length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losia_fx.errors import ConfigError

from ..load_model import Example


def resize(example: Example, batch_size: int | None, length: int | None) -> Example:
    """The example with its rows repeated, or cut off, to ``batch_size`` rows of ``length`` tokens; None leaves either.

    The batch is the first dimension of every tensor that has as many as the first tensor, the length the second of the
    whole-numbered ones among them (token ids, masks, labels). Raises ConfigError where there is no such dimension.
    """
    for flag, value in (("--batch-size", batch_size), ("--seq-length", length)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: give a whole number of at least 1")
    if batch_size is None and length is None:
        return example
    tensors = [
        value for value in (*example.args, *example.kwargs.values()) if isinstance(value, Tensor) and value.dim()
    ]
    tokens = next((value for value in tensors if _is_tokens(value)), None)
    if not tensors or (length is not None and tokens is None):
        raise ConfigError("this model's inputs have no tokens (batch, length): leave out --batch-size and --seq-length")
    rows, columns = tensors[0].shape[0], None if tokens is None else tokens.shape[1]

    def fit(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            if length is not None and _is_tokens(value) and value.shape[1] == columns:
                value = _to(value, 1, length)
            if batch_size is not None and value.shape[0] == rows:
                value = _to(value, 0, batch_size)
        return value

    return Example(tuple(map(fit, example.args)), {name: fit(value) for name, value in example.kwargs.items()})


def _is_tokens(value: Tensor) -> bool:
    return value.dim() >= 2 and not value.is_floating_point()


def _to(value: Tensor, dim: int, size: int) -> Tensor:
    times = [1] * value.dim()
    times[dim] = -(-size // value.shape[dim])
    return torch.narrow(value.repeat(times), dim, 0, size)
