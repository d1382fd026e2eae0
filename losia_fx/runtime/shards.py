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
from losia_fx.model.kinds import is_sharded

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
        self.mesh = self.weight.device_mesh
        self.portion = portion_of(self.weight)
        """Of W that this rank has."""
        self.values_portion = portion_of(self.values)
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

    def are_of(self, module: nn.Module) -> bool:
        """Whether it is ``module`` that unshards and reshards W and S."""
        return module is cast(Any, self.module)

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

    def cut(self, part: str, tensor: Tensor) -> Tensor:
        """The same for a checkpoint that every rank writes its own part of: a DTensor that lies as W or S does where
        ranks have portions, and plain where each has the whole. ``tensor`` itself, no copy."""
        if part == "values":
            return self.values.detach()
        return placed(tensor, self.weight) if self._in_portions(part) else self.whole(part, tensor)

    def _in_portions(self, part: str) -> bool:
        """Whether the ranks have portions of it as they have of W; in the sums over all rows each has a share."""
        return part in CUT and (part != "col_sums" or self.coincides)

    def empty(self, part: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """For a part of the state, ``shape`` of which is whole: as ``cut`` gives it, to be filled."""
        if part == "values":
            return torch.empty_like(self.values.detach())
        first = self.portion.count if self._in_portions(part) else shape[0]
        made = torch.empty(first, *shape[1:], dtype=dtype, device=local(self.weight).device)
        return placed(made, self.weight) if self._in_portions(part) else made

    def takes(self, part: str, tensor: Tensor) -> bool:
        """Whether ``here`` can tell what this rank has of ``tensor``."""
        if not isinstance(tensor, DTensor):
            return True
        like = self.values if part == "values" else self.weight
        cut = part == "values" or self._in_portions(part)
        return cut and tensor.device_mesh == like.device_mesh and tensor.placements == like.placements

    def here(self, part: str, tensor: Tensor) -> Tensor:
        """What this rank has of a part of the state, as ``whole`` or ``cut`` gave it; of sums over all rows, the first
        rank has all."""
        if isinstance(tensor, DTensor):
            return local(tensor)
        if part == "values":
            return tensor[self.values_portion.inside]
        if part == "col_sums" and not self.coincides:
            return tensor if self.portion.first == 0 else torch.zeros_like(tensor)
        return tensor[self.portion.inside] if part in CUT else tensor


CUT = ("importance", "uncertainty", "grad", "row_sums", "col_sums")
"""The parts of a state that are cut as W is."""


def is_block_of_shards(module: nn.Module) -> bool:
    """Whether fully_shard was called on a module that is made of others."""
    return isinstance(module, FSDPModule) and any(True for _ in module.children())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the very memory; anything else as it is."""
    with torch.no_grad():
        return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of it: of a DTensor put together from all ranks, anything else as it is."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def portion_of(tensor: Tensor) -> Portion:
    """What this rank has of a DTensor that is cut along its first dimension."""
    cut = cast("DTensor", tensor)
    dim = next(d for d, placement in enumerate(cut.placements) if isinstance(placement, Shard))
    return Portion.of(cut.shape[0], cut.device_mesh.get_group(dim))


def is_cut_by_rows(tensor: Tensor) -> bool:
    """Whether it is a DTensor as FSDP2 makes them: its first dimension in parts, over one dimension of the mesh."""
    if not is_sharded(tensor):
        return False
    return [each for each in cast("DTensor", tensor).placements if not each.is_replicate()] == [Shard(0)]


def placed(part: Tensor, like: Tensor) -> DTensor:
    """The DTensor of the ranks' ``part``s, which lie along their first dimension as those of ``like`` do."""
    known = cast("DTensor", like)
    form = torch.empty(known.shape[0], *part.shape[1:], device="meta")
    return DTensor.from_local(
        part, known.device_mesh, known.placements, run_check=False, shape=form.shape, stride=form.stride()
    )


def plain_kind(module: nn.Module) -> str:
    """Its class by name; fully_shard has put one of its own in front of that."""
    sharding = FSDPModule if dist.is_available() else ()
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, sharding))


def reshard_all(root: nn.Module) -> None:
    """What is unsharded still (the root's parameters after an evaluation) is given back."""
    for module in root.modules() if dist.is_available() else ():
        if isinstance(module, FSDPModule):
            module.reshard()


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
