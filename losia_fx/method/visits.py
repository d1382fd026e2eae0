"""Where in a weight training has been, and what was there before: the history behind a delta file.

A visit is a subnet's stay at one place. Visits overlap, and only the first to reach an element knows its base value;
so a Piece holds the elements of its block that no earlier piece of the weight holds, and every element has one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .subnet import among, gather, scatter
from .transfers import copies

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type that holds the bits of an element, by its size in bytes."""
INDEX_BYTES = 8
"""Of a row or a column, int64."""


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers: what is exact to the bit is said of these, NaN and -0.0 included."""
    return tensor.detach().view(INTEGERS[tensor.element_size()])


def is_plain(tensor: Tensor) -> bool:
    """Whether the values are all here: not those of a shard, nor of a device without memory."""
    return type(tensor.data) is Tensor and not tensor.is_meta


@dataclass(frozen=True)
class Piece:
    """Elements of one weight: those of the block rows x cols that are in no earlier piece; without rows and cols, all.

    values (n,), in the order of the block. rows (r,) and cols (c,) sorted int64; (E, r) and (E, c) for a weight of E
    matrices. Everything on the CPU.
    """

    values: Tensor
    rows: Tensor | None = None
    cols: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.values, self.rows, self.cols) if tensor is not None)


@dataclass(frozen=True)
class Place:
    """Where a piece's values belong."""

    rows: Tensor | None
    cols: Tensor | None
    new: Tensor | None
    """Which elements of the block are in no earlier piece, bool of the block's shape on the CPU; None: all of them."""

    def read(self, weight: Tensor) -> Tensor:
        """The values (n,) that ``weight`` has here, on the CPU."""
        return self.values_of(self._block(weight).cpu())

    def values_of(self, block: Tensor) -> Tensor:
        """The values (n,) of a whole block on the CPU that belong here."""
        return block.reshape(-1) if self.new is None else block[self.new]

    def block_of(self, values: Tensor) -> Tensor:
        """The whole block on the CPU, rows x cols: values (n,) where they belong, and zeros elsewhere."""
        assert self.rows is not None
        assert self.cols is not None
        block = values.new_zeros(*self.rows.shape, self.cols.shape[-1])
        block[torch.ones_like(block, dtype=torch.bool) if self.new is None else self.new] = values
        return block

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Puts values (n,) here, in place."""
        block, values = self._block(weight), values.to(weight.device)
        if self.new is None:
            block = values.view(block.shape)
        else:
            block[self.new.to(weight.device)] = values
        if self.rows is None or self.cols is None:
            weight.detach().copy_(block)
        else:
            scatter(weight.detach(), self.rows.to(weight.device), self.cols.to(weight.device), block)

    def _block(self, weight: Tensor) -> Tensor:
        if self.rows is None or self.cols is None:
            return weight.detach()
        return gather(weight.detach(), self.rows.to(weight.device), self.cols.to(weight.device))


def walk(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Place]]:
    """Every piece with its place."""
    earlier: list[Piece] = []
    for piece in pieces:
        yield piece, place_after(earlier, piece.rows, piece.cols)
        earlier.append(piece)


def place_after(earlier: Sequence[Piece], rows: Tensor | None, cols: Tensor | None) -> Place:
    """The place of the elements of rows x cols that are in no ``earlier`` piece."""
    if rows is None or cols is None or not earlier:
        return Place(rows, cols, None)
    seen = torch.zeros(*rows.shape, cols.shape[-1], dtype=torch.bool, device=rows.device)
    for piece in earlier:
        assert piece.rows is not None
        assert piece.cols is not None
        again = among(rows, piece.rows)  # few rows: an eighth of an eighth of the weight's
        seen[again] |= among(cols, piece.cols).unsqueeze(-2).expand_as(seen)[again]
    return Place(rows, cols, ~seen)


def expected_bytes(shape: Sequence[int], subnet: Sequence[int], itemsize: int, visits: int) -> int:
    """Bytes of a BaseHistory after that many visits of a subnet that is drawn anew for each, on the CPU.

    shape: of the weight, (out, in) or (E, out, in). subnet: of its subnet, (r, c) or (E, r, c). itemsize: bytes an
    element of the weight.

    A visit covers the share q = r c / (out in) of the elements, and n independent ones 1 - (1 - q)^n of them on
    average. So it is ``elements (1 - (1 - q)^n) itemsize`` and n times the int64 rows and cols, 8 E (r + c); at most
    one copy of the weight. Subnets chosen by importance overlap more than random ones: it is less for them.
    """
    elements, inside = math.prod(shape), math.prod(subnet)
    covered = elements * (1 - (1 - inside / elements) ** visits)
    indices = INDEX_BYTES * math.prod(subnet[:-2]) * (subnet[-2] + subnet[-1])
    kept = 1 if inside == elements else visits  # what reaches nothing new is not kept
    return min(round(covered * itemsize) + kept * indices, elements * itemsize)


@dataclass
class BaseHistory:
    """What one weight was before it was trained: the base values of every element that training has reached.

    Costs the bytes of those elements in the weight's dtype, and indices, on the CPU: p*p of the weight a visit, less
    where visits overlap, and never more than one copy of the weight (see expected_bytes). Empty until the first
    optimizer step, so weights loaded, initialised or converted before it are the base.
    """

    pieces: list[Piece] = field(default_factory=list)
    checksum: int | None = None
    """Of the base's bits: tells whether the elements that training has not reached are still the base's."""
    restarted: bool = False
    """Loaded weights were not of this run: they are the base now."""
    resumed: bool = False
    """Came from a checkpoint: the subnet may stand where this history has not been."""

    @staticmethod
    def of_whole(weight: Tensor) -> BaseHistory:
        """The history of a weight that trains in full: one copy of it."""
        return BaseHistory([Piece(weight.detach().cpu().reshape(-1).clone())])

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def open(self, weight: Tensor, rows: Tensor, cols: Tensor) -> None:
        """Before an optimizer step: the first one makes the weight, as it is, the base."""
        if not self.pieces and is_plain(weight):
            self.checksum = _checksum(weight)
            self._add(weight, *copies([rows, cols, gather(weight, rows, cols)]))
        elif self.resumed and self.follows:
            self.visit(weight, *copies([rows, cols, gather(weight, rows, cols)]))
        self.resumed = False

    @property
    def follows(self) -> bool:
        """Whether the base is kept visit by visit: it has begun, and is not one whole copy."""
        return bool(self.pieces) and self.pieces[0].rows is not None

    def visit(self, weight: Tensor, rows: Tensor, cols: Tensor, block: Tensor) -> None:
        """The subnet moves to (rows, cols); what training does there comes later.

        rows, cols and block, what the weight holds there: on the CPU, nobody else's. For a history that ``follows``.
        """
        self._follow_dtype(weight)
        self._add(weight, rows, cols, block)

    def keep_whole(self, weight: Tensor) -> None:
        """The subnet is about to move all the time: the base is one copy of the weight from now on, not its pieces."""
        if self.follows:
            self.pieces = [Piece(self.base_of(weight).reshape(-1))]

    def _add(self, weight: Tensor, rows: Tensor, cols: Tensor, block: Tensor) -> None:
        values = place_after(self.pieces, rows, cols).values_of(block)
        if values.numel():
            self.pieces.append(Piece(values.clone(), rows, cols))
        if self.nbytes > weight.nbytes:
            self.pieces = [Piece(self.base_of(weight).reshape(-1))]

    def loaded(self, weight: Tensor) -> None:
        """Other weights were loaded. Those of this run keep their base; any others are a base of their own."""
        if self.pieces and (self.pieces[0].values.dtype != weight.dtype or not self.holds(self.base_of(weight))):
            self.pieces, self.checksum, self.restarted = [], None, True

    def holds(self, base: Tensor) -> bool:
        """Whether ``base``, got from ``base_of``, is the base: training alone has changed the weight."""
        return self.checksum is None or _checksum(base) == self.checksum

    def base_of(self, weight: Tensor) -> Tensor:
        """The whole weight as it was before training, a copy on the CPU."""
        self._follow_dtype(weight)
        base = weight.detach().cpu().clone()
        for piece, place in walk(self.pieces):
            place.write(base, piece.values)
        return base

    def _follow_dtype(self, weight: Tensor) -> None:
        """After model.to(dtype): the base in that dtype is the base as it would be loaded in that dtype."""
        if self.pieces and self.pieces[0].values.dtype != weight.dtype:
            self.pieces = [Piece(piece.values.to(weight.dtype), piece.rows, piece.cols) for piece in self.pieces]
            if self.checksum is not None:
                self.checksum = _checksum(self.base_of(weight))


def _checksum(tensor: Tensor) -> int:
    """The sum of the bits, 64 at a time: as fast as memory, on any device. It is the same wherever the values lie."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    data = flat.view(torch.uint8)
    words = len(data) // 8 * 8
    total = int(data[:words].view(torch.int64).sum()) + int(data[words:].sum())
    return total & (2**63 - 1)  # the sum wraps; its low bits are right, and fit an int64 tensor
