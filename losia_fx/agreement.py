"""S and W[rows, cols] are the same numbers twice: whoever moves one of them, the other follows before the next use.

A followed optimizer step moves S, and the controller writes it to W. Everything else that a program can do to a
parameter is found here: tensors that took another's place, versions that have grown, storages that were swapped, and,
where none of these tells (``.data`` writes, fused kernels called by hand), the values themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import registry
from .errors import StateError, listed

if TYPE_CHECKING:
    from .state import SubnetState

WITNESSES = 256
"""Elements of W outside of a subnet, at most, that tell whether all of W was written or S alone."""

_version = attrgetter("_version")


class Swapped(StateError):
    """A forward is called with other tensors in the parameters' place, and is to run with those."""


class Agreement:
    """What the W and S of some subnets were when they last agreed.

    ``differing`` takes half a microsecond a weight and reads no value, so it can come before every forward.
    """

    def __init__(self, states: Sequence[SubnetState]) -> None:
        self.states = list(states)
        self._homes = [state.owner._parameters for state in states] * 2
        self._keys = [state.parameter for state in states] + [state.values_name for state in states]
        self._index = {state: number for number, state in enumerate(self.states)}
        self._witnesses: dict[SubnetState, _Witness | None] = {}
        self.averaged = False
        """Of a copy that nothing has trained: what moved its S and W alike was an average, of which W is right."""
        self.waiting = False
        """A LoSiA state was loaded whose weights are still to come: nothing is to agree yet."""
        self.vigilant = False
        """Writes were found that no version shows: from now on every look compares values."""
        for state in states:
            if state.ahead:  # of a copy, which was made before the weight had followed
                state.write_back()
                state.ahead = False
            state.agreement = self
        self.remember(places=True)

    def _tensors(self) -> list[Tensor | None]:
        return list(map(dict.get, self._homes, self._keys))

    def remember(self, states: Iterable[SubnetState] | None = None, places: bool = False) -> None:
        """S and W of ``states`` (None: of all) agree as they are now. places: S may lie elsewhere in W than before."""
        chosen = self.states if states is None else list(states)
        if states is None or len(chosen) == len(self.states):
            self._seen = self._tensors()
            self._versions, self._places = _marks(self._seen)
        else:
            for state in chosen:
                for at in self._slots(state):
                    self._seen[at] = tensor = self._homes[at].get(self._keys[at])
                    (self._versions[at],), (self._places[at],) = _marks([tensor])
        if places:
            self._witnesses.update((state, _Witness.of(state)) for state in chosen)

    def _slots(self, state: SubnetState) -> tuple[int, int]:
        number = self._index[state]
        return number, number + len(self.states)

    def differing(self) -> list[SubnetState]:
        """The subnets of which W or S is not the tensor, the version or the storage that it was.

        Raises Swapped where tensors that are no parameters stand in the place of some.
        """
        tensors = self._tensors()
        if all(map(is_, tensors, self._seen)):
            versions, places = _marks(tensors)
            if versions == self._versions and places == self._places:
                return []
        elif not all(isinstance(tensor, nn.Parameter) for tensor in tensors if tensor is not None):
            raise Swapped(
                "tensors stand in the place of parameters (torch.func.functional_call): call the model itself"
            )
        return [state for state in self.states if any(self.moved(state))]

    def moved(self, state: SubnetState) -> tuple[bool, bool]:
        """Whether W, and whether S, is another tensor, version or storage than when they last agreed."""
        w, s = (self._is_new(at) for at in self._slots(state))
        return w, s

    def _is_new(self, at: int) -> bool:
        tensor = self._homes[at].get(self._keys[at])
        return tensor is not self._seen[at] or _marks([tensor]) != ([self._versions[at]], [self._places[at]])

    @torch.no_grad()
    def settle(self, states: Iterable[SubnetState], idle: bool = False) -> list[SubnetState]:
        """Makes S and W of ``states`` agree, of which one or both have moved; returns those whose S had.

        S newer is written to W, W newer is gathered; of a pair that both moved, and not to the same numbers, W counts
        where the model is ``idle`` (a copy that nothing trains: its S is part of no optimizer's work).
        Raises StateError that names the weights where both moved, with those left as they are.
        """
        moved = {state: self.moved(state) for state in states}
        for state, (w, _) in moved.items():
            if w:
                self._take_in(state)
        written, torn = [], []
        for (state, (w, s)), same in zip(moved.items(), self._same(list(moved)), strict=True):
            if same:
                continue
            if s and not w:
                state.write_back()
                written.append(state)
            elif s and not idle:
                torn.append(state)
            else:
                state.reload()
        done = [state for state in moved if state not in torn]
        self._witnesses.update((state, _Witness.of(state)) for state in done if moved[state][0])
        self.remember(done)
        if torn:
            raise StateError(
                f"{listed([state.name for state in torn])}: both the weight and the values of its subnet were written "
                "since they last agreed, and they differ. Write one of them only (the weight by its own name, or the "
                "parameter in losia_fx.subnets(model)[name].values); model.load_state_dict(...) makes a model whole "
                "again"
            )
        return written

    @torch.no_grad()
    def compare(self, states: Sequence[SubnetState] | None = None) -> list[SubnetState]:
        """By value, what no version shows; the device is waited for once. Returns the subnets whose S was newer.

        Which of the two is newer is told by elements of W outside of the subnet: nothing of ours writes those, and
        whoever writes W from elsewhere writes them too. Of a copy that only ever was ``averaged`` into, W counts.
        """
        # Of a meta tensor (offloaded, or a rehearsal without a device) there is no value to compare.
        chosen = [state for state in (self.states if states is None else states) if not state.weight.is_meta]
        stale = [state for state, same in zip(chosen, self._same(chosen), strict=True) if not same]
        written = []
        for state in stale:
            witness = self._witnesses.get(state)
            if self.averaged or (witness is not None and not witness.holds(state)):
                state.reload()
                self._witnesses[state] = _Witness.of(state)
            else:
                state.write_back()
                written.append(state)
        self.remember(stale)
        return written

    def _take_in(self, state: SubnetState) -> None:
        """A W that may be another tensor than before takes its place, or is refused."""
        weight, before = state.weight, self._seen[self._slots(state)[0]]
        if tuple(weight.shape) != state.shape or not weight.is_floating_point():
            raise StateError(
                f"{state.name}: is {tuple(weight.shape)} {weight.dtype} now and was {state.shape}: its subnet does not "
                "fit it. Call losia_fx.restore(model) before such a change, and transform again after it"
            )
        if weight is not before:
            registry.place(weight, state)
            if before is not None:
                weight.requires_grad_(before.requires_grad)

    @staticmethod
    def _same(states: Sequence[SubnetState]) -> list[bool]:
        found = []
        for state in states:
            found.append(_equal(state.block_of(state.weight), state.values.to(state.weight.dtype)))
        return torch.stack(found).tolist() if found else []


