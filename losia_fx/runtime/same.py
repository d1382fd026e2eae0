"""Whether S and W[rows, cols] are the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from losia_fx.method.transfers import copies

from .evidence import equal
from .sharding import same_values
from .state import SubnetState


def same(states: Sequence[SubnetState]) -> list[bool]:
    """Whether W[rows, cols] is S as W can hold it, of each; each device is waited for once."""
    if states and states[0].shards is not None:
        return same_values(states)
    found = [equal(state.block(), state.as_held(state.values)) for state in states]
    return [bool(each) for each in copies(found)]


@torch.no_grad()
def strays(states: Iterable[SubnetState]) -> list[SubnetState]:
    """The subnets that are not in their weights, W[rows, cols]: those are of another checkpoint than the state."""
    chosen = list(states)
    return [state for state, agrees in zip(chosen, same(chosen), strict=True) if not agrees]
