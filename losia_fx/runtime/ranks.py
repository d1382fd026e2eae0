"""The processes that train one model together: those over which DistributedDataParallel averages its gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from losia_fx._compat import active_ddp, ddp_ignores
from losia_fx.method.write_through import as_bytes

from .quantised_weight import QuantisedWeight
from .state import SubnetState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """Remembers the DistributedDataParallel around a model from its first forward until that is gone: a forward of the
    bare module in between changes nothing."""

    def __init__(self) -> None:
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._sharding: Sequence[ProcessGroup] = ()

    def group(self) -> ProcessGroup | None:
        """G must be averaged over the same processes as S.grad; None where one process trains by itself."""
        ddp = None if self._ddp is None else self._ddp()
        return None if ddp is None else ddp.process_group

    @property
    def several(self) -> bool:
        """Whether DistributedDataParallel joins more processes than this."""
        ranks = self.group()
        return ranks is not None and dist.get_world_size(ranks) > 1

    def shard(self, states: Sequence[SubnetState], generator: torch.Generator, groups: Sequence[ProcessGroup]) -> None:
        """FSDP2 has sharded the model over a mesh, with one of ``groups`` a dimension: all ranks take the first one's
        subnets, of which S is gathered later."""
        self._sharding = groups
        for group in groups:
            _share_places(states, generator, group)

    def add_up(self, counts: Tensor) -> None:
        """The sum over all ranks that train together, in place."""
        ddp = self.group()
        for group in self._sharding if ddp is None else (ddp,):
            dist.all_reduce(counts, group=group)

    def notice(self, states: Sequence[SubnetState], generator: torch.Generator) -> bool:
        """At a forward: whether it runs under DistributedDataParallel. At the first, all ranks take rank 0's subnets.

        All of them are in their first forward then, so they can wait for each other.
        """
        ddp = active_ddp()
        if ddp is not None and (self._ddp is None or self._ddp() is not ddp):
            self._ddp = weakref.ref(ddp)
            _share_stored(states, ddp.process_group)
            if _share_places(states, generator, ddp.process_group):
                for state in states:
                    state.values.copy_(state.block())
        return ddp is not None


@torch.no_grad()
def _share_places(states: Sequence[SubnetState], generator: torch.Generator, group: ProcessGroup) -> bool:
    """All ranks take the first one's rows, cols and generator. Whether they are others than before."""
    if not states or dist.get_world_size(group) == 1:
        return False
    first = dist.get_global_rank(group, 0)
    indices = [index for state in states for index in (state.rows, state.cols)]
    joined = torch.cat([index.reshape(-1) for index in indices])
    drawn = generator.get_state().to(joined.device)
    before = joined.clone()
    dist.broadcast(joined, first, group)
    dist.broadcast(drawn, first, group)
    generator.set_state(drawn.cpu())
    if torch.equal(joined, before):
        return False
    for index, given in zip(indices, joined.split([index.numel() for index in indices]), strict=True):
        index.copy_(given.view_as(index))
    return True


@torch.no_grad()
def _share_stored(states: Sequence[SubnetState], group: ProcessGroup) -> None:
    """All ranks take the first one's W, where that is in 8 bits: packed from dense values, as DistributedDataParallel
    would send them, it could come out as other numbers."""
    first = dist.get_global_rank(group, 0)
    for stored in (state.stored for state in states):
        if stored is not None and dist.get_world_size(group) > 1:
            numbers, scales = as_bytes(stored.numbers).clone(), stored.scales.clone()
            dist.broadcast(numbers, first, group)
            dist.broadcast(scales, first, group)
            stored.copy_(QuantisedWeight(numbers.view(stored.numbers.dtype), scales, stored.dtype))


def keep_indices_at_home(root: nn.Module, states: Sequence[SubnetState]) -> None:
    """DistributedDataParallel leaves rows and cols alone, which it would send round before every forward, and each W in
    8 bits, which it cannot send as it is."""
    ddp_ignores(root, add=_names(root, states))


def forget_indices(root: nn.Module, states: Sequence[SubnetState]) -> None:
    ddp_ignores(root, remove=_names(root, states))


def _names(root: nn.Module, states: Sequence[SubnetState]) -> set[str]:
    indices = {id(s.owner._buffers.get(name)) for s in states for name in (s.rows_name, s.cols_name)} - {id(None)}
    stored = {id(weight) for state in states if (weight := state.stored) is not None}
    found = {name for name, buffer in root.named_buffers(remove_duplicate=False) if id(buffer) in indices}
    return found | {name for name, weight in root.named_parameters(remove_duplicate=False) if id(weight) in stored}
