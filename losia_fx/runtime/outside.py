"""Use outside of a graph: what is done with a weight where no rewritten graph holds it trains its subnet all the same.

Graph breaks, parts of a model called by themselves, a loss that takes a weight by hand, a torch.autograd.Function that
saves one: of each use of a weight W with a subnet S, the gradient must reach S, and G while the subnet is profiled. One
mechanism sees to it, in this order:

1. A module that holds such a weight runs ``call_owner`` when it is called (watch.py puts that in the place of its own
   call). That it runs at all means that no graph of ours holds the call. S and W are made to agree, unless the model's
   own forward has looked already.
2. Within that call a TorchFunctionMode (``_EagerSubnets``) sends every F.linear to ``eager_linear``, which is the op of
   the graphs, and any other use of a weight through ``eager_weight``, a W whose gradient, of whatever is done with it,
   goes to S. ``compiled_region`` pauses the mode: a compiled graph sees to its weights itself.
3. What no function mode sees (C++ calls, a weight used by the module around its own: ``call_around``) is left to
   autograd: while a forward runs, the frozen weights require grad (``asking_for_gradients``), and a hook takes the
   subnet's part of a gradient of all of W that a backward makes, before it is thrown away.

Nothing is counted twice: the ops of 2 give W no gradient, so what 3 takes is of uses that 2 has not seen.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import unserializable_hook

from losia_fx import registry
from losia_fx._compat import has_gradient_hooks, runs_uncompiled
from losia_fx.errors import GradientError
from losia_fx.ops.first_order import refuse_second
from losia_fx.ops.linear import subnet_linear, subnet_weight
from losia_fx.ops.localization import tap

from .look import follow_before_copy, look_at, train_state_of
from .state import SubnetState, own_states, resolve, states_of
from .watch import Watch, refuse_shallow

# -- calls of modules -------------------------------------------------------------------------------------------------


def watch(owners: Iterable[nn.Module], around: Iterable[nn.Module]) -> list[Watch]:
    """Has modules see to their weights also where no graph does.

    owners: modules that hold a weight with a subnet; what they do with it goes through the subnet. around: the modules
    right around them, which may use their weights without calling them; there the weights ask for their gradient.
    """
    by_call = ((call_owner, owners), (call_around, around))
    return [Watch(module, call, follow_before_copy) for call, modules in by_call for module in modules]


class _Entered(threading.local):
    def __init__(self) -> None:
        self.modes = 0
        """Modules under way that have entered the mode."""
        self.calls = 0
        """Forwards of transformed models under way, with gradients on."""
        self.paused = False
        """A compiled graph is running: it sees to its weights itself."""
        self.looked: frozenset[SubnetState] = frozenset()
        """Of the modules under way that are called by themselves: whose S and W have been made to agree."""


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
    return _after_a_look(_call_owner, watch, args, kwargs)


@runs_uncompiled
def call_around(watch: Watch, *args: Any, **kwargs: Any) -> Any:
    """Calls a module right around those, which may use their weights without calling them."""
    return _after_a_look(_call_around, watch, args, kwargs)


@runs_uncompiled
def _after_a_look(call: Callable[..., Any], watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """At all weights within, however the module uses them (nn.MultiheadAttention takes its out_proj's, the fast path of
    nn.TransformerEncoderLayer that of its child's child): unless a module around it, or the whole model, has done so.
    """
    before = _entered.looked
    if not _entered.calls:
        refuse_shallow(watch.module)
        fresh = [state for state in states_of(watch.module) if state not in before]
        for state in fresh:
            look_at(state)
        _entered.looked = before.union(fresh)
    try:
        return call(watch, args, kwargs)
    finally:
        _entered.looked = before


@runs_uncompiled
def _call_owner(watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        if _entered.calls:
            registry.RAN_WITHOUT_GRAD.update(own_states(watch.module).values())
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
def _call_around(watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        return watch.plain(*args, **kwargs)
    inside = [state for child in watch.module.children() for state in own_states(child).values()]
    asked: list[nn.Parameter] = []
    try:
        ask_for_gradients(inside, asked)
        return watch.plain(*args, **kwargs)
    finally:
        stop_asking(asked)


# -- uses of weights within such a call -------------------------------------------------------------------------------


def eager_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, through the subnet of ``weight`` where it has one. For everything that no graph of ours covers."""
    state = resolve(weight) if torch.is_grad_enabled() else None
    if state is None:
        return F.linear(input, weight, bias)
    registry.RAN_OUTSIDE.add(state)
    ticket = tap(input.detach(), state.handle, 0)
    result: Tensor = subnet_linear(
        input, weight, state.values_in_use, state.rows, state.picked_cols, bias, ticket, state.handle, 0
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
    return whole_of(state)


def whole_of(state: SubnetState) -> Tensor:
    """W as a differentiable tensor, (out, in) or (E, out, in), whose gradient goes to S, and to G while profiled."""
    weight, values = state.owner._parameters[state.parameter], state.values_in_use
    whole: Tensor = subnet_weight(weight, values, state.rows, state.picked_cols, state.handle, 0)
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


# -- weights that ask for their gradient -----------------------------------------------------------------------------


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


def asking_where_learning(states: Sequence[SubnetState]) -> AbstractContextManager[None]:
    """``asking_for_gradients`` where gradients are on."""
    return asking_for_gradients(states) if torch.is_grad_enabled() else nullcontext()


def ask_for_gradients(states: Iterable[SubnetState], asked: list[nn.Parameter]) -> None:
    """Has the weights of ``states`` require grad; those that did not go into ``asked`` first, whatever cuts in."""
    for state in states:
        weight = _whole_now(state)
        if weight is None:
            continue
        by_itself = weight.requires_grad and weight not in registry.ASKING
        if not weight.requires_grad:
            asked.append(weight)
            registry.ASKING[weight] = None
            weight.requires_grad_(True)
        kind, hook = registry.GRADIENT_HOOKS.get(weight, (None, None))
        if kind == by_itself:
            continue
        if hook is not None:  # it has been frozen since, or set free
            hook.remove()
        made = (
            weight.register_post_accumulate_grad_hook(_cut_down)
            if by_itself
            # A copy asks for itself: that this hook is not pickled is nothing to warn of.
            else weight.register_hook(unserializable_hook(functools.partial(_take_gradient, weakref.ref(weight))))
        )
        registry.GRADIENT_HOOKS[weight] = by_itself, made


def _whole_now(state: SubnetState) -> nn.Parameter | None:
    """W as whatever uses it finds it; None while FSDP2 has it sharded, where nothing can use it."""
    if state.shards is None:
        return state.weight
    return state.owner._parameters[state.parameter] if state.shards.is_unsharded else None


def stop_asking(weights: Iterable[nn.Parameter]) -> None:
    for weight in weights:
        weight.requires_grad_(False)
        registry.ASKING.pop(weight, None)


def _take_gradient(weight: weakref.ref[Tensor], grad: Tensor | None) -> None:
    """Runs when a backward has made a gradient of all of a frozen weight, which autograd then throws away."""
    refuse_second()
    found = weight()
    state = None if found is None else resolve(found)
    if state is None or grad is None:
        return
    registry.RAN_OUTSIDE.add(state)
    _refuse_ranks(state)
    values = state.values_in_use
    if values.requires_grad and has_gradient_hooks(values):
        _give_by_autograd(state, values, grad)
    else:
        state.take_gradient(grad)


def _give_by_autograd(state: SubnetState, values: nn.Parameter, grad: Tensor) -> None:
    """As SubnetState.take_gradient, where hooks on S are to see its part come in (an optimizer that steps within the
    backward): by a backward of its own."""
    if state.profiling:
        state.begin_use()
        state.accumulate(grad, None, owned=False)
    values.backward(state.block_of(grad.detach()).to(values.dtype))


def _refuse_ranks(state: SubnetState) -> None:
    """DistributedDataParallel averages what comes to S by autograd, and would never hear of this."""
    train = train_state_of(state)
    if train is not None and train.ranks.several:
        raise GradientError(
            f"{state.name}: is used where only autograd sees it (a torch.autograd.Function that no graph holds), and "
            "the processes of DistributedDataParallel cannot average that gradient. Let torch.compile trace it (no "
            "torch.compiler.disable and no graph break there), or name the weight in exclude"
        )


def _cut_down(weight: Tensor) -> None:
    """As _take_gradient, for a weight that requires grad throughout (backend="losia"): there nothing throws it away."""
    grad, weight.grad = weight.grad, None
    _take_gradient(weakref.ref(weight), grad)
