"""W in 8 bits, as the frozen products of its graphs take it.

With LosiaConfig.keep_dense W stays what it is, and this follows it; without, W is these numbers and nothing else
(quantised_weight.py), and nothing here is kept or followed.

What is packed is a function of W alone: a step makes the rows anew that its write-back has changed, with the scales
that they have then, so that nothing that grows is clipped and no state is to be saved. After any other write to W,
which a version or the looks of agreement.py tell of, all of it is made anew at the next use.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from losia_fx.config import LosiaConfig
from losia_fx.errors import StateError
from losia_fx.method.packing import MULTIPLES, pack
from losia_fx.model.kinds import is_sharded

from .quantised_weight import QuantisedWeight

_NOTHING: dict[str, Any] = {"_tensors": None, "_made_of": None, "_mark": (0, 0)}


def why_unpacked(shape: tuple[int, ...], whole_cols: bool, kind: str) -> str | None:
    """Why the products of a weight stay what the model's are; None where they do not."""
    if len(shape) != 2:
        return "experts"
    if whole_cols:
        return "output head"
    least = MULTIPLES[kind]
    return None if all(size % least == 0 for size in shape) else f"sizes that are no multiples of {least}"


class PackedWeight:
    """The numbers (out, in) and scales (out, 1) of a weight; see losia_fx.method.packing."""

    def __init__(self, kind: str, instead: bool = False) -> None:
        self.kind = kind
        self.instead = instead
        """W is to be a QuantisedWeight, which has both."""
        self.awaited: Tensor | None = None
        """Of a LoSiA state that was loaded before its weights: their scales, (out,)."""
        self._tensors: tuple[Tensor, Tensor] | None = None
        self._made_of: weakref.ref[nn.Parameter] | None = None
        self._mark = (0, 0)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: it makes its own."""
        return {"kind": self.kind, "instead": self.instead, "awaited": None, **_NOTHING}

    @classmethod
    def asked_for(cls, config: LosiaConfig, shape: tuple[int, ...], whole_cols: bool) -> PackedWeight | None:
        """None for a weight whose products stay the model's."""
        kind = config.frozen_products
        if kind is None or why_unpacked(shape, whole_cols, kind) is not None:
            return None
        return cls(kind, not config.keep_dense)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        assert self._tensors is not None
        return self._tensors

    def is_of(self, weight: nn.Parameter) -> bool:
        """Whether this is what ``weight`` is now, as far as its version and place tell."""
        return self._made_of is not None and self._made_of() is weight and self._mark == _mark(weight)

    @torch.no_grad()
    def of(self, weight: nn.Parameter, name: str) -> tuple[Tensor, Tensor]:
        """Numbers and scales of ``weight``, which an error calls ``name``."""
        if isinstance(weight, QuantisedWeight):
            weight.forget_source()
            return weight.numbers, weight.scales
        if not self.is_of(weight):
            if is_sharded(weight):
                raise StateError(
                    f"{name}: frozen_products={self.kind!r} needs all of a weight, and this process has a shard of it: "
                    "leave frozen_products out of transform() where weights are sharded over processes"
                )
            self._tensors = None  # its memory is needed
            self._tensors = pack(weight.detach(), self.kind)
            self.note(weight)
        return self.tensors

    def note(self, weight: nn.Parameter) -> None:
        """The rows that were written are made anew: this is what ``weight`` is now."""
        self._made_of, self._mark = weakref.ref(weight), _mark(weight)

    def forget(self) -> None:
        """W is another than it was, whatever its version says."""
        self._tensors = self._made_of = None


def _mark(weight: nn.Parameter) -> tuple[int, int]:
    """Version and place in memory; a tensor of inference mode has no version."""
    return -1 if weight.is_inference() else weight._version, weight.data_ptr()
