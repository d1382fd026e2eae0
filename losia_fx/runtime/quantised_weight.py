"""QuantisedWeight: 8-bit numbers and a scale a row that are, to all the world, the dense weight they stand for.

It takes the place of W among the parameters of its module (LosiaConfig.keep_dense=False). Whatever reads it is given
numbers * scales in W's dtype, made for the moment; graphs of ours take its two parts as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from losia_fx._compat import no_torch_function, unwrapped, wrapper_of
from losia_fx.errors import LosiaError
from losia_fx.method.packing import DTYPES, pack
from losia_fx.method.subnet import scatter
from losia_fx.method.write_through import KINDS, as_bytes, dequantise, held, nearest, take, write

aten = torch.ops.aten


class _Written:
    """What all aliases of one weight know of the writes to it."""

    def __init__(self) -> None:
        self.count = 0
        """Those that came here, by which the versions have grown."""
        self.source: Tensor | None = None
        """The dense values of the last one, until the weight is used: its scales may still be loaded."""
        self.source_version = 0


class QuantisedWeight(Tensor):
    """numbers (out, in) of 8 bits and scales (out, 1) float32, as a tensor (out, in) of ``dtype`` on their device.

    Every operation is that of the dense values, and gives what it gives of those: also one that gives a view of another
    tensor, so a write to what it gave is lost (``lost_writes``). Copies, aliases and other devices and dtypes of it are
    such a tensor again. copy_ packs what it is given anew, but for rows that their scales can say. Any other write
    raises LosiaError. It has no storage: what asks for one (safetensors' save_file of parameters) fails in torch's
    words, and is to be given the state_dict().
    """

    numbers: Tensor
    scales: Tensor
    written: _Written

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> QuantisedWeight:
        made = wrapper_of(cls, numbers, dtype)
        made.numbers, made.scales, made.written = numbers, scales, _Written()
        return made

    def __init__(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """See __new__."""

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, kind: str) -> QuantisedWeight:
        """``weight`` (out, in), packed; its memory is not kept."""
        return cls(*pack(weight.detach(), kind), weight.dtype)

    @property
    def kind(self) -> str:
        """What LosiaConfig.frozen_products calls these numbers."""
        return KINDS[self.numbers.dtype]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, as a tensor of their own."""
        return dequantise(self.numbers, self.scales, dtype or self.dtype)

    def stand_in(self) -> Tensor:
        """A plain tensor of the same shape, dtype and device, of which nobody may ask a value: it has no memory."""
        return self.numbers.new_zeros((), dtype=self.dtype).expand(self.numbers.shape)

    # -- writes ---------------------------------------------------------------------------------------------------

    def write(self, rows: Tensor, cols: Tensor, values: Tensor, noise: Tensor | None = None) -> None:
        """self[rows][:, cols] = values, as far as the numbers can say it: write_through.write."""
        write(self.numbers, self.scales, rows, cols, values.detach(), noise)
        self._count_a_write()
        self.written.source = None

    def block(self, rows: Tensor, cols: Tensor) -> Tensor:
        """self[rows][:, cols], float32, a copy."""
        numbers = take(take(self.numbers, 0, rows), 1, cols)
        return numbers.float() * self.scales.index_select(0, rows)

    def held(self, values: Tensor, rows: Tensor) -> Tensor:
        """What ``block`` gives once ``values``, with these rows, are written, and none has outgrown its scale."""
        return held(values.detach(), self.scales.index_select(0, rows), self.kind)

    def give_scales(self, scales: Tensor, rows: Tensor, cols: Tensor, values: Tensor) -> bool:
        """Takes these scales (out,), and with them the numbers that the values loaded last were made of; whether
        self[rows][:, cols] is then what can be held of ``values``, else all stays as it is."""
        scales = scales.view(-1, 1).to(self.scales)
        numbers = nearest(self._source().float() / scales, self.kind)
        found = QuantisedWeight(numbers, scales, self.dtype)
        mine, wanted = found.block(rows, cols), found.held(values, rows)
        if not bool(((mine == wanted) | (mine.isnan() & wanted.isnan())).all()):
            return False
        self.copy_(found)
        return True

    def _source(self) -> Tensor:
        source = self.written.source
        if source is None or source._version != self.written.source_version:
            return self.dense(torch.float32)
        return source.detach().to(self.numbers.device)

    def note_source(self, source: Tensor) -> None:
        """These dense values have just been packed."""
        plain = not isinstance(source, QuantisedWeight) and not source.is_inference() and source.shape == self.shape
        self.written.source = source if plain else None
        self.written.source_version = source._version if plain else 0

    def forget_source(self) -> None:
        self.written.source = None

    def _count_a_write(self) -> None:
        """One that torch does not see."""
        if not self.is_inference():
            torch.autograd.graph.increment_version(self)
            self.written.count += 1

    def lost_writes(self) -> bool:
        """Whether somebody wrote to what an operation gave, as if that were a view of this; asked once."""
        if self.is_inference() or self._version == self.written.count:
            return False
        self.written.count = self._version
        return True

    # -- as a tensor ----------------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["numbers", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts: Mapping[str, Tensor], dtype: torch.dtype, *_: Any) -> QuantisedWeight:
        return QuantisedWeight(parts["numbers"], parts["scales"], dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _rebuilt(self.numbers.clone(), self.scales.clone(), *_facts(self))
        found: Tensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (as_bytes(self.numbers), self.scales, self.kind, *_facts(self))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype or value.device != self.device:
            raise _no_write("data")
        with torch.no_grad():
            self.copy_(value)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """No values: torch's logs say it of stand-ins, too."""
        return f"QuantisedWeight({tuple(self.shape)}, {self.dtype} of {self.kind}, device='{self.device}')"

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _no_write("__setitem__")

    def data_ptr(self) -> int:
        """Two weights are two: of tensors that share their memory, programs take one for the other."""
        return self.numbers.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def share_memory_(self) -> QuantisedWeight:
        self.numbers.share_memory_()
        self.scales.share_memory_()
        return self

    def is_shared(self) -> bool:
        return bool(self.numbers.is_shared())

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (own := _OWN.get(func)) is not None and (result := own(*args, **kwargs)) is not None:
            return result
        if func._schema.is_mutable and any(isinstance(value, cls) for value in _written(func, args, kwargs)):
            raise _no_write(str(func))
        plain = cls.stand_in if func in _OF_THE_FORM else cls.dense
        args, kwargs = unwrapped(cls, plain, (args, kwargs))
        return func(*args, **kwargs)


def _facts(weight: QuantisedWeight) -> tuple[torch.dtype, bool, bool]:
    return weight.dtype, isinstance(weight, nn.Parameter), weight.requires_grad


def _rebuilt(numbers: Tensor, scales: Tensor, dtype: torch.dtype, is_parameter: bool, requires_grad: bool) -> Tensor:
    made = QuantisedWeight(numbers, scales, dtype)
    return nn.Parameter(made, requires_grad=requires_grad) if is_parameter else made.requires_grad_(requires_grad)


def _unpickled(numbers: Tensor, scales: Tensor, kind: str, *facts: Any) -> Tensor:
    """float8 goes through torch.save as bytes: the plain pickle of such a tensor cannot be read (torch 2.13)."""
    return _rebuilt(numbers.view(DTYPES[kind]), scales, *facts)


def _no_write(what: str) -> LosiaError:
    return LosiaError(
        f"{what}: this weight is kept in 8 bits (keep_dense=False), and nothing but copy_ writes to it: copy_ all of "
        "it, write to its subnet (losia_fx.subnets(model)[name].values), call losia_fx.restore(model) once training is "
        "over, or transform with keep_dense=True"
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    found = [
        named.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [each for value in found for each in (value if isinstance(value, (list, tuple)) else (value,))]


def put_block(weight: Tensor, rows: Tensor, cols: Tensor | None, values: Tensor) -> None:
    """weight[rows][:, cols] = values, of a weight of either kind. To be called with gradients off."""
    if isinstance(weight, QuantisedWeight):
        assert cols is not None
        weight.write(rows, cols, values)
    else:
        scatter(weight, rows, cols, values.to(weight.dtype))


# -- the operations that are its own; None for what is to be done with the dense values after all ----------------------


def _alias(weight: QuantisedWeight) -> QuantisedWeight:
    made = QuantisedWeight(weight.numbers, weight.scales, weight.dtype)
    made.written = weight.written
    return made


def _clone(weight: QuantisedWeight, **_: Any) -> QuantisedWeight:
    return QuantisedWeight(weight.numbers.clone(), weight.scales.clone(), weight.dtype)


def _to_copy(weight: QuantisedWeight, **kwargs: Any) -> QuantisedWeight | None:
    dtype = kwargs.get("dtype") or weight.dtype
    if not dtype.is_floating_point or kwargs.get("layout", torch.strided) not in (None, torch.strided):
        return None
    where = {"device": kwargs.get("device") or weight.device, "non_blocking": kwargs.get("non_blocking", False)}
    return QuantisedWeight(weight.numbers.to(**where, copy=True), weight.scales.to(**where, copy=True), dtype)


def _copy_(weight: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(weight, QuantisedWeight):
        return None
    if isinstance(source, QuantisedWeight) and source.kind == weight.kind:
        numbers, scales = source.numbers, source.scales
    else:
        numbers, scales = _packed_anew(weight, source.expand(weight.shape).to(weight.device))
    weight.numbers.copy_(numbers)
    weight.scales.copy_(scales)
    weight.note_source(source)
    weight.written.count += 1  # torch's version grows by this one
    return weight


def _packed_anew(weight: QuantisedWeight, dense: Tensor) -> tuple[Tensor, Tensor]:
    """A row that can be said with the scale that it has keeps that: what was read here and comes back is the same, and
    one of its own making would round it again."""
    numbers, scales = pack(dense, weight.kind)
    said = nearest(dense.float() / weight.scales, weight.kind)
    says = (dequantise(said, weight.scales, dense.dtype) == dense).all(1, keepdim=True)
    kept = torch.where(says, as_bytes(said), as_bytes(numbers)).view(numbers.dtype)
    return kept, torch.where(says, weight.scales, scales)


def _index_select(weight: Any, dim: int, index: Tensor) -> Tensor | None:
    """Of the rows or columns that are asked for alone."""
    if not isinstance(weight, QuantisedWeight):
        return None
    if dim in (0, -2):
        return dequantise(take(weight.numbers, 0, index), weight.scales.index_select(0, index), weight.dtype)
    return dequantise(take(weight.numbers, 1, index), weight.scales, weight.dtype)


_OWN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.index_select.default: _index_select,
}
_OF_THE_FORM = frozenset(
    getattr(aten, name).default for name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like")
)
"""Operations that ask for no value."""
