"""The ops of a rewritten graph: ``losia::subnet_linear``, ``losia::tap``, ``losia::localize``.

``subnet_linear`` is one node in a dump, has a CompositeImplicitAutograd body and so is plain aten after AOTAutograd:
compilers fuse and cache it like anything else. ``tap`` and ``localize`` stay opaque; they carry the input of a linear
from its forward to its backward while its group is being profiled, and cost a call and nothing else while it is not.

The compilers' caches on disk know an op by its name and not by its body: a changed body under an old name would run
old gradients in a new process. So the overload is the body's version, and tests/ops/test_version.py ties it to a hash.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = "v1"

_library = torch.library.Library("losia", "DEF")
_library.define(
    f"subnet_linear.{VERSION}(Tensor x, Tensor weight, Tensor values, Tensor rows, Tensor? cols, Tensor? bias=None, "
    "Tensor? ticket=None, Tensor? handle=None, int call=0) -> Tensor"
)
# A CUDA graph would replay the kernels and leave out what these two do on the host.
_library.define("tap(Tensor x, Tensor handle, int call) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
_library.define(
    "localize(Tensor grad_y, Tensor ticket, Tensor handle, int call) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,)
)


class _SubnetLinear(torch.autograd.Function):
    """The dense forward, and the backward of LoSiA-Pro: dL/dS = g_y[..., rows]^T x[..., cols], nothing of W's size."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, values, rows, cols, bias, ticket, handle, call = inputs
        ctx.x_dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # The head needs every column (cols is None); everything else keeps its share of x and lets x go.
        kept = x if cols is None else x.index_select(-1, cols)
        ctx.save_for_backward(kept, weight, rows, ticket, handle)
        ctx.call, ctx.values_dtype = call, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        kept, weight, rows, ticket, handle = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ weight.to(grad_y.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            picked = grad_y.index_select(-1, rows)
            grad_values = picked.reshape(-1, rows.numel()).t() @ kept.reshape(-1, kept.shape[-1])
            if ticket is not None:
                # Adding localize's zero is what keeps it and its tap in the graph.
                grad_values = grad_values + torch.ops.losia.localize(grad_y, ticket, handle, ctx.call)
            grad_values = grad_values.to(ctx.values_dtype)
        if ctx.needs_input_grad[5]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_values, None, None, grad_bias, None, None, None


def _subnet_linear(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    rows: Tensor,
    cols: Tensor | None,
    bias: Tensor | None = None,
    ticket: Tensor | None = None,
    handle: Tensor | None = None,
    call: int = 0,
) -> Tensor:
    y: Tensor = _SubnetLinear.apply(x, weight, values, rows, cols, bias, ticket, handle, call)  # type: ignore[no-untyped-call]
    return y


_library.impl(f"subnet_linear.{VERSION}", _subnet_linear, "CompositeImplicitAutograd")
subnet_linear = getattr(torch.ops.losia.subnet_linear, VERSION)
"""F.linear(x, weight, bias) whose gradient goes to ``values`` instead of ``weight``.

x (..., in), weight (out, in), values (r, c), rows (r,) and cols (c,) sorted int64, or cols None for every column;
bias (out,) or None. ticket is tap's, handle names the subnet, call tells two uses of a weight in one graph apart.
Returns y (..., out). Gradients: x, values (in values' own dtype), bias. Under autocast as F.linear.
Source: LoSiA-Pro, arXiv 2507.04487, section 3.4.
"""


def subnet_linear_reference(x: Tensor, weight: Tensor, values: Tensor, rows: Tensor, cols: Tensor | None) -> Tensor:
    """The same value and the same gradient of ``values`` in plain autograd, at full cost: what the tests hold against.

    W enters as a constant in which the subnet's elements depend on ``values``.
    """
    cols = torch.arange(weight.shape[1], device=weight.device) if cols is None else cols
    subnet = weight.detach()[rows][:, cols]
    through = torch.zeros_like(weight).index_put((rows[:, None], cols), (values - values.detach()).to(weight.dtype))
    assert subnet.shape == values.shape
    return F.linear(x, weight.detach() + through)


class Profile(Protocol):
    """What a subnet offers to tap and localize: ``losia_fx.state.SubnetState`` in training, stand-ins in tests."""

    @property
    def profiling(self) -> bool: ...

    def accumulate(self, grad_y: Tensor, x: Tensor) -> None: ...


PROFILES: weakref.WeakValueDictionary[int, Profile] = weakref.WeakValueDictionary()
_tickets = itertools.count(1)
_tapped: dict[int, tuple[int, Tensor]] = {}
"""Ticket -> handle and x."""


def _tap(x: Tensor, handle: Tensor, call: int) -> Tensor:
    profile = PROFILES.get(int(handle))
    if profile is None or not profile.profiling:
        return torch.zeros(1, dtype=torch.int64)
    number = next(_tickets)
    ticket = torch.tensor([number])
    # A copy: the compilers reuse x's memory as soon as the graph has no further use for it. It goes when its ticket
    # does, that is with the autograd graph, whether a backward came or not.
    _tapped[number] = (int(handle), x.detach().clone())
    weakref.finalize(ticket, _tapped.pop, number, None)
    return ticket


def _localize(grad_y: Tensor, ticket: Tensor, handle: Tensor, call: int) -> Tensor:
    number = int(ticket)
    tapped = _tapped.get(number) if number else None
    profile = PROFILES.get(int(handle))
    if tapped is not None and profile is not None and profile.profiling:
        profile.accumulate(grad_y, tapped[1])
    return grad_y.new_zeros(1)


def drop_taps(handles: Iterable[int]) -> None:
    """Forgets the inputs tapped for these subnets: after their step no backward of an earlier forward counts any more.

    Those of another model stay: its backward may come after this model's step.
    """
    mine = set(handles)
    for number in [number for number, (handle, _) in _tapped.items() if handle in mine]:
        del _tapped[number]


def tapped_bytes() -> int:
    """The memory that tapped inputs hold."""
    return sum(x.untyped_storage().nbytes() for _, x in _tapped.values())


_library.impl("tap", _tap, "CompositeExplicitAutograd")
_library.impl("localize", _localize, "CompositeExplicitAutograd")


@torch.library.register_fake("losia::tap", lib=_library)
def _tap_fake(x: Tensor, handle: Tensor, call: int) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


@torch.library.register_fake("losia::localize", lib=_library)
def _localize_fake(grad_y: Tensor, ticket: Tensor, handle: Tensor, call: int) -> Tensor:
    return grad_y.new_empty(1)


tap = torch.ops.losia.tap.default
"""Keeps a copy of x, if the subnet that ``handle`` names is being profiled, and returns its ticket (int64, one element,
on the CPU; 0 where nothing was kept)."""
localize = torch.ops.losia.localize.default
"""Adds grad_y^T x to the full gradient of the subnet that ``handle`` names; x is what ``ticket`` stands for. Returns
one zero of grad_y's dtype."""
