"""Watch: what calling a module runs instead of the module's own call, in the place where Module.compile() puts its own.

Not hooks: a module with hooks is called the long way round, also where gradients are off, and Dynamo makes a graph for
each. Without any, it goes from the call straight to the forward, and knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from losia_fx._compat import (
    compiled_call,
    exchange_calls,
    install_call,
    is_jit_tracing,
    plain_call,
    runs_uncompiled,
)

WATCH = "_losia_watch"
"""Attribute of a watched module: its Watch, which so goes with copies of it, where torch drops a compiled call."""


class Watch:
    """One module, and what its calls run."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        """run: called with the watch and the call's arguments; a function of a module, so that it can be pickled."""
        self.module, self._run = module, run
        self.before = compiled_call(module)
        """The user's own Module.compile(), which serves while gradients are off, and comes back in the end."""
        self.install()

    def install(self) -> None:
        self.module.__dict__[WATCH] = self
        install_call(self.module, self)

    def remove(self) -> None:
        self.module.__dict__.pop(WATCH, None)
        if compiled_call(self.module) is self:
            install_call(self.module, self.before)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "_run": self._run, "before": None}  # as torch drops it from copies

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.install()

    @runs_uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Dynamo folds is_compiling() to True: what it inlines leaves no trace in a graph.
        if torch.compiler.is_compiling() or is_jit_tracing():
            return plain_call(self.module, *args, **kwargs)
        return self._run(self, *args, **kwargs)

    @runs_uncompiled
    def plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None and not torch.is_grad_enabled():
            return self.before(*args, **kwargs)
        return plain_call(self.module, *args, **kwargs)


@contextmanager
def plain_forward(watches: Iterable[Watch]) -> Iterator[None]:
    """While a transformed model runs with gradients off: its weights have been looked at, and nothing in it learns, so
    its modules are called as they were before."""
    watching = list(watches)
    places = [each.module.__dict__ for each in watching]
    try:
        exchange_calls(places, [each.before for each in watching])
        yield
    finally:
        exchange_calls(places, watching)
