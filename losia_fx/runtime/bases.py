"""The base of a whole model under training: what save_delta goes by, and what a resumed run has to get back."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from losia_fx.errors import DeltaError
from losia_fx.method.subnet import gather
from losia_fx.method.transfers import copies
from losia_fx.method.visits import BaseHistory, Piece, is_plain
from losia_fx.model.blocks import plain_name

from .optimizers import parameters_of, signature
from .state import SubnetState


class FullBases:
    """The base of every parameter that trains in full, by name: a copy on the CPU, taken before its first step.

    It costs the memory of these parameters: little for norms and biases, but a whole embedding for an embedding.
    """

    def __init__(self) -> None:
        self.histories: dict[str, BaseHistory] = {}
        self._seen = WeakIdKeyDictionary()
        self._met: weakref.WeakKeyDictionary[Optimizer, tuple[Any, ...]] = weakref.WeakKeyDictionary()
        """Optimizers whose parameters have all been seen, as they were then."""

    def __getstate__(self) -> dict[str, Any]:
        return {"histories": self.histories}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.histories, self._seen, self._met = state["histories"], WeakIdKeyDictionary(), weakref.WeakKeyDictionary()

    def clear(self) -> None:
        self.histories.clear()
        self._seen.clear()
        self._met.clear()

    def remember(self, root: nn.Module, optimizer: Optimizer, subnets: Iterable[SubnetState]) -> None:
        """Copies what ``optimizer`` steps of ``root``, beside the subnets, and is met for the first time."""
        if self._met.get(optimizer) == (now := signature(optimizer)):  # all but the first step
            return
        self._met[optimizer] = now
        hidden = {id(state.values) for state in subnets}
        others = (p for p in parameters_of(optimizer) if p.requires_grad and id(p) not in hidden)
        fresh = [parameter for parameter in others if parameter not in self._seen]
        names = {id(parameter): plain_name(name) for name, parameter in root.named_parameters()}
        for parameter in fresh:
            self._seen[parameter] = True
            name = names.get(id(parameter))
            if name is not None and name not in self.histories and is_plain(parameter):
                self.histories[name] = BaseHistory.of_whole(parameter)


class Trained(Protocol):
    """A transformed model, as far as its base goes: a TrainState, or the Controller."""

    @property
    def root(self) -> nn.Module: ...

    @property
    def states(self) -> list[SubnetState]: ...

    @property
    def full(self) -> FullBases: ...


def remember_base(model: Trained, optimizer: Optimizer, mine: list[SubnetState]) -> None:
    """Before a step of ``optimizer``, whose subnets are ``mine``: what it is about to change first is kept."""
    if _restarted(model):
        model.full.clear()
        for state in model.states:
            state.base.restarted = False
    for state in mine:
        state.base.open(state.weight, state.rows, state.cols)
    model.full.remember(model.root, optimizer, model.states)


def keep_places(places: Mapping[SubnetState, tuple[Tensor, Tensor]]) -> None:
    """Subnets are about to move to these rows and cols: what their weights hold there is kept first.

    The device is waited for once a dtype, however many they are.
    """
    moving = {state: place for state, place in places.items() if state.base.follows}
    blocks = [gather(state.weight.detach(), *place) for state, place in moving.items()]
    found = iter(copies([*itertools.chain.from_iterable(moving.values()), *blocks]))
    kept = [(next(found), next(found)) for _ in moving]
    for state, (rows, cols), block in zip(moving, kept, found, strict=True):
        state.base.visit(state.weight, rows, cols, block)


def keep_whole(states: Iterable[SubnetState]) -> None:
    """As keep_places, of subnets that will have been everywhere soon: one copy of each weight, once."""
    for state in states:
        state.base.keep_whole(state.weight)


def _restarted(model: Trained) -> bool:
    return any(state.base.restarted for state in model.states)


def base_histories(model: Trained) -> dict[str, tuple[nn.Parameter, BaseHistory]]:
    """Every weight that training may have changed, by name, with its base."""
    found = {state.name: (state.weight, state.base) for state in model.states if state.base.pieces}
    if not _restarted(model):
        parameters = {plain_name(name): parameter for name, parameter in model.root.named_parameters()}
        found |= {name: (parameters[name], history) for name, history in model.full.histories.items()}
    return found


def history_tensors(model: Trained) -> dict[str, Tensor]:
    """The base of the model as plain tensors on the CPU, for a checkpoint that a run goes on from.

    With it, save_delta after a resumed run tells the difference to the first base, not to the checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    histories = {f"subnet/{state.name}": state.base for state in model.states}
    if not _restarted(model):
        histories |= {f"full/{name}": history for name, history in model.full.histories.items()}
    for name, history in histories.items():
        if history.checksum is not None:
            tensors[f"{name}/checksum"] = torch.tensor(history.checksum, device="cpu")
        for number, piece in enumerate(history.pieces):
            for part, tensor in (("values", piece.values), ("rows", piece.rows), ("cols", piece.cols)):
                if tensor is not None:
                    tensors[f"{name}/{number}.{part}"] = tensor
    return tensors


def restore_history(model: Trained, tensors: Mapping[str, Tensor]) -> None:
    """Takes back what ``history_tensors`` gave. Weights may be loaded before or after: those of the run keep the base.

    Raises DeltaError, with nothing changed, for tensors of another model.
    """
    subnets = {f"subnet/{state.name}": state for state in model.states}
    parameters = {f"full/{plain_name(name)}" for name, _ in model.root.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        if name not in subnets and name not in parameters:
            raise DeltaError(f"base history: {key}: this model has no such weight; restore into the model of that run")
        found.setdefault(name, {})[part] = tensor
    histories = {name: _history(parts) for name, parts in found.items()}
    for name, state in subnets.items():
        state.base = histories.pop(name, BaseHistory())
    model.full.clear()
    model.full.histories = {name.removeprefix("full/"): history for name, history in histories.items()}


def _history(parts: Mapping[str, Tensor]) -> BaseHistory:
    checksum = parts.get("checksum")
    pieces: list[Piece] = []
    while (values := parts.get(f"{len(pieces)}.values")) is not None:
        rows, cols = (parts.get(f"{len(pieces)}.{part}") for part in ("rows", "cols"))
        pieces.append(Piece(values, rows, cols))
    return BaseHistory(pieces, None if checksum is None else int(checksum), resumed=True)
