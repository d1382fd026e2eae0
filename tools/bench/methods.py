"""What a method is to the bench, and the table of all of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from losia_fx._compat import compile_call, inner_compiler, install_call
from losia_fx.errors import ConfigError

from .sizes import Setup

RECOMPILE_LIMIT = 8
"""Dynamo's own: a method meets one shape."""
EAGER, COMPILED = "eager", "compiled"
MODES = (EAGER, COMPILED)
LEARNING_RATE = 1e-6
"""Of every method: so small that none of them disturbs the weights that all share."""


def nothing() -> None:
    """What most methods do before a step, and after their optimizer's."""


@dataclass
class Trial:
    """A method on its model, ready to step."""

    model: nn.Module
    batch: dict[str, Tensor]
    optimizer: torch.optim.Optimizer | None
    """None where there is nothing to optimize: the floors."""
    prepare: Callable[[], None] = nothing
    """Called before every step, outside of the clock."""
    write_back: Callable[[], None] = nothing
    """Called after the optimizer's step, inside of the clock."""

    def forward(self) -> Tensor:
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def optimize(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.write_back()
            self.optimizer.zero_grad()

    def step(self) -> None:
        """A whole step, for warming up."""
        self.prepare()
        self.backward(self.forward())
        self.optimize()

    @property
    def trained(self) -> list[Tensor]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. build(setup, mode) makes a Trial."""

    name: str
    build: Callable[[Setup, str], Trial]
    floor: str = "floor"
    """The method whose step this one's is held against."""
    needs: str | None = None
    """A package beside the project's own."""
    note: str = ""


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=LEARNING_RATE, fused=True)


def compiled_in_place(model: nn.Module, mode: str) -> nn.Module:
    """``model``, compiled by Inductor where ``mode`` says so, apart from all other models as losia_fx's own are.

    The code that is compiled, Module's own call, is the same for all of them: without isolation their graphs would
    stand in one list, and every call would try the guards of the others'.
    """
    if mode == COMPILED:
        install_call(model, compile_call(model, inner_compiler("inductor"), RECOMPILE_LIMIT))
    return model


def is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def chosen(methods: Sequence[Method], patterns: Sequence[str]) -> list[Method]:
    """The methods that a pattern names, and the floors that they are held against, in the table's order.

    Raises ConfigError for a pattern that names none.
    """
    names = [method.name for method in methods]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"--methods {pattern!r}: matches none of {', '.join(map(repr, names))}")
    wanted = [method for method in methods if any(fnmatchcase(method.name, pattern) for pattern in patterns)]
    floors = {method.floor for method in wanted}
    return [method for method in methods if method in wanted or method.name in floors]


def options_of(mode: str) -> dict[str, Any]:
    """LosiaConfig's compiler for a mode."""
    return {"compiler": "inductor" if mode == COMPILED else "eager"}
