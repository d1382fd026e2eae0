"""What calling a module runs: torch's own call, and what is installed in its place."""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from itertools import repeat
from operator import is_
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import trace_rules
from torch._dynamo.eval_frame import skip_code


def plain_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What calling ``module`` does when nothing is compiled: hooks and forward."""
    return type(module)._call_impl(module, *args, **kwargs)


Function = TypeVar("Function", bound=Callable[..., Any])


def runs_uncompiled(function: Function) -> Function:
    """``function``, which Dynamo may inline but never compiles as a frame of its own.

    Where Dynamo gives up on a frame it goes on with the functions called from there; compiled, ours would take its
    "is a compiler at work" branch in eager runs too. torch.compiler.disable would break the graphs that inline it.
    """
    skip_code(function.__code__)
    return function


ISOLATES_RECOMPILES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""torch.compile can count the graphs of one call apart from those of others: 2.13 and newer."""


@runs_uncompiled
def compile_call(module: nn.Module, backend: Callable[..., Any], recompile_limit: int) -> Callable[..., Any]:
    """``plain_call`` of the module, compiled.

    The limit is raised and held apart from that of other modules: the code that is compiled here, the class's forward,
    is the same for all its modules, and so would be its limit of 8 graphs.
    """
    forward = module.forward
    if not ISOLATES_RECOMPILES or (isinstance(forward, MethodType) and trace_rules.check(forward)):
        return compile_own_code(module, backend, recompile_limit)
    apart: dict[str, Any] = {"isolate_recompiles": True}  # not in the overloads
    call = MethodType(type(module)._call_impl, module)
    return _limited(torch.compile(call, backend=backend, **apart), recompile_limit)


@runs_uncompiled
def compile_forward(
    module: nn.Module,
    backend: Callable[..., Any],
    recompile_limit: int,
    around: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Puts the module's forward, compiled and within ``around()``, in the place of its own: hooks stay outside, and
    modules that are alike share their graphs."""
    limits: dict[str, Any] = {"recompile_limit": recompile_limit} if ISOLATES_RECOMPILES else {}
    compiled = torch.compile(module.forward, backend=backend, **limits)

    @torch.compiler.disable(recursive=False)
    @wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with around():
            return compiled(*args, **kwargs)

    module.forward = forward


@runs_uncompiled
def compile_own_code(module: nn.Module, backend: Callable[..., Any], recompile_limit: int) -> Callable[..., Any]:
    """compile_call of a module whose forward is torch's own (nn.Sequential), and of all with torch 2.11 and 2.12: newer
    ones isolate and take the limit.

    Dynamo passes over torch's own frames, Module._call_impl among them, and compiles those that they call, each by
    itself: it needs a frame of ours to begin with. It counts graphs by code object, so every module gets one of its
    own. (Frames that a graph break leaves share their count with other modules.)
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self)._call_impl(self, *args, **kwargs)

    return _limited(torch.compile(MethodType(own_code(call), module), backend=backend), recompile_limit)


def _limited(compiled: Callable[..., Any], recompile_limit: int) -> Callable[..., Any]:
    """``compiled`` with a limit for each module alone, not for all of a class in a process together, which Dynamo holds
    to 256 graphs: a search over a hundred models of one class would end uncompiled. And with a look at the modules'
    hooks before a graph is used, which Dynamo leaves out: one that came later would not run."""
    settings: dict[str, Any] = {
        "recompile_limit": recompile_limit,
        "accumulated_recompile_limit": sys.maxsize,
        "skip_nnmodule_hook_guards": False,
    }
    known = {name: value for name, value in settings.items() if hasattr(torch._dynamo.config, name)}

    @runs_uncompiled
    def limited(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(known):
            return compiled(*args, **kwargs)

    return limited


@runs_uncompiled
def called_module() -> Any:
    """Whose call is running what was installed: not the module that it was installed in where somebody has copied that
    one's __dict__. None where no module was called."""
    frame = inspect.currentframe()
    for _ in range(_DEEPEST):
        frame = frame and frame.f_back
        if frame is not None and frame.f_code is nn.Module._wrapped_call_impl.__code__:
            return frame.f_locals["self"]
    return None


_DEEPEST = 6
"""Frames between a module's call and whoever asks: ours, and those of torch.compiler.disable."""

_CALL = "_compiled_call_impl"


@runs_uncompiled
def install_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Makes ``module(...)`` run ``call``, as Module.compile does: same object, not in copies. None undoes it."""
    if call is None:
        module.__dict__.pop(_CALL, None)
    else:
        module.__dict__[_CALL] = call


_IMPL = "_call_impl"


def be_called_while_traced(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Has Dynamo, where another's graph calls ``module``, look at what was installed: of a module whose _call_impl is
    the class's it takes the forward at once. call: what is to stand there, called with the module first; None undoes
    it."""
    if call is None:
        module.__dict__.pop(_IMPL, None)
    else:
        module.__dict__[_IMPL] = partial(call, module)


def exchange_calls(places: Iterable[dict[str, Any]], calls: Iterable[Callable[..., Any] | None]) -> None:
    """As ``install_call``, of many modules, given by their __dict__, whose calls will be exchanged again soon: None is
    left standing in the place, where Module's own None is."""
    deque(map(dict.__setitem__, places, repeat(_CALL), calls), maxlen=0)


def other_calls(places: Sequence[dict[str, Any]], calls: Sequence[Callable[..., Any]]) -> list[int]:
    """Which of many modules, given by their __dict__, run something else than what ``install_call`` gave them."""
    found = list(map(dict.get, places, repeat(_CALL)))
    if all(map(is_, found, calls)):
        return []
    return [number for number, (one, other) in enumerate(zip(found, calls, strict=True)) if one is not other]


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether something of the user's own runs before its steps, after the hooks of all optimizers."""
    return bool(optimizer._optimizer_step_pre_hooks)


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own, by which Dynamo tells frames and counts their graphs."""
    assert isinstance(function, FunctionType)
    code, defaults = function.__code__.replace(), function.__defaults__
    own = FunctionType(code, function.__globals__, function.__name__, defaults, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What runs instead of the module's own call: that of Module.compile(), or what ``install_call`` put there."""
    found: Callable[..., Any] | None = module._compiled_call_impl
    return found
