"""subnets, controller, report: what a transformed model shows. All take wrappers of it too (torch.compile's, DDP's)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from .controller import Controller, find_controller
from .errors import TransformError
from .report import Report, report_of
from .state import Subnet


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
    states = controller(model).states
    return MappingProxyType({s.name: Subnet(s.name, s.weight, s.values, s.rows, s.cols, s.group) for s in states})


def report(model: nn.Module) -> Report:
    """Every weight: trained through a subnet, in full, or frozen, and why. print() shows a table."""
    return report_of(controller(model))
