"""The tracked base of a model as plain tensors, for a checkpoint that a run goes on from.

With it, save_delta after a resumed run tells the difference to the first base, not to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from losia_fx.errors import DeltaError
from losia_fx.method.visits import BaseHistory, Piece
from losia_fx.model.blocks import plain_name
from losia_fx.runtime.bases import Bases, restarted
from losia_fx.runtime.controller import Controller


def history_tensors(controller: Controller) -> dict[str, Tensor]:
    """The base of the controller's model as tensors on the CPU; none where it is not tracked."""
    if controller.bases is None:
        return {}
    histories = {f"subnet/{state.name}": state.base for state in controller.states if state.base is not None}
    if not restarted(controller.states):
        histories |= {f"full/{name}": history for name, history in controller.bases.full.items()}
    tensors: dict[str, Tensor] = {}
    for name, history in histories.items():
        if history.checksum is not None:
            tensors[f"{name}/checksum"] = torch.tensor(history.checksum, device="cpu")
        for number, piece in enumerate(history.pieces):
            for part, tensor in (("values", piece.values), ("rows", piece.rows), ("cols", piece.cols)):
                if tensor is not None:
                    tensors[f"{name}/{number}.{part}"] = tensor
    return tensors


def restore_history(controller: Controller, tensors: Mapping[str, Tensor]) -> None:
    """Takes back what ``history_tensors`` gave; from then on the base is tracked, unless there is nothing to take.

    Weights may be loaded before or after: those of the run keep the base. Raises DeltaError, with nothing changed, for
    tensors of another model.
    """
    if not tensors and controller.bases is None:
        return
    subnets = {f"subnet/{state.name}": state for state in controller.states}
    parameters = {f"full/{plain_name(name)}" for name, _ in controller.root.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        if name not in subnets and name not in parameters:
            raise DeltaError(f"base history: {key}: this model has no such weight; restore into the model of that run")
        found.setdefault(name, {})[part] = tensor
    histories = {name: _history(parts) for name, parts in found.items()}
    for name, state in subnets.items():
        state.base = histories.pop(name, None)
    controller.bases = Bases({name.removeprefix("full/"): history for name, history in histories.items()})


def _history(parts: Mapping[str, Tensor]) -> BaseHistory:
    checksum = parts.get("checksum")
    pieces: list[Piece] = []
    while (values := parts.get(f"{len(pieces)}.values")) is not None:
        rows, cols = (parts.get(f"{len(pieces)}.{part}") for part in ("rows", "cols"))
        pieces.append(Piece(values, rows, cols))
    return BaseHistory(pieces, None if checksum is None else int(checksum), resumed=True)
