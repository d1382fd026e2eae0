"""How an optimizer's gradient follows from the accumulated one: unscaled, averaged, clipped by norm or by value.

The full gradient G is gathered in the backward, and what the training loop then does to gradients it does to S.grad
alone. So the factor and the limit between the two are measured on the subnet, where both are known, and hold for all of
G. Tensors in, numbers out; what is measured on a device is read once for all subnets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losia_fx._compat.foreach import flatten_dense


class Fit(NamedTuple):
    """How the optimizer's gradient follows from the accumulated one: clamp(factor * G, -limit, limit)."""

    factor: float
    limit: float | None = None


TOLERANCE = 1e-2
"""How far clamp(factor * G, -limit, limit) may be from S.grad, as a share of it (norms), to be what it follows from."""


def measure_fit(seen: Tensor, accumulated: Tensor, fallback: float | None = None) -> Tensor:
    """What ``fit_from`` decides by, of S.grad and G[rows][:, cols]: 7 numbers, float32, on the device of ``seen``, made
    without waiting for it."""
    seen, accumulated = seen.detach().float(), accumulated.detach().float()
    size = seen.abs()
    largest = size.amax()
    used = (size > 0) & (accumulated != 0)
    ratio = seen / accumulated
    otherwise = torch.full_like(largest, math.nan if fallback is None else fallback)
    fits: list[Tensor] = []
    for usable, limit in ((used, torch.full_like(largest, math.inf)), (used & (size < largest), largest)):
        median = lower_median(ratio.where(usable, math.nan))
        factor = torch.where(median.isnan(), otherwise, median)
        off = torch.minimum(torch.maximum(accumulated * factor, -limit), limit) - seen
        fits += [factor, off.norm() / seen.norm()]
    finite = torch.isfinite(seen).all() & torch.isfinite(accumulated).all()
    return torch.stack([finite.float(), largest, accumulated.any().float(), *fits])


