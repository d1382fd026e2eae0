"""Puts a subnet onto the module that owns a weight, and keeps it right: checkpoints, .to(), and runs outside the graph.

All hooks are module-level functions: a closure would keep the model from being pickled.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from losia_fx._compat import (
    compiled_call,
    exchange_calls,
    install_call,
    is_jit_tracing,
    plain_call,
    runs_uncompiled,
)
from losia_fx.errors import StateError, listed
from losia_fx.ops.first_order import refuse_second
from losia_fx.ops.linear import subnet_linear, subnet_weight
from losia_fx.ops.localization import tap
from losia_fx.runtime import registry, steps

from .registry import resolve
from .state import ATTRIBUTE, SubnetState

if TYPE_CHECKING:
    from .controller import Controller


def attach(state: SubnetState, rows: Tensor, cols: Tensor) -> None:
    """Registers S, rows and cols on the owner, and what keeps them out of checkpoints and in step with W."""
    owner = state.owner
    if ATTRIBUTE not in owner.__dict__:
        # Shadows the method on this object alone; recursion of .to() through parents finds it there.
        owner._apply = functools.partial(_apply_keeping_subnets, owner)  # type: ignore[method-assign]
    state.register(rows, cols)
    registrations: tuple[tuple[Callable[..., RemovableHandle], Callable[..., None]], ...] = (
        (owner.register_state_dict_pre_hook, _before_state_dict),
        (owner.register_state_dict_post_hook, _hide_subnets),
        (owner.register_load_state_dict_post_hook, _after_load),
    )
    for register, hook in registrations:
        state.hooks.append(register(hook))


def watch(owners: Iterable[nn.Module], around: Iterable[nn.Module]) -> list[Watch]:
    """Has modules see to their weights also where no graph does.

    owners: modules that hold a weight with a subnet; what they do with it goes through the subnet. around: the modules
    right around them, which may use their weights without calling them; there the weights ask for their gradient.
    """
    return [Watch(module, call_owner) for module in owners] + [Watch(module, call_around) for module in around]


WATCH = "_losia_watch"
"""Attribute of a watched module: its Watch, which so goes with copies of it, where torch drops a compiled call."""


class Watch:
    """What calling a module runs instead of the module's own call, in the place where Module.compile() puts its own.

    Not hooks: a module with hooks is called the long way round, also where gradients are off, and Dynamo makes a graph
    for each. Without any, it goes from the call straight to the forward, and knows nothing of this.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module, self._run = module, run
        self.before = compiled_call(module)
        """The user's own Module.compile(), which serves while gradients are off, and comes back in the end."""
        self.install()

    def install(self) -> None:
        self.module.__dict__[WATCH] = self
        install_call(self.module, self)

    @property
    def installed(self) -> bool:
        return compiled_call(self.module) is self

    def remove(self) -> None:
        self.module.__dict__.pop(WATCH, None)
        if self.installed:
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


def detach(state: SubnetState) -> None:
    """Takes everything off again; W stays as trained."""
    weight = state.owner._parameters.get(state.parameter)
    if weight is not None and (hook := registry.CUT_DOWN.pop(weight, None)) is not None:
        hook.remove()
    state.unregister()
    if ATTRIBUTE not in state.owner.__dict__:
        state.owner.__dict__.pop("_apply", None)


def _states(module: nn.Module) -> dict[str, SubnetState]:
    states: dict[str, SubnetState] = module.__dict__.get(ATTRIBUTE, {})
    return states


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    for state in _states(module).values():
        if (controller := registry.follower(state)) is not None:
            controller.mend()
        look_at(state, values=True, shown=True)


