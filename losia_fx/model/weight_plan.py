"""What is planned for a parameter of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class WeightPlan:
    """One parameter of the model."""

    name: str
    parameter: nn.Parameter
    owners: list[tuple[str, nn.Module, str]]
    """(module name, module, name of the parameter in it) of everything that holds it."""
    trained: str
    """"subnet", "full" or "frozen"."""
    why: str
    whole_cols: bool = False
    kind: str | None = None
    """Of linear weight (losia_fx.model.kinds.kind_of); None for any other parameter."""
    outside: bool = False
    """A linear outside the repeated blocks that nobody excluded: a classification head, most often."""
    chosen: bool = False
    """The configuration asks for a linear to stay frozen: exclude, target or output_rank_factor."""
