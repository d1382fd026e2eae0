"""load_delta: turns the base into the tuned model and back, checked to the last bit before a weight is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from losia_fx.errors import DeltaError
from losia_fx.method.shards import Portion, own_block, write_block
from losia_fx.method.visits import Place, as_integers, walk
from losia_fx.model.blocks import plain_name
from losia_fx.model.kinds import is_sharded
from losia_fx.runtime.controller import find_controller
from losia_fx.runtime.sharding import of_all_ranks
from losia_fx.runtime.shards import local, portion_of, reshard_all, whole
from losia_fx.runtime.take_in_shards import loaded_shards

from .format import WeightRecord, check_plain, digest, fingerprint
from .read import DeltaFile

Target = tuple[WeightRecord, nn.Parameter]


def load_delta(model: nn.Module, path: str | os.PathLike[str], undo: bool = False) -> None:
    """Turns ``model`` from the base into the tuned one in place, exact to the bit; with ``undo``, back.

    A plain model, a transformed one (its subnets are gathered anew), or what torch.compile, DistributedDataParallel or
    fully_shard (on all ranks) made of either. Nothing recompiles.
    Raises DeltaError, naming file and weight, with nothing changed: where the file
    is damaged, where a weight is missing or of another shape or dtype, where the weights are not those of the base
    (with undo: of the tuned model), or are there already.

    >>> losia_fx.load_delta(model, "perl.safetensors")
    >>> losia_fx.load_delta(model, "perl.safetensors", undo=True)
    """
    controller = find_controller(model)
    if controller is not None:
        controller.look()
    reshard_all(model)
    with _opened_alike(model, path) as delta:
        targets = find_targets(model, delta)
        check_weights(delta, targets, undo)
        _check_outcome(delta, targets, undo)
        _apply(delta, targets)
    changed = {id(parameter) for _, parameter in targets}
    for state in controller.states if controller is not None else ():
        if id(state.weight) in changed:
            state.reload() if state.shards is None else loaded_shards(state)


def _opened_alike(model: nn.Module, path: str | os.PathLike[str]) -> DeltaFile:
    """Of a sharded model a file that one rank cannot use, or has in another form, is refused by all of them, which have
    to go on together."""
    delta: DeltaFile | None = None
    failure: str | None = None
    try:
        delta = DeltaFile(path)
    except (DeltaError, OSError) as error:
        if not any(map(is_sharded, model.parameters())):
            raise
        failure = str(error)
    records = () if delta is None else delta.records
    own = (failure, [(record.name, record.base, record.tuned) for record in records])
    ranks = of_all_ranks(model.parameters(), own)
    if failed := [other for other, _ in ranks if other is not None]:
        raise DeltaError(failed[0])
    if any(other != own for other in ranks):
        raise DeltaError(f"{path}: is not the same file on all ranks")
    assert delta is not None
    return delta


def find_targets(model: nn.Module, delta: DeltaFile) -> list[Target]:
    """The parameters that the file speaks of, after a look at names, shapes and dtypes."""
    parameters = dense_parameters(model)
    targets: list[Target] = []
    places: set[tuple[torch.device, int]] = set()
    for record in delta.records:
        parameter = parameters.get(record.name)
        if parameter is None:
            made = f"the delta was made of a {delta.model}, this is a {type(model).__name__}"
            raise DeltaError(f"{delta.path}: {record.name}: the model has no such weight; {made}")
        for what, found, wanted in (
            ("shape", tuple(parameter.shape), record.shape),
            ("dtype", parameter.dtype, record.dtype),
        ):
            if found != wanted:
                raise DeltaError(
                    f"{delta.path}: {record.name}: its {what} is {found} in the model and {wanted} in the delta: "
                    f"load the base in the {what} that the delta was made with"
                )
        check_plain(delta.path, record.name, parameter)
        here = local(parameter)
        place = (here.device, here.data_ptr())
        if here.numel() and place in places:  # of a sharded weight a rank may have nothing
            raise DeltaError(f"{delta.path}: {record.name}: shares its memory with another weight of the delta")
        places.add(place)
        targets.append((record, parameter))
    return targets


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its name in the plain model, under all its names where it is tied; subnets left out."""
    controller = find_controller(model)
    root, hidden = model, set()
    if controller is not None:
        root, hidden = controller.root, {id(state.values) for state in controller.states}
    while isinstance(root, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        root = root.module
    named = root.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in named if id(parameter) not in hidden}


def check_weights(delta: DeltaFile, targets: Sequence[Target], undo: bool) -> None:
    """The weights are those that the delta starts from."""
    digests = [digest(whole(parameter)) for _, parameter in targets]
    start = [record.tuned if undo else record.base for record, _ in targets]
    end = [record.base if undo else record.tuned for record, _ in targets]
    if digests == start:
        return
    if digests == end:
        raise DeltaError(f"{delta.path}: is {'not applied: there is nothing to undo' if undo else 'applied already'}")
    wrong = [target[0].name for target, *pair in zip(targets, digests, start, strict=True) if pair[0] != pair[1]]
    which = "tuned" if undo else "base"
    needed = fingerprint(delta.records, which)[:12]
    advice = "undo what came after it" if undo else "load the model that it was trained from, or undo other deltas"
    raise DeltaError(f"{delta.path}: {wrong[0]}: is not that of the {which} model (fingerprint {needed}): {advice}")


def _check_outcome(delta: DeltaFile, targets: Sequence[Target], undo: bool) -> None:
    """The delta leads where it says: to be known before the first weight is touched."""
    for record, parameter in targets:
        outcome = whole(parameter).detach().cpu().clone()
        for piece, place in walk(delta.pieces(record)):
            flip(outcome, place, piece.values)
        if digest(outcome) != (record.base if undo else record.tuned):
            raise DeltaError(f"{delta.path}: {record.name}: its changes do not lead to the weight that it names")


def _apply(delta: DeltaFile, targets: Sequence[Target]) -> None:
    """Flips every bit that differs. Should that fail midway (memory of a device, Ctrl-C), what was done is undone."""
    done = 0
    try:
        for change in _flips(delta, targets):
            flip(*change)
            done += 1
    except BaseException:
        for change in islice(_flips(delta, targets), done):
            flip(*change)
        raise


def _flips(delta: DeltaFile, targets: Sequence[Target]) -> Iterator[tuple[Tensor, Place, Tensor]]:
    for record, parameter in targets:
        for piece, place in walk(delta.pieces(record)):
            yield parameter, place, piece.values


@torch.no_grad()
def flip(weight: Tensor, place: Place, bits: Tensor) -> None:
    """Of a sharded weight this rank's portion: nothing travels."""
    here = as_integers(local(weight))
    if is_sharded(weight):
        _flip_portion(here, portion_of(weight), place, bits)
    else:
        place.write(here, place.read(here) ^ bits)


def _flip_portion(here: Tensor, portion: Portion, place: Place, bits: Tensor) -> None:
    if place.rows is None or place.cols is None:
        here.bitwise_xor_(bits.view(portion.length, *here.shape[1:])[portion.inside].to(here.device))
        return
    rows, cols = place.rows.to(here.device), place.cols.to(here.device)
    own = portion.own(rows) if rows.dim() == 1 else (rows, rows)
    flipped = own_block(here, portion, own, rows, cols) ^ place.block_of(bits).to(here.device)
    write_block(here, portion, own, rows, cols, flipped if rows.dim() == 1 else flipped[portion.inside])
