"""Puts a subnet onto the module that owns a weight, and keeps it right: checkpoints, .to(), and runs outside the graph.

All hooks are module-level functions: a closure would keep the model from being pickled.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ._compat import runs_uncompiled
from .ops import subnet_linear, subnet_weight
from .state import ATTRIBUTE, SubnetState, resolve
from .taps import tap

RAN_OUTSIDE: weakref.WeakSet[SubnetState] = weakref.WeakSet()
"""Subnets whose weight ran outside a rewritten graph since the controller last looked."""


def attach(state: SubnetState, rows: Tensor, cols: Tensor) -> None:
    """Registers S, rows and cols on the owner, and what keeps them out of checkpoints and in step with W."""
    owner = state.owner
    if ATTRIBUTE not in owner.__dict__:
        # Shadows the method on this object alone; recursion of .to() through parents finds it there.
        owner._apply = functools.partial(_apply_keeping_subnets, owner)  # type: ignore[method-assign]
    state.register(rows, cols)
    state.hooks += [
        owner.register_state_dict_post_hook(_hide_subnets),
        owner.register_load_state_dict_post_hook(_after_load),
    ]


def watch(modules: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Has ``modules`` run their weights through the subnets also where no graph does."""
    hooks: list[RemovableHandle] = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(_before_forward))
        hooks.append(module.register_forward_hook(_after_forward, always_call=True))
    return hooks


def detach(state: SubnetState) -> None:
    """Takes everything off again; W stays as trained."""
    state.unregister()
    RAN_OUTSIDE.discard(state)
    if ATTRIBUTE not in state.owner.__dict__:
        del state.owner.__dict__["_apply"]


def _states(module: nn.Module) -> dict[str, SubnetState]:
    states: dict[str, SubnetState] = module.__dict__.get(ATTRIBUTE, {})
    return states


def _hide_subnets(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for state in _states(module).values():
        state_dict.pop(prefix + state.values_name, None)


def _after_load(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    states = _states(module)
    hidden = {state.values_name for state in states.values()}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key.rpartition(".")[2] not in hidden]
    for state in states.values():
        state.reload()


def _apply_keeping_subnets(owner: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, but S is moved and never narrowed: .bfloat16() would round its small updates away."""
    kept = [tensor for state in _states(owner).values() for tensor in (state.values, state.values.grad)]

    def guarded(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype == tensor.dtype or not any(tensor is subnet for subnet in kept):
            return moved
        return tensor.to(moved.device, torch.promote_types(tensor.dtype, moved.dtype))

    applied: nn.Module = type(owner)._apply(owner, guarded, recurse)
    return applied


def eager_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, through the subnet of ``weight`` where it has one. For everything that no graph of ours covers."""
    state = resolve(weight) if torch.is_grad_enabled() else None
    if state is None:
        return F.linear(input, weight, bias)
    RAN_OUTSIDE.add(state)
    ticket = tap(input.detach(), state.handle, 0)
    result: Tensor = subnet_linear(
        input, weight, state.values, state.rows, state.picked_cols, bias, ticket, state.handle, 0
    )
    return result


def eager_weight(value: Any) -> Any:
    """``value``; a weight that has a subnet in a form whose gradient, of whatever is done with it, goes there."""
    if not isinstance(value, nn.Parameter) or not torch.is_grad_enabled():
        return value
    state = resolve(value)
    if state is None:
        return value
    RAN_OUTSIDE.add(state)
    return _whole(state)


def _whole(state: SubnetState) -> Tensor:
    whole: Tensor = subnet_weight(state.weight, state.values, state.rows, state.picked_cols, state.handle, 0)
    return whole


class _EagerSubnets(TorchFunctionMode):
    """Sends every F.linear to ``eager_linear``, and every other use of a weight through ``eager_weight``."""

    @runs_uncompiled
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling() or _entered.paused:
            return func(*args, **(kwargs or {}))
        return _run_outside(func, args, kwargs or {})


@torch.compiler.disable
def _run_outside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is F.linear:
        named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        return eager_linear(eager_weight(named["input"]), named["weight"], eager_weight(named.get("bias")))
    if _asks_about_itself(func):
        return func(*args, **kwargs)
    return func(*(_replaced(value) for value in args), **{key: _replaced(value) for key, value in kwargs.items()})


_TRANSPOSES = frozenset(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH"))


def _asks_about_itself(func: Any) -> bool:
    """Whether a function is about the very tensor it is given (its data, its copy, a write to it), not its value."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        return func not in _TRANSPOSES
    return name in _OF_THE_TENSOR or name.startswith("is_") or (name.endswith("_") and not name.endswith("__"))


_OF_THE_TENSOR = frozenset(
    "__set__ __setitem__ __deepcopy__ __reduce_ex__ __hash__ __repr__ __format__ __len__ detach dim ndimension size "
    "numel nelement element_size stride storage_offset data_ptr untyped_storage get_device".split()
)


def _replaced(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and any(isinstance(entry, nn.Parameter) for entry in value):
        return type(value)(eager_weight(entry) for entry in value)
    return eager_weight(value)


class _Entered(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, _EagerSubnets]] = []
        self.paused = False
        """A compiled graph is running: it sees to its weights itself."""


_entered = _Entered()


@contextmanager
def compiled_region() -> Iterator[None]:
    """While a compiled graph runs, what it calls is not taken for a use outside of one."""
    before, _entered.paused = _entered.paused, True
    try:
        yield
    finally:
        _entered.paused = before


@runs_uncompiled
def _before_forward(module: nn.Module, args: Any) -> None:
    # Dynamo folds is_compiling() to True: the hooks leave no trace in a graph. Running at all means: no graph does.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if _entered.stack:  # a module around this one has seen to it
        return
    mode = _EagerSubnets()
    mode.__enter__()  # type: ignore[no-untyped-call]
    _entered.stack.append((module, mode))


@runs_uncompiled
def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if _entered.stack and _entered.stack[-1][0] is module:
        _entered.stack.pop()[1].__exit__(None, None, None)  # type: ignore[no-untyped-call]
