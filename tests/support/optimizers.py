"""Optimizers around optimizers, as people paste them from papers' repositories; none shares code with losia_fx."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Passing(Optimizer):
    """Hands every step on to the optimizer within; an Optimizer itself, so it has hooks of its own."""

    def __init__(self, inner: Optimizer, attribute: str = "base") -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups, self.state = inner.param_groups, inner.state
        self.attribute = attribute
        setattr(self, attribute, inner)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return getattr(self, self.attribute).step(closure)


class Twice(Passing):
    """Two steps of the optimizer within are one of its own."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        super().step(closure)
        return super().step(closure)


class Chained(Optimizer):
    """Several optimizers, each with parameters of its own, as one."""

    def __init__(self, *inner: Optimizer) -> None:
        super().__init__([group for each in inner for group in each.param_groups], {"lr": 0.0})
        self.inner = list(inner)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.inner:
            each.step()
        return loss


class ClassicLookahead(Optimizer):
    """Of the first repositories: without super().__init__(), so its step has no hooks; writes through .data."""

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        self.param_groups = optimizer.param_groups
        self.state: Any = defaultdict(dict)
        self.fast_state = optimizer.state
        for group in self.param_groups:
            group["counter"] = 0

    def update(self, group: dict[str, Any]) -> None:
        for fast in group["params"]:
            state = self.state[fast]
            if "slow_param" not in state:
                state["slow_param"] = torch.zeros_like(fast.data)
                state["slow_param"].copy_(fast.data)
            slow = state["slow_param"]
            slow += (fast.data - slow) * self.alpha
            fast.data.copy_(slow)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            if group["counter"] == 0:
                self.update(group)
            group["counter"] += 1
            if group["counter"] >= self.k:
                group["counter"] = 0
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class TimmLookahead(Optimizer):
    """As in timm: without super().__init__() too, but it writes under no_grad, and keeps its slow copies elsewhere."""

    def __init__(self, base: Optimizer, alpha: float = 0.5, k: int = 6) -> None:
        self._base_optimizer, self.defaults = base, dict(base.defaults)
        self.param_groups, self.state = base.param_groups, defaultdict(dict)
        for group in self.param_groups:
            group.update(lookahead_alpha=alpha, lookahead_k=k, lookahead_step=0)

    @torch.no_grad()
    def update_slow(self, group: dict[str, Any]) -> None:
        for fast in group["params"]:
            if fast.grad is None:
                continue
            state = self._base_optimizer.state[fast]
            if "lookahead_slow_buff" not in state:
                state["lookahead_slow_buff"] = fast.detach().clone()
            slow = state["lookahead_slow_buff"]
            slow.add_(fast - slow, alpha=group["lookahead_alpha"])
            fast.copy_(slow)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self._base_optimizer.step(closure)
        for group in self.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % group["lookahead_k"] == 0:
                self.update_slow(group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._base_optimizer.zero_grad(set_to_none)


class Sam(Optimizer):
    """Sharpness-aware minimization in two halves, as its best-known repository has it."""

    def __init__(self, params: Iterable[Tensor], base: Callable[..., Optimizer], rho: float = 0.05, **kwargs: Any):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norms = [p.grad.norm(p=2) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group in self.param_groups:
            scale = group["rho"] / (torch.stack(norms).norm(p=2) + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Clipping(Passing):
    """Clips the norm of its gradients in its step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(held, 0.05)
        return super().step(closure)


class Failing(Optimizer):
    """Plain descent that raises in the midst of a step when told to."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.fails: BaseException | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for number, p in enumerate(group["params"]):
                if self.fails is not None and number == 1:
                    raise self.fails
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
