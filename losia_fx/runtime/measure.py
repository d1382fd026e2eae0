"""What one step says of the importance of profiled weights: from G, as the training loop has changed its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from losia_fx.config import BY_SUMS
from losia_fx.method.fit import Fit, fit_from, fits_from, measure_clip, measure_fit
from losia_fx.method.kernels import update_importance
from losia_fx.method.sums import add_sums, sums_shapes
from losia_fx.method.transfers import numbers_of

from . import sharding
from .optimizers import grad_scale
from .profile import Profile
from .shards import local
from .state import SubnetState


def fit_gradients(
    states: Sequence[SubnetState], profiled: Sequence[SubnetState], optimizers: Sequence[Optimizer]
) -> dict[SubnetState, Fit | None]:
    """How each profiled subnet's gradient, as the optimizer sees it, follows from its G; None where it does not.

    states: all that the optimizers step; profiled: those of them that have a Profile.
    """
    measurable = [state for state in profiled if state.profile is not None and state.values.grad is not None]
    if not measurable:
        return {}
    sharded = measurable[0].shards is not None
    gradients = sharding.seen_gradients(measurable) if sharded else _seen_gradients(measurable)
    pairs = {state: (seen, block) for state, (seen, block, _) in gradients.items()}
    found = [torch.cat([measure_fit(s, b), finite.float().unsqueeze(0)]) for s, b, finite in gradients.values()]
    clip = _measure_clip(states, sharded)
    *numbers, clipped = numbers_of([*found, clip])  # the device waits once
    measured = {state: each[:-1] for state, each in zip(pairs, numbers, strict=True) if each[-1]}
    known = fits_from(list(measured.values()), clipped)
    fits: dict[SubnetState, Fit | None] = dict.fromkeys(pairs) | dict(zip(measured, known, strict=True))
    factors = [fit.factor for fit in fits.values() if fit is not None]
    # One that is clipped throughout says nothing of the factor and is measured with its neighbours': another wait.
    blank = [state for state, each in measured.items() if each[1] and fits[state] is None] if factors else []
    again = numbers_of([measure_fit(*pairs[state], factors[0]) for state in blank])
    fits |= {state: fit_from(each, factors[0]) for state, each in zip(blank, again, strict=True)}
    scale = math.prod(grad_scale(each) for each in optimizers)  # a fused optimizer unscales inside its step
    return {state: fit and Fit(fit.factor / scale, fit.limit and fit.limit / scale) for state, fit in fits.items()}


def _seen_gradients(states: Sequence[SubnetState]) -> dict[SubnetState, tuple[Tensor, Tensor, Tensor]]:
    """S.grad, G[rows][:, cols], and whether all of G is finite, 0-dim."""
    found = {}
    for state in states:
        seen, profile = state.values.grad, state.profile
        assert seen is not None
        assert profile is not None
        grad = profile.grad
        if grad is None:  # S.grad outlived its G: it was not zeroed since the last step
            grad = torch.zeros_like(state.weight, dtype=torch.float32)
        # One pass, in G's own width; a nan anywhere is both the least and the most.
        finite = torch.isfinite(torch.stack(grad.aminmax())).all()
        found[state] = (seen, state.block_of(grad), finite)
    return found


def _measure_clip(states: Sequence[SubnetState], sharded: bool) -> Tensor:
    if sharded:
        parts = [local(grad) for state in states if (grad := state.values.grad) is not None]
        return measure_clip(parts, lambda largest: sharding.largest_of_all(largest, states))
    values = [state.owner._parameters[state.values_name] for state in states]
    return measure_clip([grad for each in values if each is not None and (grad := each.grad) is not None])


def add_importance(
    profile: Profile, weight: Tensor, grad: Tensor, fit: Fit, kind: str, betas: tuple[float, float], compiled: bool
) -> None:
    """One step's part in I and U, or in the sums. weight: W of before the step; grad: its G; kind: of importance;
    betas: LosiaConfig's."""
    if kind in BY_SUMS:
        if profile.row_sums is None or profile.col_sums is None:
            profile.row_sums, profile.col_sums = (grad.new_zeros(n, dtype=torch.float32) for n in sums_shapes(weight))
        add_sums(profile.row_sums, profile.col_sums, grad, fit.factor, fit.limit, betas[0])
        return
    if profile.importance is None or profile.uncertainty is None:
        profile.importance = torch.zeros_like(grad, dtype=torch.float32)
        profile.uncertainty = torch.zeros_like(grad, dtype=torch.float32)
    update_importance(
        profile.importance, profile.uncertainty, weight, grad, fit.factor, fit.limit, kind, betas, compiled
    )
