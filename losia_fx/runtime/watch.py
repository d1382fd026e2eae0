"""Watch: what calling a module runs instead of the module's own call, in the place where Module.compile() puts its own.

Not hooks: a module with hooks is called the long way round, also where gradients are off, and Dynamo makes a graph for
each. Without any, it goes from the call straight to the forward, and knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from losia_fx import registry
from losia_fx._compat import (
    OptimizedModule,
    backend_at_work,
    called_module,
    compiled_call,
    exchange_calls,
    install_call,
    is_jit_tracing,
    other_calls,
    plain_call,
    runs_uncompiled,
)
from losia_fx.errors import TransformError

WATCH = "_losia_watch"
"""Attribute of a watched module: its Watch, which so goes with copies of it, where torch drops a compiled call."""

CALL = "_losia_call"
"""Attribute of a transformed model: what its calls run, the CompiledCall of api/transform.py."""


@runs_uncompiled
def put_first(module: nn.Module, name: str, value: Any) -> None:
    """Gives the module an attribute, before all others in its __dict__: where it is copied or pickled, what ``value``
    does for that is done before its parameters are."""
    places = module.__dict__
    places[name] = value
    for other in [] if next(iter(places)) == name else [key for key in places if key != name]:
        places[other] = places.pop(other)


class Watch:
    """One module, and what its calls run."""

    def __init__(self, module: nn.Module, run: Callable[..., Any], before_copy: Callable[[nn.Module], None]) -> None:
        """run: called with the watch and the call's arguments. before_copy: called before the module is copied or
        pickled. Functions of modules, so that they can be pickled."""
        self.module, self._run, self._before_copy = module, run, before_copy
        self.before = compiled_call(module)
        """The user's own Module.compile(), which serves while gradients are off, and comes back in the end."""
        self.install()

    @runs_uncompiled
    def install(self) -> None:
        put_first(self.module, WATCH, self)
        install_call(self.module, self)

    def remove(self) -> None:
        self.module.__dict__.pop(WATCH, None)
        if compiled_call(self.module) is self:
            install_call(self.module, self.before)

    @runs_uncompiled
    def __getstate__(self) -> dict[str, Any]:
        self._before_copy(self.module)
        kept = {"module": self.module, "_run": self._run, "_before_copy": self._before_copy}
        return {**kept, "before": None}  # as torch drops it from copies

    @runs_uncompiled
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.install()

    @runs_uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Dynamo folds is_compiling() to True: what it inlines leaves no trace in a graph.
        if torch.compiler.is_compiling() or is_jit_tracing():
            return plain_call(self.module, *args, **kwargs)
        if torch.is_grad_enabled() and _another_compiles():
            return _uncompiled(self._run, self, *args, **kwargs)
        return self._run(self, *args, **kwargs)

    @runs_uncompiled
    def plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None and not torch.is_grad_enabled():
            return self.before(*args, **kwargs)
        return plain_call(self.module, *args, **kwargs)


@runs_uncompiled
def _another_compiles() -> bool:
    """Whether the frames that are called from here would be compiled by a backend that knows nothing of subnets."""
    at_work = backend_at_work()
    return at_work is not None and at_work not in registry.BACKENDS


@torch.compiler.disable
def _uncompiled(run: Callable[..., Any], watch: Watch, *args: Any, **kwargs: Any) -> Any:
    """What is in the graph of another's torch.compile learns nothing: a part that it would make one of runs in eager
    mode, through its subnets."""
    return run(watch, *args, **kwargs)


@runs_uncompiled
def refuse_shallow(module: nn.Module) -> None:
    """Raises TransformError where what was installed in ``module`` runs for another that has its __dict__, and not all
    that is within (as accelerate's compile_regions makes one)."""
    called = called_module()
    if called is None or called is module or not _same_installed(called.__dict__, module.__dict__):
        return
    if _same_within(called, module):
        return
    raise TransformError(
        f"{type(module).__name__}: this is a shallow copy of a transformed model or of a part of one (copy.copy, a "
        "clone of its __dict__), and would run the weights of the original. Take copy.deepcopy(model); to run it with "
        "other weights, torch.func.functional_call(model, weights, args)"
    )


def _same_installed(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return any(name in other and one.get(name) is other[name] for name in (CALL, WATCH))


def _same_within(one: nn.Module, other: nn.Module) -> bool:
    """Whether they hold the same parameters, in modules of the same classes, whatever else has compiled these."""
    kinds = ([type(m) for m in each.modules() if not isinstance(m, OptimizedModule)] for each in (one, other))
    return list(map(id, one.parameters())) == list(map(id, other.parameters())) and next(kinds) == next(kinds)


@runs_uncompiled
def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What stands in the place of a transformed model's own _call_impl: see _compat.be_called_while_traced."""
    if not torch.compiler.is_compiling():
        refuse_shallow(module)
    return plain_call(module, *args, **kwargs)


class Watches:
    """The watches of one model. They are looked at before every use, so what is asked of all is asked in few calls."""

    def __init__(self) -> None:
        self._by_module: dict[nn.Module, Watch] = {}

    def add(self, watches: Iterable[Watch]) -> None:
        self._by_module.update((each.module, each) for each in watches)
        self.__dict__.pop("_lists", None)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._by_module

    @cached_property
    def _lists(self) -> tuple[list[dict[str, Any]], list[Watch]]:
        """The __dict__ of every module, and its Watch."""
        return [module.__dict__ for module in self._by_module], list(self._by_module.values())

    def install(self) -> None:
        """Where Module.compile() has put its own call since: that serves while gradients are off."""
        places, watches = self._lists
        for number in other_calls(places, watches):
            watches[number].before = compiled_call(watches[number].module)
            watches[number].install()

    def remove(self) -> None:
        for each in self._by_module.values():
            each.remove()

    @contextmanager
    def plain_forward(self) -> Iterator[None]:
        """While a transformed model runs with gradients off: its weights have been looked at, and nothing in it learns,
        so its modules are called as they were before."""
        self.install()
        places, watches = self._lists
        try:
            exchange_calls(places, map(_before, watches))
            yield
        finally:
            exchange_calls(places, watches)

    def __getstate__(self) -> dict[str, Any]:
        return {"_by_module": self._by_module}


_before = attrgetter("before")
