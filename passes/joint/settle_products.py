"""Has products of 8-bit numbers be scaled once, into memory, for all that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from losia_fx._compat import settle

from ..base import GraphPass
from .graph import CASTS, aten, is_tensor

_SCALES = (*CASTS, aten.mul.Tensor, aten.add.Tensor)
"""What makes y of the sums: factors of rows and columns, a bias, a cast."""


@dataclass(frozen=True)
class SettleProducts(GraphPass):
    """scaled(x @ W) -> settle(scaled(x @ W)), of int32 sums on a CPU: a buffer of the model's dtype, and no recipe.

    Inductor takes the scaling into the kernel of each reader, so that a rotation, a silu and its derivative read four
    bytes an element and scale them anew, and a gather does so from all over. Written once, such a step takes 0.96 of
    the time.

    Runs on the joint graph of forward and backward, first, for Inductor: gathers stop where a product was settled.
    """

    name: ClassVar[str] = "settle-products"

    def apply(self, gm: fx.GraphModule) -> int:
        done = 0
        for product in gm.graph.find_nodes(op="call_function", target=aten._int_mm.default):
            scaled = _scaled(product)
            value = scaled.meta["val"]
            if value.device.type != "cpu":
                continue
            with gm.graph.inserting_after(scaled):
                settled = gm.graph.call_function(settle, (scaled, list(value.stride())))
            settled.meta.update(scaled.meta)
            readers = [user for user in scaled.users if user is not settled]
            for reader in readers:
                reader.replace_input_with(scaled, settled)
            done += 1
        return done


def _scaled(product: fx.Node) -> fx.Node:
    """The last of the nodes that scale the sums, each the only reader of the one before."""
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        shape = node.meta["val"].shape
        widest = [source for source in user.all_input_nodes if is_tensor(source) and source.meta["val"].shape == shape]
        if user.target not in _SCALES or widest != [node]:
            break
        node = user
        if node.meta["val"].dtype not in (torch.int32, torch.float32):
            break
    return node
