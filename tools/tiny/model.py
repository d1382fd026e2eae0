"""A tiny model in training form and a batch for it: what a check of any library's models runs over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losia_fx.errors import LosiaError

SEED = 1
ALONE = " alone"
"""What the note of a model ends with that is a part of another, which does not run whole."""
MOST_PARAMETERS = 25_000_000
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class TinyModel:
    """A model in training mode, and a batch for it."""

    model: nn.Module
    batch: dict[str, Any]
    labelled: bool
    """Whether the batch has labels, so that the output has a loss."""
    note: str = ""
    """What a reader of a table has to know about it."""

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


def check_size(model: nn.Module) -> None:
    """Raises LosiaError where the model is too large to be called tiny."""
    size = sum(p.numel() for p in model.parameters())
    if size > MOST_PARAMETERS:
        raise LosiaError(f"{size:,} parameters after shrinking")


def prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` itself in ``dtype`` and training mode, every parameter drawn.

    As zeros and ones, biases and norms would hide a gradient that is left out.
    Raises what check_size does.
    """
    check_size(model)
    model = model.to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() > 1 else 0.1))
    return model


def in_dtype(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``batch`` with its floating tensors, those in lists and dictionaries too, in ``dtype``."""
    return {name: _in_dtype(value, dtype) for name, value in batch.items()}


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, dict):
        return in_dtype(value, dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_in_dtype(item, dtype) for item in value)
    return value


def step(tiny: TinyModel) -> None:
    """A plain step, after which no gradient is left.

    Raises what the model raises, and LosiaError where the loss or a gradient is not finite or nothing has a gradient.
    """
    tiny.model.zero_grad()
    torch.manual_seed(SEED)
    loss = tiny.loss(tiny.model(**tiny.batch))
    loss.backward()
    grads = [p.grad for p in tiny.model.parameters() if p.grad is not None]
    tiny.model.zero_grad()
    if not math.isfinite(loss.item()):
        raise LosiaError(f"loss is {loss.item()}")
    if not all(grad.isfinite().all() for grad in grads):
        raise LosiaError("a gradient is not finite")
    if not any(grad.any() for grad in grads):
        raise LosiaError("no gradient")


@dataclass(frozen=True)
class Recipe:
    """How to make a model that is tiny from the start, and a batch for it."""

    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    """The keyword arguments of its forward."""


def made(recipes: Mapping[str, Recipe], name: str, dtype: torch.dtype) -> TinyModel:
    """The recipe's model, without dropout, and its batch.

    Raises LosiaError for a name without a recipe and for a model that does not run in ``dtype``.
    """
    if name not in recipes:
        raise LosiaError(f"{name!r} is none of the {len(recipes)} models, such as {', '.join(list(recipes)[:3])}")
    try:
        step(_made(recipes[name], dtype))
        return _made(recipes[name], dtype)  # some keep what they saw: the one handed out has seen nothing
    except Exception as error:
        raise LosiaError(f"{name}: cannot be built: {' '.join(str(error).split())[:400]}") from error


def _made(recipe: Recipe, dtype: torch.dtype) -> TinyModel:
    torch.manual_seed(SEED)
    model = recipe.model()
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or (key == "p" and isinstance(module, DROPOUTS))):
                setattr(module, key, 0.0)
    return TinyModel(prepared(model, dtype), in_dtype(recipe.batch(), dtype), labelled=False)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