def _hide_subnets(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for state in _states(module).values():
        state_dict.pop(prefix + state.values_name, None)


def _after_load(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    states = _states(module)
    hidden = {state.values_name for state in states.values()}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key.rpartition(".")[2] not in hidden]
    for state in states.values():
        state.reload()
        if state.agreement is not None:
            state.agreement.waiting.discard(state)
            state.agreement.remember([state], places=True)


def _apply_keeping_subnets(owner: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, but S is moved and never narrowed: .bfloat16() would round its small updates away.

    rows and cols keep what they say whatever becomes of the weights (to_empty()), and what a slot has gathered so far
    goes where its weight goes.
    """
    states = list(_states(owner).values())
    for state in states:
        look_at(state)  # afterwards both have moved, and nobody could tell which was newer
    kept = [tensor for state in states for tensor in (state.values, state.values.grad)]
    indices = [index for state in states for index in (state.rows, state.cols)]

    def guarded(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if any(tensor is index for index in indices):
            if tensor.is_meta and not moved.is_meta:
                raise StateError(
                    f"{listed([state.name for state in states])}: where the subnets lie was lost on the meta device: "
                    "call losia_fx.transform once the weights are on a real one"
                )
            return tensor.to(moved.device)
        if moved.dtype == tensor.dtype or not any(tensor is subnet for subnet in kept):
            return moved
        return tensor.to(moved.device, torch.promote_types(tensor.dtype, moved.dtype))

    applied: nn.Module = type(owner)._apply(owner, guarded, recurse)
    for state in states:
        if state.profile is not None:
            state.profile.to(state.weight.device)
        if state.agreement is not None:
            state.agreement.remember([state], places=True)
    return applied


def eager_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, through the subnet of ``weight`` where it has one. For everything that no graph of ours covers."""
    state = resolve(weight) if torch.is_grad_enabled() else None
    if state is None:
        return F.linear(input, weight, bias)
    registry.RAN_OUTSIDE.add(state)
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
    registry.RAN_OUTSIDE.add(state)
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
        self.modes = 0
        """Modules under way that have entered the mode."""
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
def call_owner(watch: Watch, *args: Any, **kwargs: Any) -> Any:
    """Calls a module whose weights have subnets. Running at all means: no graph of ours holds this call."""
    module = watch.module
    if not _entered.calls:
        for state in _states(module).values():
            look_at(state)
    if not torch.is_grad_enabled():
        if _entered.calls:
            registry.RAN_BLIND.update(_states(module).values())
        return watch.plain(*args, **kwargs)
    if _entered.modes:  # a module around this one has seen to it
        return watch.plain(*args, **kwargs)
    _entered.modes += 1
    try:
        with _EagerSubnets():
            return watch.plain(*args, **kwargs)
    finally:
        _entered.modes -= 1


@runs_uncompiled
def call_around(watch: Watch, *args: Any, **kwargs: Any) -> Any:
    """Calls a module right around those, which may use their weights without calling them."""
    if not torch.is_grad_enabled():
        return watch.plain(*args, **kwargs)
    inside = [state for child in watch.module.children() for state in _states(child).values()]
    asked: list[nn.Parameter] = []
    try:
        ask_for_gradients(inside, asked)
        return watch.plain(*args, **kwargs)
    finally:
        stop_asking(asked)


PART_LOOKS = 3
"""Uses of a weight, outside of forwards of the whole model, that compare values whatever the versions say."""


def look_at(state: SubnetState, values: bool = False, shown: bool = False) -> None:
    """Before a use of a weight that no forward of the whole model has looked at: S and W agree.

    values: whether to compare those in any case; shown: the weight is evaluated or saved.
    """
    alone = state.agreement is not None and not shown and not steps.others()
    controller = None if alone else registry.follower(state)
    if controller is None:
        _look_at(state, None, values, shown)
        return
    with controller.lock:
        if not steps.elsewhere(controller):
            _look_at(state, controller, values, shown)


def _look_at(state: SubnetState, controller: Controller | None, values: bool, shown: bool) -> None:
    agreement = state.agreement if controller is None else controller.agreement
    swapped = not isinstance(state.owner._parameters.get(state.parameter), nn.Parameter)
    if agreement is None or agreement.waiting or swapped:
        return  # a copy without a controller; a state whose weights are to come; torch.func.functional_call
    written = []
    if any(agreement.moved(state)):
        written += agreement.settle([state], agreement.averaged)
    if values or agreement.vigilant or state.part_looks < PART_LOOKS:
        state.part_looks += 1
        written += agreement.compare([state])
    if controller is not None:
        controller.note(written, learns=False, shown=shown)


# -- weights that ask for their gradient -----------------------------------------------------------------------------


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


@contextmanager
def asking_for_gradients(states: Iterable[SubnetState]) -> Iterator[None]:
    """The frozen weights of ``states`` require grad meanwhile.

    What is traced must see where gradients will flow: Dynamo leaves the backward of a torch.autograd.Function out where
    nothing that goes in requires grad. And whatever uses a weight where neither a graph nor ``eager_linear`` sees it
    makes a gradient of all of it, of which the subnet's part is taken.
    """
    asked: list[nn.Parameter] = []
    calls = _entered.calls
    try:
        _entered.calls = calls + 1
        ask_for_gradients(states, asked)
        yield
    finally:
        _entered.calls = calls  # first: nothing can cut in
        stop_asking(asked)


def ask_for_gradients(states: Iterable[SubnetState], asked: list[nn.Parameter]) -> None:
    """Has the weights of ``states`` require grad; those that did not go into ``asked`` first, whatever cuts in."""
    for state in states:
        weight = state.weight
        if not weight.requires_grad:
            asked.append(weight)
            weight.requires_grad_(True)
            if weight not in registry.CUT_DOWN:
                registry.CUT_DOWN[weight] = weight.register_hook(functools.partial(_take_gradient, weakref.ref(weight)))
        elif weight not in registry.CUT_DOWN:
            registry.CUT_DOWN[weight] = weight.register_post_accumulate_grad_hook(_cut_down)


def stop_asking(weights: Iterable[nn.Parameter]) -> None:
    for weight in weights:
        weight.requires_grad_(False)


def _take_gradient(weight: weakref.ref[Tensor], grad: Tensor | None) -> None:
    """Runs when a backward has made a gradient of all of a frozen weight, which autograd then throws away."""
    refuse_second()
    found = weight()
    state = None if found is None else resolve(found)
    if state is not None and grad is not None:
        registry.RAN_OUTSIDE.add(state)
        state.take_gradient(grad)


def _cut_down(weight: Tensor) -> None:
    """As _take_gradient, for a weight that requires grad throughout (backend="losia"): there nothing throws it away."""
    grad, weight.grad = weight.grad, None
    _take_gradient(weakref.ref(weight), grad)
