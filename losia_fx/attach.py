"""Puts a subnet onto the module that owns a weight, and keeps it right: checkpoints, .to(), and runs outside the graph.

All hooks are module-level functions: a closure would keep the model from being pickled.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ._compat import runs_uncompiled
from .ops import subnet_linear, subnet_weight
from .state import ATTRIBUTE, SubnetState, resolve
from .taps import tap

RAN_OUTSIDE: weakref.WeakSet[SubnetState] = weakref.WeakSet()
"""Subnets whose weight ran outside a rewritten graph since the controller last looked."""


RAN_BLIND: weakref.WeakSet[SubnetState] = weakref.WeakSet()
"""Subnets whose weight ran with gradients off in the midst of a forward that has them on."""


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


def watch(owners: Iterable[nn.Module], around: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Has modules see to their weights also where no graph does.

    owners: modules that hold a weight with a subnet; what they do with it goes through the subnet. around: the modules
    right around them, which may use their weights without calling them; there the weights ask for their gradient.
    """
    hooks: list[RemovableHandle] = []
    for module in owners:
        hooks.append(module.register_forward_pre_hook(_before_owner))
        hooks.append(module.register_forward_hook(_after_owner, always_call=True))
    for module in around:
        hooks.append(module.register_forward_pre_hook(_before_around))
        hooks.append(module.register_forward_hook(_after_around, always_call=True))
    return hooks


def detach(state: SubnetState) -> None:
    """Takes everything off again; W stays as trained."""
    if (hook := _CUT_DOWN.pop(state.weight, None)) is not None:
        hook.remove()
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
        self.asking: list[tuple[nn.Module, list[nn.Parameter]]] = []
        self.calls = 0
        """Forwards of transformed models under way, with gradients on."""
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
def _before_owner(module: nn.Module, args: Any) -> None:
    # Dynamo folds is_compiling() to True: the hooks leave no trace in a graph. Running at all means: no graph does.
    if torch.compiler.is_compiling():
        return
    if not torch.is_grad_enabled():
        if _entered.calls:
            RAN_BLIND.update(_states(module).values())
        return
    if _entered.stack:  # a module around this one has seen to it
        return
    mode = _EagerSubnets()
    mode.__enter__()  # type: ignore[no-untyped-call]
    _entered.stack.append((module, mode))


@runs_uncompiled
def _after_owner(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if _entered.stack and _entered.stack[-1][0] is module:
        _entered.stack.pop()[1].__exit__(None, None, None)  # type: ignore[no-untyped-call]


@runs_uncompiled
def _before_around(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    inside = [state for child in module.children() for state in _states(child).values()]
    _entered.asking.append((module, ask_for_gradients(inside)))


@runs_uncompiled
def _after_around(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if _entered.asking and _entered.asking[-1][0] is module:
        for weight in _entered.asking.pop()[1]:
            weight.requires_grad_(False)


# -- weights that ask for their gradient -----------------------------------------------------------------------------


_CUT_DOWN: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()
"""The hook of each weight that has asked for its gradient."""


@contextmanager
def asking_for_gradients(states: Iterable[SubnetState]) -> Iterator[None]:
    """The frozen weights of ``states`` require grad meanwhile.

    What is traced must see where gradients will flow: Dynamo leaves the backward of a torch.autograd.Function out where
    nothing that goes in requires grad. And whatever uses a weight where neither a graph nor ``eager_linear`` sees it
    makes a gradient of all of it, of which the subnet's part is taken.
    """
    asked = ask_for_gradients(states)
    _entered.calls += 1
    try:
        yield
    finally:
        _entered.calls -= 1
        for weight in asked:
            weight.requires_grad_(False)


def ask_for_gradients(states: Iterable[SubnetState]) -> list[nn.Parameter]:
    """Has the weights of ``states`` require grad; those that did not."""
    asked = []
    for state in states:
        weight = state.weight
        if not weight.requires_grad:
            weight.requires_grad_(True)
            asked.append(weight)
            if weight not in _CUT_DOWN:
                _CUT_DOWN[weight] = weight.register_hook(functools.partial(_take_gradient, weakref.ref(weight)))
        elif weight not in _CUT_DOWN:
            _CUT_DOWN[weight] = weight.register_post_accumulate_grad_hook(_cut_down)
    return asked


def _take_gradient(weight: weakref.ref[Tensor], grad: Tensor | None) -> None:
    """Runs when a backward has made a gradient of all of a frozen weight, which autograd then throws away."""
    found = weight()
    state = None if found is None else resolve(found)
    if state is not None and grad is not None:
        RAN_OUTSIDE.add(state)
        state.take_gradient(grad)


def _cut_down(weight: Tensor) -> None:
    """As _take_gradient, for a weight that requires grad throughout (backend="losia"): there nothing throws it away."""
    grad, weight.grad = weight.grad, None
    _take_gradient(weakref.ref(weight), grad)
