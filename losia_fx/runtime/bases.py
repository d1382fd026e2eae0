"""The base of a whole model under training, where it is tracked: what save_delta goes by."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from losia_fx.method.subnet import gather
from losia_fx.method.transfers import copies
from losia_fx.method.visits import BaseHistory, is_plain
from losia_fx.model.blocks import plain_name

from .optimizers import parameters_of, signature
from .state import SubnetState


class Bases:
    """The base of every weight that training may change, on the CPU, taken before its first step.

    That of a subnet's weight is in its state, a visit at a time. ``full`` holds those of parameters that train in full,
    by name: it costs the memory of these parameters, little for norms and biases, but a whole embedding for an
    embedding.
    """

    def __init__(self, full: Mapping[str, BaseHistory] | None = None) -> None:
        self.full = dict(full or {})
        self._seen = WeakIdKeyDictionary()
        self._met: weakref.WeakKeyDictionary[Optimizer, tuple[Any, ...]] = weakref.WeakKeyDictionary()
        """Optimizers whose parameters have all been seen, as they were then."""

    def __getstate__(self) -> dict[str, Any]:
        return {"full": self.full}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.full, self._seen, self._met = state["full"], WeakIdKeyDictionary(), weakref.WeakKeyDictionary()

    def before_step(
        self, root: nn.Module, optimizer: Optimizer, states: Sequence[SubnetState], mine: Sequence[SubnetState]
    ) -> None:
        """Keeps what ``optimizer``, whose subnets are ``mine``, is about to change for the first time.

        root: the model. states: all its subnets.
        """
        if restarted(states):
            self._forget()
            for state in states:
                if state.base is not None:
                    state.base.restarted = False
        for state in mine:
            if state.base is None:
                state.base = BaseHistory()
            state.base.open(state.weight, state.rows, state.cols)
        self._keep_full(root, optimizer, states)

    def _keep_full(self, root: nn.Module, optimizer: Optimizer, states: Iterable[SubnetState]) -> None:
        """Copies what ``optimizer`` steps of ``root``, beside the subnets, and is met for the first time."""
        if self._met.get(optimizer) == (now := signature(optimizer)):  # all but the first step
            return
        self._met[optimizer] = now
        hidden = {id(state.values) for state in states}
        others = (p for p in parameters_of(optimizer) if p.requires_grad and id(p) not in hidden)
        fresh = [parameter for parameter in others if parameter not in self._seen]
        names = {id(parameter): plain_name(name) for name, parameter in root.named_parameters()}
        for parameter in fresh:
            self._seen[parameter] = True
            name = names.get(id(parameter))
            if name is not None:
                self._keep(name, parameter)

    def _keep(self, name: str, parameter: Tensor) -> None:
        if name not in self.full and is_plain(parameter):
            self.full[name] = BaseHistory.of_whole(parameter)

    def _forget(self) -> None:
        self.full.clear()
        self._seen.clear()
        self._met.clear()

    def before_move(self, places: Mapping[SubnetState, tuple[Tensor, Tensor]], everywhere: bool) -> None:
        """Subnets are about to move to these rows and cols: keeps what their weights hold there.

        The device is waited for once a dtype, however many they are. everywhere: they will have been all over their
        weights soon, so one copy of each is kept from now on.
        """
        if everywhere:
            for state in places:
                if state.base is not None:
                    state.base.keep_whole(state.weight)
            return
        moving = {state: place for state, place in places.items() if state.base is not None and state.base.follows}
        blocks = [gather(state.weight.detach(), *place) for state, place in moving.items()]
        found = iter(copies([*itertools.chain.from_iterable(moving.values()), *blocks]))
        kept = [(next(found), next(found)) for _ in moving]
        for state, (rows, cols), block in zip(moving, kept, found, strict=True):
            assert state.base is not None
            state.base.visit(state.weight, rows, cols, block)

    def histories(self, root: nn.Module, states: Iterable[SubnetState]) -> Iterator[tuple[str, Tensor, BaseHistory]]:
        """Every weight of ``root`` that training may have changed, whole, with its name and base. states: all its
        subnets."""
        states = list(states)
        yield from ((s.name, s.weight, s.base) for s in states if s.base is not None and s.base.pieces)
        if not restarted(states):
            parameters = {plain_name(name): parameter for name, parameter in root.named_parameters()}
            yield from ((name, parameters[name], history) for name, history in self.full.items())


def restarted(states: Iterable[SubnetState]) -> bool:
    """Whether weights of another run were loaded since the last step: they are a base of their own."""
    return any(state.base is not None and state.base.restarted for state in states)