def _marks(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[int]]:
    """Versions and places in memory. A tensor that is gone, or keeps no version (of inference mode), has none."""
    try:
        return list(map(_version, tensors)), list(map(torch.Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except (AttributeError, TypeError, RuntimeError):
        return [_mark(tensor, _version) for tensor in tensors], [
            _mark(tensor, torch.Tensor.data_ptr) for tensor in tensors
        ]


def _mark(tensor: Tensor | None, read: Callable[[Any], Any]) -> int:
    try:
        return int(read(tensor))
    except (AttributeError, TypeError, RuntimeError):
        return -1


@dataclass(frozen=True)
class _Witness:
    """Some elements of one line of W, a row or a column that is not in the subnet: nothing of ours writes them."""

    dim: int
    line: Tensor
    """(1,) int64, on W's device: no host waits for it."""
    values: Tensor

    @staticmethod
    def of(state: SubnetState) -> _Witness | None:
        """None where the subnet is all of the weight."""
        for dim, indices in ((-2, state.rows), (-1, state.cols)):
            if indices.shape[-1] < state.weight.shape[dim]:
                line = _first_gap(indices)
                return _Witness(dim, line, _read(state.weight, dim, line).clone())
        return None

    def holds(self, state: SubnetState) -> bool:
        now = _read(state.weight, self.dim, self.line.to(state.weight.device))
        return now.dtype == self.values.dtype and bool(_equal(now, self.values.to(now.device)))


def _read(weight: Tensor, dim: int, line: Tensor) -> Tensor:
    matrix = weight.detach()
    elements = (matrix[0] if matrix.dim() == 3 else matrix).index_select(dim, line).flatten()
    return elements[:: -(-elements.numel() // WITNESSES)]


def _first_gap(indices: Tensor) -> Tensor:
    """The lowest index that is not among the sorted ``indices``, (1,); of experts', of the first's."""
    first = indices[0] if indices.dim() == 2 else indices
    return (first == torch.arange(first.numel(), device=first.device)).sum().view(1)


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """Whether all elements are the same, NaN being NaN; 0-dim bool."""
    return ((one == other) | (one.isnan() & other.isnan())).all()
