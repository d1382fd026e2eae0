"""save_delta: what training changed, written to a file that load_delta turns the base into the tuned model with."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from losia_fx.errors import DeltaError
from losia_fx.method.visits import BaseHistory, Piece, as_integers, walk
from losia_fx.runtime.controller import find_controller
from losia_fx.runtime.sharding import once
from losia_fx.runtime.shards import plain_kind

from .format import WeightRecord, check_plain, digest, write_delta


def save_delta(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes what training has changed in a transformed ``model`` to ``path``, a safetensors file.

    The model must have been made with transform(model, track_delta=True). The base is the model as it was before its
    first optimizer step: weights loaded before it, or loaded later from elsewhere, are a base of their own; those of a
    checkpoint of the same run are not. The base values of what training reached are kept on the CPU from that step on,
    at most one copy of each weight that learns: p*p of it a visit of its subnet, all of it where it is named in
    ``trainable``. The file holds one number an element that was reached.

    Accepts what torch.compile, DistributedDataParallel and the like made of the model. Under FSDP2 all ranks have to
    call it, and the first writes the file that one process would have written; each keeps on the CPU the base of its
    part of every weight that learns. Raises DeltaError for a model without subnets (restore() drops the base) or whose
    base is not tracked, and for weights that something else than training has changed since (averaging, or a hand):
    their base is not known. OSError where writing fails.
    """
    path = Path(path)
    controller = find_controller(model)
    if controller is None:
        raise DeltaError(
            f"{path}: {type(model).__name__} has no subnets, so its base is not known: save the delta of a model that "
            "losia_fx.transform(model, track_delta=True) made, before losia_fx.restore"
        )
    for state in controller.states:
        check_plain(path, state.name, state.weight)
    if controller.bases is None:
        raise DeltaError(
            f"{path}: what this {type(controller.root).__name__} was before training is not kept, so there is nothing "
            "to tell the change from: turn it on before training, with losia_fx.transform(model, track_delta=True). It "
            "is off by default because it costs host memory: a copy of every element that a subnet reaches, up to one "
            "of each weight that learns (losia-fx explain says how much)"
        )
    controller.look(shown=True)
    records, pieces, begun = [], {}, False
    for name, weight, history in controller.bases.histories(controller.root, controller.states):
        check_plain(path, name, weight)
        begun = True
        base = history.base_of(weight)
        if changed := _changes(path, name, weight, base, history):
            visits = 0 if changed[0].rows is None else len(changed)
            records.append(WeightRecord(name, tuple(weight.shape), weight.dtype, visits, digest(base), digest(weight)))
            pieces[name] = changed
    if not begun:
        raise DeltaError(
            f"{path}: no optimizer has stepped the subnets of this {type(controller.root).__name__} since it got them "
            "(or since weights were loaded into it): there is no change to save"
        )
    once(controller.states, lambda: write_delta(path, plain_kind(controller.root), records, pieces))


def _changes(path: Path, name: str, weight: Tensor, base: Tensor, history: BaseHistory) -> list[Piece]:
    """base XOR tuned for every piece of the history; without the last visits that changed nothing."""
    if not history.holds(base):
        raise DeltaError(
            f"{path}: {name}: was changed by something else than training since the first step (an average of models, "
            "or a hand), so its base is not known: save the whole model instead"
        )
    before, now = as_integers(base), as_integers(weight)
    changed = [
        Piece(place.read(before) ^ place.read(now), piece.rows, piece.cols) for piece, place in walk(history.pieces)
    ]
    while changed and not changed[-1].values.any():
        changed.pop()
    return changed
