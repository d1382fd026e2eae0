"""What tells that a tensor was written since it was last looked at.

Marks are its version and its place in memory: they cost next to nothing, and miss writes through ``.data`` and by
kernels that are called by hand. Where they tell nothing, elements that were kept do: Samples hold some elements of many
tensors, read in one call; a Witness is of a line of W that no subnet holds, so that it tells a write to all of W from
one to S alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from losia_fx.method.write_through import as_bytes

from .state import SubnetState

Sample = dict[tuple[torch.device, torch.dtype], Tensor]

SAMPLED = 2**12
"""Elements of all S together that are kept to tell whether they were written, about, and as many of all W."""
MOST_SAMPLED = 128
"""Of one S or W, at most."""
READ_AT_ONCE = 256
"""Tensors, S and W, of which elements are read at every look: a read of one takes a sixth of a microsecond."""
WITNESSES = 256
"""Elements of W outside of a subnet, at most, that tell whether all of W was written or S alone."""


_version = attrgetter("_version")
_place: Callable[[Any], int] = methodcaller("data_ptr")  # not Tensor's own: of a weight in 8 bits, its numbers'
_dense_place: Callable[[Any], int] = Tensor.data_ptr


def marks_of(tensors: Sequence[Tensor | None], dense: bool = False) -> tuple[list[int], list[int]]:
    """Versions and places in memory. A tensor that is gone, or keeps no version (of inference mode), has none.

    dense: none of them is a weight in 8 bits, and Tensor's own way to say where it is takes half the time.
    """
    place = _dense_place if dense else _place
    try:
        return list(map(_version, tensors)), list(map(place, tensors))
    except (AttributeError, TypeError, RuntimeError):
        return [_mark(tensor, _version) for tensor in tensors], [_mark(tensor, _place) for tensor in tensors]


def _mark(tensor: Tensor | None, read: Callable[[Any], Any]) -> int:
    try:
        return int(read(tensor))
    except (AttributeError, TypeError, RuntimeError):
        return -1


class Samples:
    """Some elements of every S, of small ones all: read in one call a step, they tell later whether S was written."""

    def __init__(self, values: Sequence[Tensor], places: Sequence[int] = ()) -> None:
        """places: of the values in memory, for which the samples hold."""
        self.places = list(places)
        most = sampled(len(values))
        self.strides = [max(1, -(-t.numel() // most)) if t.is_contiguous() else 1 for t in values]
        self._views = [_some_of(t.detach(), stride, most) for t, stride in zip(values, self.strides, strict=True)]
        self._kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        self._at: list[tuple[tuple[torch.device, torch.dtype], slice]] = []
        ends: dict[tuple[torch.device, torch.dtype], int] = {}
        for number, view in enumerate(self._views):
            kind = (view.device, view.dtype)
            self._kinds.setdefault(kind, []).append(number)
            start = ends.get(kind, 0)
            ends[kind] = start + view.numel()
            self._at.append((kind, slice(start, ends[kind])))

    def take(self, numbers: Sequence[int] | None = None) -> Sample:
        """The elements as they are, of all or of some."""
        chosen = self._kinds if numbers is None else {self._at[number][0]: [number] for number in numbers}
        return {kind: torch.cat([self._views[number] for number in each]) for kind, each in chosen.items()}

    def renew(self, sample: Sample, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.of(sample, number).copy_(self._views[number])

    def look_at(self, views: Mapping[int, Tensor]) -> None:
        """Other elements than before, as many."""
        for number, view in views.items():
            self._views[number] = view

    def differ(self, sample: Sample) -> bool:
        """Whether those on the CPU are others now."""
        at_hand = [kind for kind in sample if kind[0].type == "cpu"]
        now = self.take() if at_hand else {}
        return any(not torch.equal(now[kind], sample[kind]) for kind in at_hand)

    def differs(self, sample: Sample, number: int) -> bool:
        """The same of one tensor alone."""
        view = self._views[number]
        return view.device.type == "cpu" and not torch.equal(view, self.of(sample, number))

    def of(self, sample: Sample, number: int, alone: bool = False) -> Tensor:
        """The elements of one S. alone: the sample was taken of it only."""
        kind, place = self._at[number]
        return sample[kind] if alone else sample[kind][place]


def _some_of(tensor: Tensor, stride: int, most: int) -> Tensor:
    """A view, one-dimensional: of a tensor that was given memory where it does not lie as it is numbered (S.data = a
    transpose), the beginning of its first row."""
    if tensor.is_contiguous():
        return tensor.view(-1)[::stride]
    return tensor[(0,) * (tensor.dim() - 1)][:most]


def sampled(count: int) -> int:
    """Elements that are kept of each of ``count`` tensors."""
    return min(MOST_SAMPLED, max(1, SAMPLED // max(1, count)))


def as_held(state: SubnetState, sample: Tensor, stride: int) -> Tensor:
    """A sample of S, every ``stride``-th element or the first of those, as W can hold it."""
    if state.stored is None:
        return sample.to(state.weight.dtype)
    whole = sample.new_zeros(state.values.numel())
    whole[::stride][: sample.numel()] = sample
    return state.as_held(whole.view(state.values.shape)).reshape(-1)[::stride][: sample.numel()]


def in_shared_memory(state: SubnetState) -> bool:
    """Whether other processes may write to W or S too, on the CPU."""
    held = (state.weight, state.values, state.rows)
    return any(type(each) in _PLAIN and each.device.type == "cpu" and each.is_shared() for each in held)


_PLAIN = (Tensor, nn.Parameter)


def line_of(state: SubnetState, count: int) -> Tensor:
    """The beginning of a row of W, one of ``count``, (n,), in the midst of its subnet: elements side by side cost a
    third of as many that are apart. Nothing where the host would wait for it."""
    weight, most = state.weight.detach(), sampled(count)
    if weight.device.type != "cpu":
        return torch.empty(0, dtype=weight.dtype, device="cpu")
    row = int(state.rows.reshape(-1)[state.rows.shape[-1] // 2])
    if (stored := state.stored) is not None:
        return as_bytes(stored.numbers)[row, :most]
    return (weight[0] if weight.dim() == 3 else weight)[row, :most]


@dataclass(frozen=True)
class Witness:
    """Some elements of one line of W, a row or a column that is not in the subnet: nothing of ours writes them."""

    dim: int
    line: Tensor
    """(1,) int64, on W's device: no host waits for it."""
    values: Tensor

    def holds(self, state: SubnetState) -> bool:
        now = _read(state.weight, self.dim, self.line.to(state.weight.device))
        return now.dtype == self.values.dtype and bool(equal(now, self.values.to(now.device)))


