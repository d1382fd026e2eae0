"""A weight and its subnet under FSDP2: what the process holds of them, and how the rest is reached.

From ``unshard`` to ``reshard``, in a forward and a backward, the module has the whole tensors, plain nn.Parameters
whose identity lasts; graphs take those. Between steps it has the sharded ones, DTensors, and so does the optimizer.
``Shards`` keeps the sharded, which the module does not show all the time. S is sharded as any parameter and its
gradient is FSDP2's affair; G, I and U lie as W does.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from losia_fx._compat import graph_task_id
from losia_fx.method.selection import Selection
from losia_fx.method.shards import (
    Portion,
    joined,
    own_block,
    select_own_experts,
    select_portion,
    summed,
    write_block,
)

from .profile import Profile

if dist.is_available():  # not in every build of torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial, Shard


class Sharded(Protocol):
    """runtime.state.SubnetState, which has a ``Shards``."""

    owner: nn.Module
    parameter: str
    values_name: str
    whole_cols: bool
    size: tuple[int, int]
    profile: Profile | None

    @property
    def rows(self) -> Tensor: ...

    @property
    def cols(self) -> Tensor: ...

    @property
    def picked_cols(self) -> Tensor | None: ...


class Shards:
    """W and S of one subnet as FSDP2 has sharded them: Shard(0), over one dimension of their mesh."""

    def __init__(self, state: Sharded, module: FSDPModule) -> None:
        """module: that unshards and reshards W and S."""
        self._state, self.module = state, module
        self._held: dict[str, DTensor] = {}
        self._own: tuple[int, tuple[Tensor, Tensor]] | None = None
        self.refresh()
        mesh = self.weight.device_mesh
        self.mesh = mesh
        dim = next(d for d, placement in enumerate(self.weight.placements) if isinstance(placement, Shard))
        self.portion = Portion.of(self.weight.shape[0], mesh.get_group(dim))
        """Of W that this rank has."""
        self.values_portion = Portion.of(self.values.shape[0], mesh.get_group(dim))
        """Of S."""

    def refresh(self) -> None:
        """Takes up sharded parameters that have taken the place of others (loaded, or moved off the meta device)."""
        for key in (self._state.parameter, self._state.values_name):
            found = self._state.owner._parameters.get(key)
            if isinstance(found, DTensor) and self._held.get(key) is not found:
                self._held[key] = found
                if key == self._state.values_name:
                    found.register_post_accumulate_grad_hook(functools.partial(_reduce, self))

    # -- what the process holds ---------------------------------------------------------------------------------------

    def held(self, key: str) -> nn.Parameter | None:
        """The sharded parameter of that name."""
        return cast("nn.Parameter | None", self._held.get(key))

    @property
    def weight(self) -> DTensor:
        return self._held[self._state.parameter]

    @property
    def values(self) -> DTensor:
        return self._held[self._state.values_name]

    @property
    def is_unsharded(self) -> bool:
        """Whether the module has the whole tensors now, which do not see what is written to the sharded ones."""
        return self._state.owner._parameters.get(self._state.parameter) is not cast(Any, self.weight)

    # -- W[rows, cols] ------------------------------------------------------------------------------------------------

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """Which rows of the subnet this rank's portion of W has: positions in rows, and row numbers within the portion.
        The host waits for the device once a move."""
        rows = self._state.rows
        if rows.dim() == 2:
            return rows, rows  # experts are told by the portion alone
        if self._own is None or self._own[0] != rows._version:
            self._own = (rows._version, self.portion.own(rows))
        return self._own[1]

    def own_block(self, local: Tensor) -> Tensor:
        """Of a tensor cut as W, of which this rank has ``local``: its part of the block, with zeros for the others'."""
        return own_block(local, self.portion, self.own, self._state.rows, self._state.picked_cols)

    def block(self) -> Tensor:
        """W[rows][:, cols], whole."""
        return summed([self.own_block(local(self.weight))], self.portion.group)[0]

    @property
    def coincides(self) -> bool:
        """S is cut where W is: both over experts."""
        return self.weight.dim() == 3

    def write(self, values: Tensor) -> None:
        """W[rows, cols] = values, in this rank's portion. values: as method.shards.write_block takes them."""
        state = self._state
        write_block(local(self.weight), self.portion, self.own, state.rows, state.picked_cols, values)

    # -- localization -------------------------------------------------------------------------------------------------

    def begin_use(self, profile: Profile) -> None:
        """As Profile.begin_use; whether S.grad outlived a step is told when G is reduced, by all ranks together."""
        if (backward := graph_task_id()) != profile.backward:
            profile.backward = backward
            grad = self.values.grad
            profile.outlived = None if grad is None else local(grad).any()

    def select(self, score: Tensor) -> tuple[Selection, Tensor]:
        """What ``score``, this rank's portion of it, chooses; and the sum of the whole score, 0-dim."""
        state = self._state
        if self.coincides:
            found = select_own_experts(score, self.portion, (state.rows, state.cols))
        else:
            found = select_portion(score, self.portion, state.size, state.whole_cols)
        (total,) = summed([score.sum(dtype=torch.float64)], self.portion.group)
        return found, total.float()

    def whole_sums(self, row_sums: Tensor, col_sums: Tensor) -> tuple[Tensor, Tensor]:
        """Of all ranks: (out,) and (in,), or (E, out) and (E, in). A rank has those of its rows, and its rows' part in
        those of the columns."""
        if self.coincides:
            rows, cols = joined([row_sums, col_sums], [self.portion] * 2)
            return rows, cols
        (rows,), (cols,) = joined([row_sums], [self.portion]), summed([col_sums], self.portion.group)
        return rows, cols

    # -- as one process would have it ---------------------------------------------------------------------------------

    def whole(self, part: str, tensor: Tensor) -> Tensor:
        """The whole of a part of the subnet's state (runtime.snapshot), of which this rank has ``tensor``."""
        if part == "values":
            return joined([tensor], [self.values_portion])[0]
        if part == "col_sums" and not self.coincides:
            return summed([tensor], self.portion.group)[0]
        return joined([tensor], [self.portion])[0] if part in CUT else tensor

    def here(self, part: str, tensor: Tensor) -> Tensor:
        """What this rank has of a part of the state that is whole; of sums over all rows, the first rank has all."""
        if part == "col_sums" and not self.coincides:
            return tensor if self.portion.first == 0 else torch.zeros_like(tensor)
        return tensor[self.portion.inside] if part in CUT else tensor


