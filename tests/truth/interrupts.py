"""Ctrl-C at any line of losia_fx: what a person at a keyboard, a full memory or a scheduler's signal comes down to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import losia_fx
from tests.support.twin import subnets_of

PACKAGE = str(Path(losia_fx.__file__).parent)


class Interrupter:
    """Raises at the ``at``-th line of losia_fx that an action runs; with at=None only counts them.

    only: names of the functions whose lines count; None for all.
    """

    def __init__(
        self, at: int | None, error: type[BaseException] = KeyboardInterrupt, only: Collection[str] | None = None
    ) -> None:
        self.at, self.error, self.only = at, error, only
        self.lines = 0
        self.where = ""

    def __call__(self, action: Callable[[], Any]) -> bool:
        """Whether the action was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            action()
        except self.error:
            if not self.where:
                raise
            return True
        finally:
            sys.settrace(before)
        return False

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        counts = self.only is None or frame.f_code.co_name in self.only
        return self._on_line if counts and frame.f_code.co_filename.startswith(PACKAGE) else None

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not self.where:
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
                raise self.error
        return self._on_line


def lines_of(action: Callable[[], Any]) -> int:
    """How many lines of losia_fx an action runs."""
    counter = Interrupter(None)
    assert not counter(action)
    return counter.lines


def assert_nothing_leaks(model: nn.Module, where: str = "") -> None:
    """No mode is left on, no weight with a subnet requires grad."""
    assert torch._C._len_torch_function_stack() == 0, f"{where}: a TorchFunctionMode is left on"
    assert torch.is_grad_enabled(), where
    for name in subnets_of(model):
        assert not model.get_parameter(name).requires_grad, f"{where}: {name} requires grad"


def assert_agree(model: nn.Module, where: str = "") -> None:
    """W holds S, to the bit, in its own dtype."""
    for name, subnet in losia_fx.subnets(model).items():
        block = subnet.weight[subnet.rows][:, subnet.cols]
        assert torch.equal(block, subnet.values.to(block.dtype)), f"{where}: {name}: S and W are apart"
