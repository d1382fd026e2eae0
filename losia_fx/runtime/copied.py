"""What a copied subnet knows of the time when it was made, until somebody uses it."""

from __future__ import annotations

import torch

from losia_fx.method.subnet import some_of

from .evidence import equal
from .state import SubnetState


@torch.no_grad()
def only_s_was_written(state: SubnetState) -> bool:
    """Of a copy that nobody has used: whether S was written since it was made, and W was not."""
    if state.at_copy is None or state.weight.is_meta:
        return False
    now, held = some_of(state.values), some_of(state.block())
    whole, before = state.values.detach().clone(), now.new_tensor(state.at_copy)
    some_of(whole).copy_(before)
    return not bool(equal(now, before)) and bool(equal(held, some_of(state.as_held(whole))))
