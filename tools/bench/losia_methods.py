"""LoSiA as losia_fx runs it: at rest, with a block profiled, checkpointed, and by the backend's name alone."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

import losia_fx
from losia_fx._compat import ISOLATES_RECOMPILES
from losia_fx.compile.backend import losia_backend
from losia_fx.errors import LosiaWarning
from losia_fx.runtime.controller import Controller, find_controller
from losia_fx.runtime.quantised_weight import put_block

from ..forecast import slots
from .floors import checkpointed
from .methods import Method, Trial, adamw, options_of
from .sizes import Setup, block_linears

INT8: dict[str, Any] = {"frozen_products": "int8"}
FLOAT8: dict[str, Any] = {"frozen_products": "float8"}
INSTEAD: dict[str, Any] = {**INT8, "keep_dense": False}


def transformed(setup: Setup, mode: str, model: Any = None, **options: Any) -> nn.Module:
    """A model with subnets; options: further ones of LosiaConfig."""
    given = {**options_of(mode), "rank_factor": setup.size.rank_factor, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LosiaWarning)  # of the embedding, which is to be frozen; and of slow int8
        return losia_fx.transform(setup.model() if model is None else model, **given)


def trial_of(setup: Setup, model: nn.Module) -> Trial:
    return Trial(model, setup.batch, adamw(model.parameters()))


def build_idle(setup: Setup, mode: str, **options: Any) -> Trial:
    """options: further ones of LosiaConfig."""
    trial = trial_of(setup, transformed(setup, mode, **options))
    trial.prepare = partial(_rest, losia_fx.controller(trial.model))
    return trial


def _rest(controller: Controller) -> None:
    _overlook_others(controller)
    slots.rest(controller)


def _overlook_others(controller: Controller) -> None:
    """All methods share one copy of the weights: before the clock runs W has this one's subnets again, and what others
    wrote beside them is nothing to look into."""
    with torch.no_grad():
        for weight, rows, cols, values in (state.written() for state in controller.states):
            put_block(weight, rows, cols, values.detach())
    controller.agreement.remember()
    for state in controller.states:
        if state.packed is not None:
            state.packed_inputs()  # of the weights as the others have left them


def _build_checkpointed(setup: Setup, mode: str) -> Trial:
    trial = trial_of(setup, transformed(setup, mode, checkpointed(setup.model())))
    trial.prepare = partial(_rest, losia_fx.controller(trial.model))
    return trial


def build_profiled(setup: Setup, mode: str, **options: Any) -> Trial:
    """The group of the middle block is profiled in every step. options: further ones of LosiaConfig."""
    trial = trial_of(setup, transformed(setup, mode, **options))
    controller = losia_fx.controller(trial.model)
    group = len(controller.groups) // 2
    slots.open_slot(controller, group)
    trial.prepare = partial(_stay, controller, controller.step)
    return trial


def _stay(controller: Controller, step: int) -> None:
    """The slot goes on, with what has been gathered in it."""
    _overlook_others(controller)
    controller.step = step


def _build_moving(setup: Setup, mode: str, period: int) -> Trial:
    """All groups are drawn anew after every ``period`` steps."""
    options: dict[str, Any] = {"schedule": "all", "importance": "random", "period": period}
    trial = trial_of(setup, transformed(setup, mode, **options))
    trial.prepare = partial(_overlook_others, losia_fx.controller(trial.model))
    return trial


def _build_by_string(setup: Setup, mode: str) -> Trial:
    model = setup.model()
    for linear in (*block_linears(model), model.lm_head):
        linear.weight.requires_grad_(True)
    options = {**options_of(mode), "rank_factor": setup.size.rank_factor}
    apart: dict[str, Any] = {"isolate_recompiles": True} if ISOLATES_RECOMPILES else {}  # see compiled_in_place
    compiled: Any = torch.compile(model, backend=losia_backend, options=options, **apart)
    return Trial(compiled, setup.batch, adamw(model.parameters()), partial(_rest_if_adopted, model))


def _rest_if_adopted(model: nn.Module) -> None:
    """By string, the first forward makes the controller."""
    controller = find_controller(model)
    if controller is not None:
        _rest(controller)


def count_trained(setup: Setup) -> int:
    """How many parameters LoSiA trains at a time."""
    return sum(parameter.numel() for parameter in trial_of(setup, transformed(setup, "eager")).trained)


LOSIA = (
    Method("losia", build_idle, note="no group is profiled"),
    Method("losia, a block profiled", build_profiled, note="the middle block's group is profiled in every step"),
    Method("losia int8", partial(build_idle, **INT8), note="frozen products in int8; no group is profiled"),
    Method(
        "losia int8, a block profiled",
        partial(build_profiled, **INT8),
        note="frozen products in int8; the middle block's group is profiled in every step",
    ),
    Method(
        "losia int8, instead",
        partial(build_idle, **INSTEAD),
        note="frozen products in int8, whose numbers W is kept in alone: a copy of its own, where the other methods "
        "share one of the dense weights; no group is profiled",
    ),
    Method("losia float8", partial(build_idle, **FLOAT8), note="frozen products in float8; no group is profiled"),
    Method("losia, all every 10", partial(_build_moving, period=10), note="one step of ten re-selects all groups"),
    Method("losia, all every step", partial(_build_moving, period=1), note="every step re-selects all groups"),
    Method("losia by string", _build_by_string, note='torch.compile(model, backend="losia"); no group is profiled'),
    Method("losia, checkpointed", _build_checkpointed, floor="floor, checkpointed", note="no group is profiled"),
)
