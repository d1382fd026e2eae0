"""The floors: forward, and the gradients of activations that any method needs which trains inside every layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .methods import Method, Trial, compiled_in_place
from .sizes import Setup

_library = torch.library.Library("losia_bench", "DEF")
_library.define("drain(Tensor grad) -> Tensor")


def _drain(grad: Tensor) -> Tensor:
    return grad.new_zeros(())


_library.impl("drain", _drain, "CompositeExplicitAutograd")


@torch.library.register_fake("losia_bench::drain", lib=_library)
def _drain_fake(grad: Tensor) -> Tensor:
    return grad.new_empty(())


class _Spring(torch.autograd.Function):
    """y itself, with a gradient that is made in full, goes into an op that no compiler looks into, and ends there."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, torch.ops.losia_bench.drain(grads[0])


def _let_spring(module: Any, _: Any, y: Tensor) -> Tensor:
    sprung: Tensor = _Spring.apply(y, module.source)  # type: ignore[no-untyped-call]
    return sprung


def _end_at(modules: Iterable[nn.Module]) -> None:
    """Has gradients be made down to the outputs of ``modules``, and no further."""
    for module in modules:
        module.source = nn.Parameter(next(module.parameters()).new_zeros(()))
        module.register_forward_hook(_let_spring)


def checkpointed(model: Any) -> Any:
    """``model`` with gradient checkpointing on, without the hook that asks for the embedding's gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the name that transformers 5.23 does not have yet
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    return model


def _first_linears(model: Any) -> tuple[nn.Module, ...]:
    """All that a frozen embedding needs the gradients of."""
    attention = model.model.layers[0].self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def _build(setup: Setup, mode: str) -> Trial:
    model = setup.model()
    _end_at(_first_linears(model))
    return Trial(compiled_in_place(model, mode), setup.batch, None)


def _build_plain(setup: Setup, mode: str) -> Trial:
    model = setup.model()
    _end_at([model.model.embed_tokens])
    return Trial(compiled_in_place(model, mode), setup.batch, None)


def _build_checkpointed(setup: Setup, mode: str) -> Trial:
    model = checkpointed(setup.model())
    _end_at(_first_linears(model))
    return Trial(compiled_in_place(model, mode), setup.batch, None)


FLOORS = (
    Method("floor", _build, note="frozen; gradients down to the outputs of layer 0's q, k and v, and no further"),
    Method("floor, plain", _build_plain, note="frozen; gradients down to the embedding's output"),
    Method("floor, checkpointed", _build_checkpointed, floor="floor, checkpointed", note="as floor"),
)
