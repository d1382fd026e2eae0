"""A device without a device: parameters on "meta", where no value exists, and what would make the host wait for one.

As on a GPU, the host cannot read a value of such a tensor, and no product takes it beside one on the CPU. Whoever reads
all the same is counted, and is given a stand-in.
"""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

import losia_fx
from losia_fx import LosiaConfig
from losia_fx._compat import aot_compiler, install_call
from losia_fx.api.transform import CompiledCall
from losia_fx.compile.backend import LosiaBackend
from losia_fx.method import visits
from losia_fx.method.fit import Fit
from losia_fx.ops import localization
from losia_fx.runtime.state import states_of
from tests.architectures.test_experts import MIXTRAL
from tests.support import table
from tests.support.table import LLAMA, VIT, Case

WAITING = ("nonzero", "unique", "unique_consecutive", "masked_select", "equal", "median", "nanmedian", "bincount")
"""Functions that read values on the host while they run on a GPU."""
READING = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu", *WAITING)
OURS = {"tap": localization._tap, "localize": localization._localize, "localize_whole": localization._localize_whole}


class Waits:
    """What has made the host wait, by kind, and where from."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.places: list[str] = []

    def add(self, kind: str) -> None:
        self.kinds[kind] += 1
        self.places.append(f"{kind}: " + " < ".join(_callers()))

    def taken(self) -> Counter[str]:
        """Those since it was last asked."""
        found, self.kinds = self.kinds, Counter()
        self.places.clear()
        return found


def _callers() -> list[str]:
    """The innermost lines of the project that have led here."""
    frames = [frame for frame in traceback.extract_stack()[:-3] if "site-packages" not in frame.filename]
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames)][:4]


@contextmanager
def dry_device() -> Iterator[Waits]:
    """Our ops do on "meta" what they do on a device, and every read of a value there is counted and stood in for."""
    waits = Waits()
    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("losia", "IMPL"))
        for name, body in OURS.items():  # "meta" has the compilers' stand-ins for them
            library.impl(name, body, "Meta", allow_override=True)
        library.impl("ends_on_host", _ends_on_host, "Meta", allow_override=True)
        for holder, names in ((Tensor, READING), (torch, (*WAITING, "isin"))):
            for name in names:
                stack.enter_context(patch.object(holder, name, _reading(waits, name, getattr(holder, name))))
        stack.enter_context(patch.object(Tensor, "to", _moving(waits, Tensor.to)))
        stack.enter_context(patch.object(Tensor, "copy_", _writing(waits, Tensor.copy_)))
        stack.enter_context(patch.object(torch, "tensor", _making(waits, torch.tensor)))
        stack.enter_context(patch.object(Tensor, "__getitem__", _indexing(waits, Tensor.__getitem__)))
        stack.enter_context(patch.object(Tensor, "__setitem__", _indexing(waits, Tensor.__setitem__)))
        # What is decided by numbers goes on as if they were good ones.
        for place in ("losia_fx.runtime.measure.fit_from", "losia_fx.method.fit.fit_from"):
            stack.enter_context(patch(place, lambda *numbers, **known: Fit(1.0)))
        stack.enter_context(patch.object(visits, "is_plain", lambda tensor: True))
        yield waits


def _ends_on_host(offsets: Tensor) -> Tensor:
    return offsets.cpu().long()


def _is_device(value: Any) -> bool:
    """Not the compilers' stand-ins, which are on "meta" too."""
    return type(value) in (Tensor, nn.Parameter) and value.is_meta


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")


def _reading(waits: Waits, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _is_device(self):
            return original(self, *args, **kwargs)
        waits.add(name)
        return original(_stand_in(self), *(_stand_in(a) if _is_device(a) else a for a in args), **kwargs)

    return read


def _moving(waits: Waits, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Between the CPU and the device, in either direction: a copy that is not told otherwise is waited for."""

    @functools.wraps(original)
    def move(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target = kwargs.get("device", args[0] if args else None)
        target = target.device if isinstance(target, Tensor) else target
        crosses = isinstance(target, (str, torch.device)) and torch.device(target).type != self.device.type
        if not crosses or type(self) not in (Tensor, nn.Parameter):
            return original(self, *args, **kwargs)
        if not kwargs.get("non_blocking"):
            waits.add(f"to {torch.device(target).type}")
        return original(_stand_in(self) if self.is_meta else self, *args, **kwargs)

    return move


def _writing(waits: Waits, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def write(self: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
        if self.device.type != other.device.type and not non_blocking and type(self) in (Tensor, nn.Parameter):
            waits.add("copy_")
        return original(self, other, non_blocking)

    return write


def _making(waits: Waits, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tensor of a number is made on the CPU, and copied to where it is wanted."""

    @functools.wraps(original)
    def make(data: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "cpu":
            waits.add("tensor")
        return original(data, **kwargs)

    return make


def _indexing(waits: Waits, original: Callable[..., Any]) -> Callable[..., Any]:
    """By a mask, whose true elements the host counts."""

    @functools.wraps(original)
    def index(self: Tensor, key: Any, *value: Any) -> Any:
        parts = [part for part in (key if isinstance(key, tuple) else (key,)) if _is_device(part)]
        if any(part.dtype in (torch.bool, torch.uint8) for part in parts):
            waits.add("mask")
        return original(self, key, *value)

    return index


CASES = {"llama": (LLAMA, torch.float32), "mixtral": (MIXTRAL, torch.bfloat16), "vit": (VIT, torch.float32)}


class DryRun:
    """A transformed model on the device, its optimizer, and the partitioned graphs of its steps."""

    def __init__(self, case: Case, dtype: torch.dtype, **options: Any) -> None:
        self.case, self.dtype = case, dtype
        config = LosiaConfig(rank_factor=0.25, compiler="aot_eager", **options)
        self.model = losia_fx.transform(table.build(case, dtype), config)
        self.graphs: list[fx.GraphModule] = []
        inner = aot_compiler("aot_eager", self.graphs.append, self.graphs.append)
        install_call(self.model, CompiledCall(self.model, config, LosiaBackend(config, inner=inner)))
        self.model.to("meta")
        self.states = states_of(self.model)
        assert all(state.weight.is_meta and state.values.is_meta and state.rows.is_meta for state in self.states)
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    def forward(self) -> Tensor:
        batch = table.batch(self.case, self.dtype)
        loss: Tensor = self.model(**{name: value.to("meta", non_blocking=True) for name, value in batch.items()}).loss
        return loss

    def step(self, micro_batches: int = 1, set_to_none: bool = True) -> None:
        for _ in range(micro_batches):
            self.forward().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none)
