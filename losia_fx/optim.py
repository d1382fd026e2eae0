"""SubnetRMS: an optimizer whose second moment outlives re-selections, and which keeps no buffer of a subnet's size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losia_fx._compat import foreach
from losia_fx.api.views import controller
from losia_fx.errors import ConfigError, OptimizerError, StateError
from losia_fx.method.factored import Means, Place, root, take_in
from losia_fx.runtime.moves import KeepsOverMoves
from losia_fx.runtime.owners import owned
from losia_fx.runtime.sharding import seen_by
from losia_fx.runtime.shards import local
from losia_fx.runtime.state import SubnetState

MEANS = ("row_means", "col_means", "row_visits", "col_visits")
"""Of a subnet's state: losia_fx.method.factored.Means, by name."""


class SubnetRMS(Optimizer, KeepsOverMoves):
    """RMSprop for the subnets of a transformed model: p -= lr * g / (sqrt(v) + eps).

    Of a subnet, v of element (i, j) is r_i c_j / sqrt(mean r mean c): r and c are bias-corrected running means of the
    rows' and columns' squared gradient, kept for every row and column of W, so they know a row where the subnet comes
    back to it (losia_fx.method.factored). A parameter that trains in full has a v of its own size, corrected as Adam's.
    v takes the present gradient in before the update.

    model: transformed, or what wraps it; everything in it that learns is optimized: subnets, and what ``trainable``
        names. Make the optimizer after losia_fx.transform.
    lr: the learning rate; at least 0.
    beta2: decay of v, a visit at a time; in [0, 1).
    momentum: 0 updates by the gradient itself and keeps out + in numbers a weight, twice, and no more; above it, by the
        bias-corrected running mean of the gradient (Adam's first moment), of S's size, which starts anew where a
        subnet moves. In [0, 1).
    eps: added to the root of v; above 0.
    weight_decay: decoupled, p -= lr * weight_decay * p, of subnets only what they hold at the time; at least 0.

    State has the dtype of the parameter (S is float32 at least). state_dict and load_state_dict are an ordinary
    optimizer's and go on to the bit, beside losia_fx.state_dict.
    Raises ConfigError (a ValueError) naming an option with a wrong value, TypeError for a model that is no module, and
    TransformError for one without subnets.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        beta2: float = 0.99,
        momentum: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"SubnetRMS: model is a {type(model).__name__}: give the transformed model itself, not its parameters"
            )
        options = {"lr": lr, "beta2": beta2, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        for name, value in options.items():
            _check(name, value)
        followed = controller(model)
        weights = {id(state.weight) for state in followed.states}
        learning = [p for p in followed.root.parameters() if p.requires_grad and id(p) not in weights]
        if not learning:
            raise OptimizerError(f"SubnetRMS: nothing in {type(model).__name__} requires grad, so nothing would learn")
        super().__init__(learning, options)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient. closure: makes the gradients anew, returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        subnets = {id(state.values): state for states in owned(self).mine.values() for state in states}
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in learning):
                raise OptimizerError("SubnetRMS takes no sparse gradients: make the embedding with sparse=False")
            for mine in _alike([p for p in learning if id(p) in subnets]):
                roots = self._factored_roots(mine, [subnets[id(p)] for p in mine], group["beta2"])
                self._update(mine, roots, self._count(mine) if group["momentum"] else [], group)
            for full in _alike([p for p in learning if id(p) not in subnets]):
                steps = self._count(full)
                self._update(full, self._full_roots(full, steps, group["beta2"]), steps, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises StateError, with nothing loaded, for the state of another kind of optimizer."""
        lacking = {name for group in state_dict["param_groups"] for name in _ALLOWED if name not in group}
        if lacking:
            raise StateError(
                f"the state is of another optimizer than SubnetRMS: its groups have no {', '.join(sorted(lacking))}. "
                "Start SubnetRMS anew, or go on with the optimizer that the state is of"
            )
        super().load_state_dict(state_dict)

    def after_subnet_move(self, values: nn.Parameter) -> None:
        """Momentum starts anew; what is known of the rows and columns stays."""
        kept = self.state.get(values, {})
        for name in ("momentum", "step"):
            if name in kept:
                kept[name].zero_()

    # -- the roots of v, with the present gradient taken in --------------------------------------------------------

    def _factored_roots(self, parameters: list[Tensor], subnets: Sequence[SubnetState], beta2: float) -> list[Tensor]:
        kept = [self._means(parameter, subnet) for parameter, subnet in zip(parameters, subnets, strict=True)]
        places = [Place(subnet.rows, subnet.cols) for subnet in subnets]
        take_in(kept, places, seen_by(subnets, _grads(parameters)), beta2)
        each = zip(kept, places, subnets, strict=True)
        return [root(means, place, subnet.portion) for means, place, subnet in each]

    def _means(self, parameter: Tensor, subnet: SubnetState) -> Means:
        state = self.state[parameter]
        if MEANS[0] not in state:
            state.update(zip(MEANS, Means.of(subnet.shape, parameter), strict=True))
        found = Means(*(state[name] for name in MEANS))
        wanted = (subnet.shape[:-1], (*subnet.shape[:-2], subnet.shape[-1]))
        if (found.rows.shape, found.cols.shape) != wanted:
            raise StateError(
                f"{subnet.name}: the loaded state of SubnetRMS is of {tuple(found.rows.shape)} rows and "
                f"{tuple(found.cols.shape)} columns, and the weight has {wanted[0]} and {wanted[1]}: it is of another "
                "model, or its parameters came in another order"
            )
        return found

    def _full_roots(self, parameters: list[Tensor], steps: Sequence[float], beta2: float) -> list[Tensor]:
        squares, grads = self._buffers(parameters, "square"), _grads(parameters)
        foreach.foreach_mul_(squares, beta2)
        foreach.foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = list(foreach.foreach_sqrt(squares))
        foreach.foreach_div_(roots, [math.sqrt(1 - beta2**step) for step in steps])
        return roots

    # -- the update ------------------------------------------------------------------------------------------------

    def _update(
        self, parameters: list[Tensor], roots: list[Tensor], steps: Sequence[float], group: dict[str, Any]
    ) -> None:
        """steps: of each parameter since its momentum began, the present one included; not asked for without any."""
        lr = float(group["lr"])
        here = [local(parameter) for parameter in parameters]
        if group["weight_decay"]:
            foreach.foreach_mul_(here, 1 - lr * group["weight_decay"])
        directions, corrections = _grads(parameters), [1.0] * len(parameters)
        if group["momentum"]:
            directions, corrections = self._momenta(parameters, steps, group["momentum"])
        foreach.foreach_add_(roots, group["eps"])
        foreach.foreach_addcdiv_(here, directions, roots, [-lr / correction for correction in corrections])

    def _momenta(
        self, parameters: list[Tensor], steps: Sequence[float], momentum: float
    ) -> tuple[list[Tensor], list[float]]:
        """The running means of the gradients, and what each is to be divided by, as it started at zero."""
        means = self._buffers(parameters, "momentum")
        foreach.foreach_lerp_(means, _grads(parameters), 1 - momentum)
        return means, [1 - momentum**step for step in steps]

    def _count(self, parameters: Sequence[Tensor]) -> list[float]:
        """The steps of each since its state began, the present one included."""
        for parameter in parameters:
            self.state[parameter].setdefault("step", torch.zeros((), device="cpu")).add_(1)
        return [float(self.state[parameter]["step"]) for parameter in parameters]

    def _buffers(self, parameters: Sequence[Tensor], name: str) -> list[Tensor]:
        """As far as this process has them."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [local(self.state[parameter][name]) for parameter in parameters]


def _grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    """As far as this process has them."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _alike(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those that one call over a list serves at once: of one device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(found.values())


_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("of at least 0", lambda value: value >= 0),
    "beta2": ("in [0, 1)", lambda value: 0 <= value < 1),
    "momentum": ("in [0, 1)", lambda value: 0 <= value < 1),
    "eps": ("above 0", lambda value: value > 0),
    "weight_decay": ("of at least 0", lambda value: value >= 0),
}


def _check(name: str, value: Any) -> None:
    allowed, fits = _ALLOWED[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not fits(value):
        raise ConfigError(f"SubnetRMS: {name}={value!r}: give a number {allowed}")
