"""subnets, controller, report: what a transformed model shows. All take wrappers of it too (torch.compile's, DDP's)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from losia_fx.errors import LosiaError, TransformError
from losia_fx.model.blocks import plain_name
from losia_fx.runtime.controller import Controller, find_controller
from losia_fx.runtime.outside import whole_weight

from .report import Report, report_of


@dataclass(frozen=True, eq=False)
class Subnet:
    """A weight's subnet as the user sees it: live tensors, not copies."""

    name: str
    """Of the weight, in named_parameters() before the transformation."""
    weight: nn.Parameter
    """W as the module stores it, dense and up to date: (out, in), or (E, out, in) where it holds E experts."""
    values: nn.Parameter
    """S = W[rows][:, cols], (r, c), or (E, r, c): one block an expert; float32 where W is narrower."""
    rows: Tensor
    """(r,) or (E, r), sorted int64: indices into dimension -2 of W."""
    cols: Tensor
    """(c,) or (E, c), sorted int64: indices into dimension -1 of W."""
    group: int


def controller(model: nn.Module) -> Controller:
    """The controller of a transformed model. Raises TransformError where there is none."""
    found = find_controller(model)
    if found is None:
        raise TransformError(
            f"{type(model).__name__} has no subnets: call losia_fx.transform(model), or run a compiled forward first "
            'where it is compiled with backend="losia"'
        )
    return found


def subnets(model: nn.Module) -> Mapping[str, Subnet]:
    """Every subnet, by the weight's name in named_parameters() of the model before the transformation.

    The tensors are live: values is the parameter that learns, rows and cols change in place at a re-selection.
    """
    followed = controller(model)
    followed.check_tree()
    followed.look()
    states = followed.states
    return MappingProxyType({s.name: Subnet(s.name, s.weight, s.values, s.rows, s.cols, s.group) for s in states})


def report(model: nn.Module) -> Report:
    """Every weight: trained through a subnet, in full, or frozen, and why. print() shows a table.

    Raises StateError where modules that hold subnets have been replaced since the transformation.
    """
    followed = controller(model)
    followed.check_tree()
    followed.look()
    return report_of(followed)


def dense(model: nn.Module, name: str) -> Tensor:
    """The whole weight ``name`` of a transformed model as a differentiable tensor, (out, in) or (E, out, in).

    For a loss that takes a weight by hand, where the weight itself is frozen: a penalty, or logits of one's own, as
    fused cross-entropies make them: ``hidden @ dense(model, "lm_head.weight").T``. The value is W; whatever is done
    with it, the gradient goes to the subnet, at the cost of a full one. A parameter without a subnet comes back as it
    is.
    Raises LosiaError for a name that the model does not have, TransformError for a model without subnets.
    """
    followed = controller(model)
    named = followed.root.named_parameters(remove_duplicate=False)
    parameters = {plain_name(known): parameter for known, parameter in named}
    if name not in parameters:
        close = difflib.get_close_matches(name, parameters, n=3) or list(parameters)[:3]
        kind = type(followed.root).__name__
        raise LosiaError(f"dense: {kind} has no parameter {name!r}; there is {', '.join(close)}")
    state = next((state for state in followed.states if state.holds(parameters[name])), None)
    return parameters[name] if state is None else whole_weight(followed.train, state)


def stepped(model: nn.Module) -> None:
    """Says that a step was made by something that is no torch.optim.Optimizer of the subnets: an update written by
    hand, an optimizer of master copies that are copied back.

    To be called after each such step, when the subnets (``model.parameters()``) have moved, before the next forward and
    before the gradients are zeroed (of updates that free them at once, as LOMO's, nothing can be measured: choose
    ``importance="random"``). From then on t counts, importance is measured, subnets are rewarmed and move to
    other places as they do with an optimizer. Moments that the step keeps by itself are its own to renew: where
    ``losia_fx.controller(model).history`` has grown, its last event says which group has moved.
    Raises LosiaError where no subnet has a gradient, or has moved.
    """
    controller(model).made_by_hand()
