"""What is said to a user while training: each once a model, each naming weights and what to do."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from losia_fx.errors import LosiaWarning, listed
from losia_fx.runtime import registry

from .state import SubnetState

if TYPE_CHECKING:
    from .controller import Controller


def _warn(text: str) -> None:
    warnings.warn(f"losia_fx: {text}", LosiaWarning, stacklevel=2)


def _once(controller: Controller, what: str) -> bool:
    if what in controller.told:
        return False
    controller.told.add(what)
    return True


def _names(states: Sequence[SubnetState]) -> str:
    return listed([state.name for state in states])


def warn_outside(controller: Controller) -> None:
    """Weights that ran outside a rewritten graph since the last look. Heads by themselves are none: a loss that takes
    the head's weight in pieces is meant to run as it does."""
    ran = [state for state in controller.states if state in registry.RAN_OUTSIDE] if registry.RAN_OUTSIDE else []
    registry.RAN_OUTSIDE.difference_update(ran)
    fresh = [state for state in ran if not state.ran_outside]
    for state in ran:
        state.ran = True
        state.ran_outside = True
    if fresh and not all(state.whole_cols for state in fresh):
        _warn(
            f"{len(fresh)} weights ran outside a rewritten graph ({_names(fresh)}); they train through their subnets "
            "all the same, but uncompiled. Usual causes: a graph break under gradient checkpointing, too many "
            "recompilations (TORCH_LOGS=graph_breaks,recompiles shows both), or calling a part of the model by itself"
        )


def warn_blind(states: Sequence[SubnetState]) -> None:
    """Weights that ran with gradients off within a forward, and have none."""
    blind = [state for state in states if state in registry.RAN_BLIND and state.values.grad is None]
    registry.RAN_BLIND.difference_update(states)
    fresh = [state for state in blind if not state.ran_blind]
    for state in fresh:
        state.ran_blind = True
    if fresh:
        _warn(
            f"{len(fresh)} weights do not learn: {_names(fresh)} ran with gradients off, under no_grad or in a "
            "torch.autograd.Function none of whose inputs asks for a gradient (reversible layers). There it helps to "
            "name the input embedding in trainable; else name these weights in exclude"
        )


def warn_resumed() -> None:
    _warn(
        "the optimizer goes on from an earlier run, but the subnets do not: their places were drawn anew and the "
        "moments belong to others. Load the LoSiA state too (losia_fx.load_state_dict; for a Trainer, "
        "losia_fx.LosiaCallback)"
    )


def warn_kept(group: int) -> None:
    _warn(f"group {group} keeps its subnets: no step of its slot gave a gradient to score by")


def warn_standing(controller: Controller, written: Sequence[SubnetState]) -> None:
    if _once(controller, "standing"):
        _warn(
            f"{len(written)} subnets ({_names(written)}) are moved by something that is no optimizer step of theirs (a "
            "step written by hand, an optimizer of flat or master copies). The weights follow, but t stands still: no "
            "slot ends and no subnet moves to another place. Call losia_fx.stepped(model) after each such step, before "
            "the gradients are zeroed"
        )


def warn_averaged(controller: Controller, written: Sequence[SubnetState]) -> None:
    """S was written from elsewhere and is now evaluated or saved: where it has been in several places, the average of
    what it held is that of no weight."""
    origin = registry.numbered(controller.copied_from)
    moved = controller.history if origin is None else origin.history[len(controller.history) :]
    if moved and _once(controller, "averaged"):
        _warn(
            f"{len(written)} subnets ({_names(written)}) were written from outside of a step, and have been elsewhere "
            "in their weights before. An average of them that was begun before they moved mixes different weights: "
            "average the weights by name instead (model.state_dict(), or the parameters that "
            "losia_fx.subnets(model)[name].weight gives). For values of this very place all is well"
        )


def warn_silent(controller: Controller) -> None:
    """At a slot's end: subnets that are in use and do not learn: no gradient reaches them, or no optimizer."""
    stepped = set(controller.owned())
    by_group = {group: controller.members(group) for group in range(len(controller.groups))}
    quiet = [s for s in controller.states if not s.learned and not s.ran_blind]
    idle = {group for group, members in by_group.items() if not any(state.learned for state in members)}
    deaf = [s for s in quiet if s in stepped and (s.ran or s.group in idle)]
    ownerless = [s for s in quiet if s not in stepped and s.ran]
    for state in controller.states:
        state.ran = state.learned = False
    if deaf and _once(controller, "deaf"):
        _warn(
            f"{len(deaf)} weights have had no gradient in the last {controller.config.period} steps: {_names(deaf)}. "
            "Nothing of them learns. Where a loss takes a weight by hand, take losia_fx.dense(model, name) instead; a "
            "part that another compiler runs, or that this loss has no use for, is named in exclude"
        )
    if ownerless and _once(controller, "ownerless"):
        _warn(
            f"{len(ownerless)} weights are in use, and no optimizer has stepped their subnets in the last "
            f"{controller.config.period} steps: {_names(ownerless)}. Make the optimizer from model.parameters(), or "
            "name these weights in exclude"
        )


def warn_lists(states: Sequence[SubnetState]) -> None:
    """backend="losia": lists of parameters made before the first forward hold weights in the place of their subnets."""
    weights = {id(state.weight): state for state in states}
    hidden = {id(state.values) for state in states}
    for holder in gc.get_referrers(states[0].weight) if states else ():
        if type(holder) not in (list, tuple) or not any(entry is states[0].weight for entry in holder):
            continue
        ids = {id(entry) for entry in holder}
        held = [state for key, state in weights.items() if key in ids]
        if held and not ids & hidden and all(isinstance(entry, nn.Parameter) for entry in holder):
            _warn(
                f"a list of parameters that was made before the first forward holds {len(held)} "
                f"weights ({_names(held)}) whose subnets learn in their "
                "place: clipping gradients over it leaves them out. Take model.parameters() after the first forward, "
                "or at each step"
            )
            return
