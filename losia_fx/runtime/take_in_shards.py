"""A transformed model that has been sharded since: followed from here on as FSDP2 shards it, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from losia_fx.errors import OptimizerError, StateError, listed
from losia_fx.model.blocks import plain_name
from losia_fx.model.kinds import is_sharded

from .owners import holders_of
from .sharded_agreement import ShardedAgreement
from .sharded_bases import ShardedBases
from .shards import Shards, is_cut_by_rows, local
from .state import SubnetState
from .train_state import TrainState

if dist.is_available():  # not in every build of torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

WHOLE = (
    "whole on every rank, while other weights of the model are sharded, so that ranks would train apart (or the shards "
    "of fully_shard of a module around the model alone)"
)
WAY = (
    "shard the whole transformed model with fully_shard (each block, then the model itself), and make the optimizer "
    "afterwards; or spread it with DistributedDataParallel"
)


def was_sharded(states: Iterable[SubnetState]) -> bool:
    """Whether some of these weights or subnets have become parts of tensors, and nobody has looked at that yet."""
    unseen = (state for state in states if state.shards is None)
    found = (state.held(key) for state in unseen for key in (state.parameter, state.values_name))
    return any(tensor is not None and is_sharded(tensor) for tensor in found)  # what is gone is for others to name


def take_in_shards(train: TrainState) -> None:
    """From now on the model is followed as FSDP2 has sharded it. Raises StateError, with nothing changed, where it is
    sharded in a way that cannot be followed."""
    modules = _sharding_modules(train.root)
    _refuse_ways(train, modules)
    _refuse_options(train)
    _refuse_old_optimizers(train)
    for state in train.states:
        state.shards = Shards(state, modules[state.owner])
    mesh = _mesh(train.states[0])
    train.follow_shards(ShardedAgreement(train.states), [mesh.get_group(dim) for dim in range(mesh.ndim)])
    if train.bases is not None:
        train.bases = ShardedBases()


@torch.no_grad()
def loaded_shards(state: SubnetState) -> None:
    """Weights were loaded: S is gathered from W at the next use of the whole model, which all ranks take part in.

    S of a model that was put on the meta device meanwhile (accelerate's cpu_ram_efficient_loading) stays there, as it
    is in no checkpoint: it is made real here, and FSDP2, whose own look comes after this one, takes it up.
    """
    values, weight = state.owner._parameters[state.values_name], state.owner._parameters[state.parameter]
    if isinstance(values, DTensor) and values.is_meta and weight is not None and not weight.is_meta:
        part = torch.zeros(local(values).shape, dtype=values.dtype, device=local(weight).device)
        real = DTensor.from_local(
            part, values.device_mesh, values.placements, run_check=False, shape=values.shape, stride=values.stride()
        )
        state.owner._parameters[state.values_name] = nn.Parameter(real)
    if isinstance(state.agreement, ShardedAgreement):
        state.agreement.waiting.discard(state)
        state.agreement.fresh.add(state)
        state.agreement.loaded.add(state)


def _sharding_modules(root: nn.Module) -> dict[nn.Module, FSDPModule]:
    """The innermost FSDPModule around each module, itself included."""
    found: dict[nn.Module, FSDPModule] = {}
    for module in root.modules():  # those around come first
        if isinstance(module, FSDPModule):
            found |= dict.fromkeys(module.modules(), module)
    return found


def _refuse_ways(train: TrainState, modules: dict[nn.Module, FSDPModule]) -> None:
    states = train.states
    whole = [state.name for state in states if not (is_sharded(state.weight) and is_sharded(state.values))]
    _refuse(whole, WHOLE)
    apart = [state.name for state in states if state.owner not in modules]
    _refuse(
        apart,
        "sharded over processes, but not by fully_shard of the transformed model or of a part of it (tensor parallel "
        "does that, and so does fully_shard of a module around the model alone)",
    )
    full = [plain_name(name) for name, p in train.root.named_parameters() if p.requires_grad and not is_sharded(p)]
    _refuse(full, "trains in full and is whole on every rank, while the subnets are sharded")
    _refuse(
        [s.name for s in states if not (is_cut_by_rows(s.weight) and is_cut_by_rows(s.values))],
        "sharded in more than one dimension or not by its first (tensor parallel together with fully_shard, or a "
        "shard_placement_fn)",
    )
    first = _mesh(states[0])
    others = [state.name for state in states if _mesh(state) != first]
    _refuse(others, f"sharded over another device mesh than {states[0].name}")
    away = [state.name for state in states if local(state.weight).device.type != first.device_type and not _meta(state)]
    _refuse(away, "on the CPU, while its ranks are joined by another device (CPUOffloadPolicy)")


def _mesh(state: SubnetState) -> DeviceMesh:
    weight = state.weight
    assert isinstance(weight, DTensor)
    return weight.device_mesh


def _meta(state: SubnetState) -> bool:
    return local(state.weight).is_meta


def _refuse_options(train: TrainState) -> None:
    if train.by_string:
        raise StateError(
            "backend='losia' by itself is for one process: call losia_fx.transform(model) before fully_shard, and drop "
            "the backend string"
        )
    if train.bases is not None and (train.bases.full or any(state.base is not None for state in train.states)):
        raise StateError(
            "track_delta=True: the model was trained before fully_shard, and its base is of whole weights: call "
            "fully_shard before the first step"
        )
    if kind := train.config.frozen_products:
        raise StateError(
            f"frozen_products={kind!r} and a model that fully_shard has sharded: what it keeps is of whole weights. "
            "Turn it off, or spread the model with DistributedDataParallel"
        )


def _refuse_old_optimizers(train: TrainState) -> None:
    """An optimizer that was made before fully_shard holds the parameters of before, which nobody uses any more."""
    for state in train.states[:1]:
        before = train.agreement.values_of(state)
        if before is not None and before is not state.values and (found := holders_of(before)):
            raise StateError(
                f"{type(found[0]).__name__} was made before fully_shard, and holds the parameters of before it: make "
                "it afterwards, from model.parameters()"
            )


def refuse_unsharded(train: TrainState, mine: Sequence[SubnetState], parameters: Iterable[Tensor]) -> None:
    """``parameters``: of an optimizer, of which ``mine`` are subnets. FSDP2 leaves the root as it was put together for
    a forward without gradients; an optimizer made then holds tensors that have lost their memory since, and that
    nobody uses. Raises OptimizerError that names the subnets."""
    if not train.sharded or len(mine) == len(train.states):
        return
    emptied = {p.shape for p in parameters if p.numel() and not is_sharded(p) and not p.untyped_storage().size()}
    found = [state.name for state in train.states if state not in mine and state.values.shape in emptied]
    if found:
        raise OptimizerError(
            f"{listed(found)}: the optimizer was made while fully_shard had these unsharded, after a forward without "
            "gradients say, and holds what nobody uses any more. Make it before that, or after model.reshard()"
        )


def _refuse(names: Sequence[str], why: str) -> None:
    if names:
        raise StateError(f"{listed(names)}: {why}. To train subnets, {WAY}")
