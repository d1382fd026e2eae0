"""The localization node: ``losia::tap`` in the forward, ``losia::localize`` in the backward.

Both are opaque and purely functional. They carry the input of a product from its forward to its backward while its
group is being profiled, so that the full gradient can be made there, and cost a call and nothing else while it is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from losia_fx import registry

from .grouped import ends_for, grouped_outer
from .library import library


class Profiled(Protocol):
    """What a subnet offers to tap and localize: losia_fx.runtime.state.SubnetState in training, stand-ins in tests."""

    @property
    def profiling(self) -> bool: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as it is stored."""

    def begin_use(self) -> None:
        """Called before the parts of one use of the weight in a backward are added."""

    def accumulate(self, grad: Tensor, expert: int | Tensor | None, owned: bool) -> None:
        """Adds a part of the full gradient, as the weight is stored; ``expert`` (a number, or (1,) int64 on the device)
        of an expert weight, or all of it.

        ``owned``: nobody else has ``grad``, so it may be kept.
        """


@dataclass(frozen=True)
class Tapped:
    """The input of a product, and how the product goes with the weight as it is stored."""

    handle: int
    x: Tensor
    form: str
    """The product's normal form: "linear", "grouped" or "batched" (see losia_fx.passes.products)."""
    transposed: bool
    """The normal form takes the weight's transpose."""
    expert: int | None
    """The expert whose weight alone it takes, perhaps counted from the end; None for the whole weight."""
    index: Tensor | None
    """What the graph computes: the one expert (0-dim) of a linear, the experts (n,) of a batched product's matrices, or
    (E,) where each expert's rows of a grouped product's x end."""


BY_HANDLE: MutableMapping[int, Profiled] = registry.BY_HANDLE
TAPPED: MutableMapping[int, Tapped] = registry.TAPPED

# A CUDA graph would replay the kernels and leave out what these do on the host.
_HOST = (torch.Tag.cudagraph_unsafe,)
library.define(
    "tap(Tensor x, Tensor handle, int call, str form='linear', bool transposed=False, int? expert=None, "
    "Tensor? index=None) -> Tensor",
    tags=_HOST,
)
library.define("localize(Tensor grad_y, Tensor ticket, Tensor handle, int call) -> Tensor", tags=_HOST)
library.define("localize_whole(Tensor grad, Tensor handle, int call) -> Tensor", tags=_HOST)


def _profiled(handle: Tensor) -> Profiled | None:
    subnet = BY_HANDLE.get(int(handle))
    return subnet if subnet is not None and subnet.profiling else None


def _tap(
    x: Tensor,
    handle: Tensor,
    call: int,
    form: str = "linear",
    transposed: bool = False,
    expert: int | None = None,
    index: Tensor | None = None,
) -> Tensor:
    if _profiled(handle) is None:
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    number = next(registry.tickets)
    ticket = torch.tensor([number], device="cpu")
    # Copies: the compilers reuse memory as soon as the graph has no further use for it. They go when their ticket does,
    # that is with the autograd graph, whether a backward came or not.
    kept = None if index is None else index.detach().clone()
    TAPPED[number] = Tapped(int(handle), x.detach().clone(), form, transposed, expert, kept)
    weakref.finalize(ticket, TAPPED.pop, number, None)
    return ticket


def _localize(grad_y: Tensor, ticket: Tensor, handle: Tensor, call: int) -> Tensor:
    number = int(ticket)
    tapped = TAPPED.get(number) if number else None
    subnet = _profiled(handle)
    if tapped is not None and subnet is not None:
        subnet.begin_use()
        grad, expert = _full(grad_y, tapped, subnet.shape)
        subnet.accumulate(grad, expert, owned=True)
    return grad_y.new_zeros(1)


def _localize_whole(grad: Tensor, handle: Tensor, call: int) -> Tensor:
    subnet = _profiled(handle)
    if subnet is not None:
        subnet.begin_use()
        subnet.accumulate(grad, None, owned=False)
    return grad.new_zeros(1)


def _full(grad_y: Tensor, tapped: Tapped, shape: tuple[int, ...]) -> tuple[Tensor, int | Tensor | None]:
    """The full gradient of a product's weight as it is stored, and the expert that it is of; None for all of them.

    The host asks for no value of an index: that would wait for the device.
    """
    x, index = tapped.x.to(grad_y.dtype), tapped.index
    # The normal forms take (out, in) of one matrix, but (in, out) of experts.
    swapped = (tapped.form == "linear") == tapped.transposed
    left, right = (x, grad_y) if swapped else (grad_y, x)
    if tapped.form == "linear":
        grad = left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])
        return grad, tapped.expert if index is None else index.view(1).long() % shape[0]
    if index is None:
        return left.mT @ right, None
    if tapped.form == "grouped":
        return grouped_outer(left, right, ends_for(index, grad_y.dtype)), None
    experts, order = (index.long() % shape[0]).sort(stable=True)
    last = torch.searchsorted(experts, torch.arange(shape[0], device=index.device), right=True)
    left, right = (part.index_select(0, order).flatten(0, 1) for part in (left, right))
    return grouped_outer(left, right, ends_for(last * x.shape[1], grad_y.dtype)), None


def drop_taps(handles: Iterable[int]) -> None:
    """Forgets the inputs tapped for these subnets: after their step no backward of an earlier forward counts any more.

    Those of another model stay: its backward may come after this model's step.
    """
    mine = set(handles)
    for number in [number for number, tapped in TAPPED.items() if tapped.handle in mine]:
        del TAPPED[number]


def tapped_bytes() -> int:
    """The memory that tapped inputs hold."""
    return sum(tapped.x.untyped_storage().nbytes() for tapped in TAPPED.values())


for _name, _body in (("tap", _tap), ("localize", _localize), ("localize_whole", _localize_whole)):
    library.impl(_name, _body, "CompositeExplicitAutograd")


def _fake_ticket(*args: Any, **kwargs: Any) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


def _fake_zero(grad: Tensor, *args: Any) -> Tensor:
    return grad.new_empty(1)


torch.library.register_fake("losia::tap", _fake_ticket, lib=library)
for _name in ("localize", "localize_whole"):
    torch.library.register_fake(f"losia::{_name}", _fake_zero, lib=library)

tap = torch.ops.losia.tap.default
"""Keeps a copy of x, if the subnet that ``handle`` names is being profiled, and returns its ticket (int64, one element,
on the CPU; 0 where nothing was kept)."""
localize = torch.ops.losia.localize.default
"""Adds the product's part, grad_y^T x, to the full gradient of the subnet that ``handle`` names; x is what ``ticket``
stands for. Returns one zero of grad_y's dtype."""
localize_whole = torch.ops.losia.localize_whole.default
"""Adds ``grad``, shape of the weight, to the full gradient of the subnet that ``handle`` names. Returns one zero."""
