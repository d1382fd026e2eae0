"""How often each row of the output head was a label in the first steps of training: head_rows="frequent".

The labels are what the model's forward is called with while gradients are on, micro-batches and all. Those of a step
count once it has been made, over all ranks, so that every rank has, and a checkpoint of any one holds, the same counts.
Those of a step that a GradScaler leaves out count with the next one: nothing here hears of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from losia_fx.errors import LosiaError
from losia_fx.method.schedule import counted_steps

from .state import SubnetState
from .train_state import TrainState

NAMES = ("labels", "input_ids")
"""Of the forward's arguments: the first that is there."""


def counting_head(train: TrainState) -> SubnetState | None:
    """The head, while labels are counted for it."""
    if train.config.head_rows != "frequent" or train.progress.step >= counted_steps(train.config):
        return None
    return next((state for state in train.states if state.whole_cols), None)


@torch.no_grad()
def note(train: TrainState, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Before a forward with gradients on, called with these. Raises LosiaError where no labels are among them."""
    head = counting_head(train)
    if head is None:
        return
    labels, size = _labels(train.root, args, kwargs), head.shape[0]
    if labels is None:
        raise LosiaError(
            f'head_rows="frequent" counts labels, and the forward of {type(train.root).__name__} was given neither '
            "labels nor input_ids, as a tensor of whole numbers: pass one of them by that name, or take another "
            'head_rows: "importance", "mixed", "fixed" or "random"'
        )
    flat = labels.detach().reshape(-1).to(head.weight.device, torch.int64)
    inside = (flat >= 0) & (flat < size)  # -100 and the like are no labels; a row more takes them
    counts = torch.zeros(size + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat.where(inside, size), torch.ones_like(flat))
    before = train.pending.labels
    train.pending.labels = counts[:size] if before is None else before + counts[:size]


@torch.no_grad()
def add_counted(train: TrainState) -> None:
    """At the end of a step: its labels, of all ranks, count."""
    noted, train.pending.labels = train.pending.labels, None
    head = counting_head(train)
    if head is None:
        return
    counts = torch.zeros(head.shape[0], dtype=torch.int64, device=head.weight.device) if noted is None else noted
    train.ranks.add_up(counts)
    head.label_counts = counts if head.label_counts is None else head.label_counts + counts


def _labels(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    try:
        positional = inspect.signature(root.forward).bind_partial(*args).arguments
    except TypeError:
        positional = {}
    found = (kwargs.get(name, positional.get(name)) for name in NAMES)
    return next((value for value in found if isinstance(value, Tensor) and _is_whole(value)), None)


def _is_whole(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