CUT = ("importance", "uncertainty", "grad", "row_sums", "col_sums")
"""The parts of a state that are cut as W is."""


def is_block_of_shards(module: nn.Module) -> bool:
    """Whether fully_shard was called on a module that is made of others."""
    return isinstance(module, FSDPModule) and any(True for _ in module.children())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor: the very memory."""
    with torch.no_grad():
        return cast("DTensor", tensor).to_local()


@torch.no_grad()
def _reduce(shards: Shards, values: Tensor) -> None:
    """G of the backward that has just gone over S: averaged over the ranks, and this rank's portion kept.

    FSDP2 calls it on every rank, in one order, once it has reduced S.grad; on a device in the stream where it did so,
    which waits for the one that made G.
    """
    profile = shards._state.profile
    if profile is None:
        return
    made = None if profile.unreduced is None else profile.unreduced.grad
    profile.unreduced = None
    weight, device = shards.weight, local(shards.weight).device
    # A rank on which the weight had no use takes part with zeros: others wait for it.
    whole = torch.zeros(weight.shape, device=device) if made is None else made.float()
    if made is not None and device.type == "cuda":
        made.record_stream(torch.cuda.current_stream(device))
    average = [Partial("avg")] * weight.device_mesh.ndim
    placed = DTensor.from_local(whole, weight.device_mesh, average, run_check=False)
    part = placed.redistribute(placements=weight.placements).to_local()
    if profile.grad is not None:
        seen = torch.zeros((), device=device) if profile.outlived is None else profile.outlived.float()
        for dim in range(shards.mesh.ndim):
            (seen,) = summed([seen], shards.mesh.get_group(dim))
        part = part + profile.grad.masked_fill_(seen == 0, 0.0)
    profile.grad, profile.outlived = part, None
