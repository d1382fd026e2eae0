"""Calls with tensors that stand in the parameters' place (torch.func.functional_call), and calls that torch.func
transforms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from losia_fx._compat import plain_call

from .state import SubnetState
from .train_state import TrainState


def call_with_others(train: TrainState, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The plain forward with the tensors that are there.

    Each S is put into its W, but for a W that was given by itself: so all that was given gets its gradient, a dense
    one, and so does an S that was not.
    """
    with subnets_in_place(train.states), train.watches.plain_forward():
        return plain_call(train.root, *args, **kwargs)


@contextmanager
def subnets_in_place(states: Sequence[SubnetState]) -> Iterator[None]:
    """Meanwhile each W is a tensor made of it and its S, but for a W that was given by itself."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for state in states:
            parameters: dict[str, Any] = state.owner._parameters
            weight, values = parameters[state.parameter], parameters[state.values_name]
            if not isinstance(values, nn.Parameter) or isinstance(weight, nn.Parameter):
                before.append((parameters, state.parameter, weight))
                parameters[state.parameter] = _with_values(weight, values, state)
        yield
    finally:
        for parameters, key, weight in before:
            parameters[key] = weight


def _with_values(weight: Tensor, values: Tensor, state: SubnetState) -> Tensor:
    rows, cols = state.rows, state.cols
    index: tuple[Tensor, ...] = (rows.unsqueeze(-1), cols.unsqueeze(-2))
    if weight.dim() == 3:
        index = (torch.arange(weight.shape[0], device=weight.device)[:, None, None], *index)
    return weight.index_put(index, values.to(weight.dtype))
