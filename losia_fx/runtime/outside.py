"""Use outside of a graph: what is done with a weight where no rewritten graph holds it trains its subnet all the same.

Graph breaks, parts of a model called by themselves, a loss that takes a weight by hand, a torch.autograd.Function that
saves one: of each use of a weight W with a subnet S, the gradient must reach S, and G while the subnet is profiled. One
mechanism sees to it, in this order:

1. A module that holds such a weight runs module_calls.py's ``call_owner`` when it is called (watch.py puts that in the
   place of its own call). That it runs at all means that no graph of ours holds the call. S and W are made to agree,
   unless the model's own forward has looked already.
2. Within that call a TorchFunctionMode (``EagerSubnets``) sends every F.linear to ``eager_linear``, which is the op of
   the graphs, and any other use of a weight through ``eager_weight``, a W whose gradient, of whatever is done with it,
   goes to S. ``compiled_region`` pauses the mode: a compiled graph sees to its weights itself.
3. What no function mode sees (C++ calls, a weight used by the module around its own: ``call_around``) is left to
   autograd: while a forward runs, the frozen weights require grad (``asking_for_gradients``), and a hook takes the
   subnet's part of a gradient of all of W that a backward makes, before it is thrown away.

Nothing is counted twice: the ops of 2 give W no gradient, so what 3 takes is of uses that 2 has not seen.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import unserializable_hook

from losia_fx import registry
from losia_fx._compat import has_gradient_hooks, runs_uncompiled
from losia_fx.errors import GradientError, StateError
from losia_fx.ops.first_order import refuse_second
from losia_fx.ops.linear import subnet_linear, subnet_weight
from losia_fx.ops.localization import tap

from .entered import ENTERED
from .look import look, train_state_of
from .state import SubnetState, resolve
from .train_state import TrainState

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


def whole_weight(train: TrainState, state: SubnetState) -> Tensor:
    """``whole_of``, after a look at the model. Raises StateError for a sharded one: no process has the whole."""
    look(train, torch.is_grad_enabled())
    if state.shards is not None:
        raise StateError(
            f"{state.name}: no process has the whole weight, as fully_shard has cut it over them: use it inside the "
            "model's forward, where its module has it, or spread the model with DistributedDataParallel"
        )
    state.ran = True
    return whole_of(state)


class EagerSubnets(TorchFunctionMode):
    """Sends every F.linear to ``eager_linear``, and every other use of a weight through ``eager_weight``."""

    @runs_uncompiled
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling() or ENTERED.paused:
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
    calls = ENTERED.calls
    try:
        ENTERED.calls = calls + 1
        ask_for_gradients(states, asked)
        yield
    finally:
        ENTERED.calls = calls  # first: nothing can cut in
        stop_asking(asked)


def asking_where_learning(states: Sequence[SubnetState]) -> AbstractContextManager[None]:
    """``asking_for_gradients`` where gradients are on."""
    return asking_for_gradients(states) if torch.is_grad_enabled() else nullcontext()


def ask_for_gradients(states: Iterable[SubnetState], asked: list[nn.Parameter]) -> None:
    """Has the weights of ``states`` whose subnets learn require grad; those that did not go into ``asked`` first,
    whatever cuts in."""
    for state in states:
        weight = _whole_now(state)
        if weight is None:
            continue
        by_itself = weight.requires_grad and weight not in registry.ASKING
        kind, hook = registry.GRADIENT_HOOKS.get(weight, (None, None))
        learns = state.values.requires_grad
        if by_itself != learns and (by_itself or kind):
            registry.AT_ODDS.add(state)
        if not (by_itself or learns):
            continue
        if not weight.requires_grad:
            asked.append(weight)
            registry.ASKING[weight] = None
            weight.requires_grad_(True)
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