def witnesses_of(states: Iterable[SubnetState]) -> dict[SubnetState, Witness | None]:
    """None where a subnet is all of its weight. Lines of many subnets of one size are found in one go."""
    found: dict[SubnetState, Witness | None] = {}
    alike: dict[tuple[int, int, torch.device], list[SubnetState]] = {}
    for state in states:
        indices = (state.rows, state.cols)
        dim = next((dim for dim in (-2, -1) if indices[dim].shape[-1] < state.weight.shape[dim]), None)
        if dim is None:
            found[state] = None
        else:
            alike.setdefault((dim, indices[dim].shape[-1], indices[dim].device), []).append(state)
    for (dim, count, _), some in alike.items():
        gaps = _first_gaps(torch.stack([(state.rows, state.cols)[dim].reshape(-1, count)[0] for state in some]))
        for state, line in zip(some, gaps.split(1), strict=True):
            found[state] = Witness(dim, line, _read(state.weight, dim, line).clone())
    return found


def _read(weight: Tensor, dim: int, line: Tensor) -> Tensor:
    matrix = weight.detach()
    elements = (matrix[0] if matrix.dim() == 3 else matrix).index_select(dim, line).flatten()
    return elements[:: -(-elements.numel() // WITNESSES)]


def _first_gaps(indices: Tensor) -> Tensor:
    """The lowest index that is not among those in each row of ``indices`` (n, count), sorted; (n,)."""
    return (indices == torch.arange(indices.shape[1], device=indices.device)).sum(1)


def differ_by_lines(state: SubnetState) -> bool:
    """Whether S and W[rows, cols] differ in whole rows, or in whole columns: whoever writes to a few of them writes to
    W, which has names for them, and so does whoever sets a few elements of S alone write to S."""
    differ = state.block() != state.as_held(state.values)
    by_rows, by_cols = differ.any(-1, keepdim=True), differ.any(-2, keepdim=True)
    return bool((differ == by_rows).all() | (differ == by_cols).all())


def points_alike(one: Tensor, values: Tensor) -> bool:
    """Whether a tensor points where the weights do, as no gradient does."""
    mine, whole = one.detach().float(), values.detach().float()
    return bool((mine * whole).sum() > 0.5 * mine.norm() * whole.norm())


def equal(one: Tensor, other: Tensor) -> Tensor:
    """Whether all elements are the same, NaN being NaN; 0-dim bool."""
    return ((one == other) | (one.isnan() & other.isnan())).all()