def lower_median(values: Tensor) -> Tensor:
    """``values.nanmedian()``: the middle of what is no NaN, the lower of two; NaN where nothing else is. 0-dim float32.

    torch's own ends in a wait for the device on a GPU. Read as integers, with the magnitude turned around below zero,
    floats keep their order; and integers sort in a seventh of the time on a CPU.
    """
    bits = values.flatten().where(~values.flatten().isnan(), math.nan).view(torch.int32)  # all NaN alike: the largest
    ordered = (bits ^ ((bits >> 31) & _MAGNITUDE)).sort().values
    count = (ordered <= _INFINITY).sum()
    middle = ordered.gather(0, ((count - 1) // 2).clamp_min(0).view(1)).squeeze(0)
    return (middle ^ ((middle >> 31) & _MAGNITUDE)).view(torch.float32)


_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000
"""Of a float32's bits: all but the sign, and infinity."""


def fit_from(numbers: Sequence[float], fallback: float | None = None, limit: float | None = None) -> Fit | None:
    """The Fit that turns G[rows][:, cols] into S.grad, from what ``measure_fit`` found of them; None where none does.

    The factor is the median of their ratios over the elements where both are non-zero, so that unscaling, averaging and
    clipping by norm are found without a word from the training loop. Where clipping by value explains the largest
    elements, they are left out of the median. ``fallback`` serves a gradient that is zero throughout. ``limit``: of a
    clip that is known, from other subnets too.
    """
    finite, largest, anything, factor, miss, clipped_factor, clipped_miss = numbers
    if not finite:
        return None
    if not largest:
        return None if fallback is None or anything else Fit(fallback, limit)
    fit = Fit(factor, limit)
    known = limit == largest and clipped_miss <= miss
    if known or (miss > 1e-6 and clipped_miss < 0.1 * miss):  # beyond rounding, and the clip explains it
        fit, miss = Fit(clipped_factor, largest), clipped_miss
    return fit if miss <= TOLERANCE else None


# -- clipping by value, which one optimizer's subnets have in common ---------------------------------------------------

LARGEST = 256
"""How many of the largest elements are looked at for those that a clip has made alike."""
ENOUGH = 128
"""Elements, zeros aside, from which on they show whether some are alike by chance."""
CHUNK, AT_ONCE = 256, 2**24
"""Elements: of a piece that is known by its largest alone, and of gradients that are laid side by side."""


def fits_from(measured: Sequence[Sequence[float]], clip: Sequence[float]) -> list[Fit | None]:
    """The Fit of each profiled subnet of one optimizer, where a clip by value that shows in any subnet holds for all.

    measured: what ``measure_fit`` found, a subnet each; clip: what ``measure_clip`` found of all the optimizer's
    subnets, profiled or not. A gradient that is zero throughout takes the factor of the first that has one.
    """
    fits = [fit_from(numbers) for numbers in measured]
    limit = clip_limit(clip, fits)
    fallback = next((fit.factor for fit in fits if fit is not None), None)
    return [fit_from(numbers, fallback, limit=limit) for numbers in measured]


@torch.no_grad()
def measure_clip(grads: Sequence[Tensor], of_all: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What ``clip_limit`` decides by, of S.grad of all the subnets that an optimizer steps: 3 numbers, float32.

    They are the largest absolute value, how many of the LARGEST largest elements have it (0 where there are not ENOUGH
    to tell), and how many of them have the same other one, at most. On the device of the first; made without waiting
    for it. of_all: the largest elements of all ranks, of this one's: where each has a part of the gradients.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    if not by_device:
        return torch.zeros(3, device="cpu")
    tops = [_largest_of(some) for some in by_device.values()]
    largest = _largest(torch.cat([top.to(tops[0].device) for top in tops]))
    if of_all is not None:
        largest = _largest(of_all(largest))
    alike = (largest.unsqueeze(1) == largest).sum(1)
    others = alike.where((largest != largest[0]) & (largest > 0), 0).amax()
    enough = (largest > 0).sum() >= ENOUGH
    return torch.stack([largest[0].float(), (alike[0] * enough).float(), others.float()])


def _largest_of(grads: Sequence[Tensor]) -> Tensor:
    """Of one device's gradients; some of them side by side at a time, as calls cost more than copies."""
    parts: list[list[Tensor]] = [[]]
    count = 0
    for grad in grads:
        count += grad.numel()
        if parts[-1] and count > AT_ONCE:
            parts.append([])
            count = grad.numel()
        parts[-1].append(grad)
    return torch.cat([_largest(flatten_dense(part)) for part in parts])


def _largest(values: Tensor) -> Tensor:
    """The LARGEST largest absolute values (n,), in order; fewer where there are no more.

    They lie in as many chunks, those with the largest of all; so one pass finds nearly all that topk need not look at.
    """
    chunks = values[: values.numel() // CHUNK * CHUNK].view(-1, CHUNK)
    if len(chunks) > LARGEST:
        best = chunks.abs().amax(1).topk(LARGEST).indices
        values = torch.cat([chunks.index_select(0, best).view(-1), values[chunks.numel() :]])
    return values.abs().topk(min(LARGEST, values.numel())).values


def clip_limit(clip: Sequence[float], fits: Iterable[Fit | None]) -> float | None:
    """Where the gradients of an optimizer were clipped by value, from ``measure_clip`` and the subnets' own fits.

    A clip leaves the largest elements alike. Gradients computed in bfloat16 have few distinct values, and so some that
    are alike at any size, the fewer the larger they are: then the largest must be so by far more often than any other.
    One clip holds for all: nothing is larger than what it leaves.
    """
    largest, alike, others = clip
    if not 0 < largest < math.inf:
        return None
    found = alike > max(1, others * min(others, 4)) or any(fit is not None and fit.limit == largest for fit in fits)
    return largest if found else None
