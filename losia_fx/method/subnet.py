"""The block W[rows][:, cols] of a weight, in both layouts: taken out, put back, drawn at random.

A matrix (out, in) has rows (r,) and cols (c,); an expert weight (E, out, in) a subnet an expert, rows (E, r) and cols
(E, c). Indices are sorted and distinct, int64. rows index dimension -2 of the weight as stored, cols dimension -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather(full: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """full[rows][:, cols], (r, c) or (E, r, c), a copy; None stands for every row or every column, not for both."""
    if full.dim() == 2:
        picked = full if rows is None else full.index_select(0, rows)
        return picked if cols is None else picked.index_select(1, cols)
    picked = full if rows is None else full.gather(1, rows.unsqueeze(-1).expand(-1, -1, full.shape[-1]))
    return picked if cols is None else picked.gather(2, cols.unsqueeze(-2).expand(-1, picked.shape[1], -1))


def scatter(full: Tensor, rows: Tensor, cols: Tensor | None, values: Tensor) -> None:
    """full[rows][:, cols] = values, in place; values of full's dtype, or one for all."""
    if cols is None:
        full.index_copy_(0, rows, values.expand(rows.numel(), full.shape[1]))
    elif full.dim() == 2 and full.is_contiguous() and not torch.compiler.is_compiling():
        # One index instead of two, for a third less time on a CPU, and as few calls as can be: there is one a weight.
        # Inductor needs no help, and before torch 2.13 it writes through a view by copying all of it there and back.
        flat = flat_index(full, rows, cols)
        full.view(-1).index_copy_(0, flat, values.reshape(-1).expand(flat.numel()))
    elif full.dim() == 2:
        full.index_put_((rows.unsqueeze(-1), cols), values)
    else:
        experts = torch.arange(full.shape[0], device=full.device)
        full.index_put_((experts[:, None, None], rows.unsqueeze(-1), cols.unsqueeze(-2)), values)


def flat_index(full: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Where the elements of full[rows][:, cols] are in full.view(-1), (r * c,) int64; full of two dimensions."""
    return torch.add(cols, rows.unsqueeze(-1), alpha=full.shape[1]).view(-1)


SMALL = 2**12
"""Elements of a block up to which its place is kept as one index: beyond, that would cost twice the block's memory."""


class PlacedBlock:
    """A small block of a matrix and where it goes, ready to be written: of many small weights, the calls are what takes
    the time."""

    def __init__(self, full: Tensor, rows: Tensor, cols: Tensor, values: Tensor) -> None:
        self._tensors = (full, rows, cols, values)
        self._marks = self._read()
        self._target, self._source = full.detach().view(-1), values.detach().view(-1)
        self._index = flat_index(full, rows, cols)

    @staticmethod
    def of(full: Tensor, rows: Tensor, cols: Tensor | None, values: Tensor) -> PlacedBlock | None:
        """None for what is not small, or does not lie in memory as it is numbered."""
        flat = full.dim() == 2 and full.is_contiguous() and values.is_contiguous() and values.numel() <= SMALL
        return None if cols is None or not flat else PlacedBlock(full, rows, cols, values)

    def _read(self) -> tuple[int, ...]:
        full, rows, cols, values = self._tensors
        as_numbered = full.is_contiguous(), values.is_contiguous()  # no more, where they were transposed in place
        return full.data_ptr(), rows._version, cols._version, values.data_ptr(), *as_numbered

    def holds(self, full: Tensor, rows: Tensor, cols: Tensor | None, values: Tensor) -> bool:
        """Whether these are the same tensors, where they were, and rows and cols say what they said."""
        mine = self._tensors
        same = full is mine[0] and rows is mine[1] and cols is mine[2] and values is mine[3]
        return same and self._read() == self._marks

    def write(self) -> None:
        """full[rows][:, cols] = values, in full's dtype."""
        source = self._source
        if source.dtype != self._target.dtype:
            source = source.to(self._target.dtype)
        self._target.index_copy_(0, self._index, source)


class BlockWriter:
    """Writes one block after the other to one matrix; a small one that is written where the last one was, faster."""

    def __init__(self) -> None:
        self.placed: PlacedBlock | None = None
        """What was written last, where it may be written again as it is."""
        self._at: tuple[int, int] | None = None
        """Versions of rows and cols at the last write."""

    def write(self, full: Tensor, rows: Tensor, cols: Tensor | None, values: Tensor) -> None:
        """full[rows][:, cols] = values, in full's dtype. To be called with gradients off."""
        if self.placed is not None and self.placed.holds(full, rows, cols, values):
            self.placed.write()
            return
        scatter(full, rows, cols, values.detach().to(full.dtype))
        at = (rows._version, -1 if cols is None else cols._version)
        # A subnet that moves with every step is never written twice at one place, and what serves that takes time.
        self.placed = PlacedBlock.of(full, rows, cols, values) if at == self._at else None
        self._at = at


SOME = 128
"""Elements that tell whether a block was written, at most."""


def some_of(block: Tensor) -> Tensor:
    """Elements of a block, (n,), a view where there can be one: the same places of any block of its shape."""
    return block.reshape(-1)[:: max(1, -(-block.numel() // SOME))]


def numbers_of_some(block: Tensor) -> list[float] | None:
    """What ``some_of`` has now, exactly; None of a tensor without numbers. Not a tensor: the memory of one that is made
    for a pickle is gone when a spawned process asks for it."""
    return None if block.is_meta else some_of(block.detach()).tolist()


def among(indices: Tensor, others: Tensor) -> Tensor:
    """Which of ``indices`` (..., n) are in ``others`` (..., m), each row of either sorted; bool (..., n)."""
    found = torch.searchsorted(others, indices).clamp_(max=others.shape[-1] - 1)
    return others.gather(-1, found) == indices


def draw(shape: tuple[int, ...], size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random rows and cols for a weight of ``shape``, on the CPU; a dimension that learns whole is not drawn."""
    count = shape[0] if len(shape) == 3 else 1
    pairs = [tuple(_some(n, k, generator) for n, k in zip(shape[-2:], size, strict=True)) for _ in range(count)]
    rows, cols = (torch.stack(drawn) for drawn in zip(*pairs, strict=True))
    return (rows, cols) if len(shape) == 3 else (rows[0], cols[0])


def _some(size: int, count: int, generator: torch.Generator) -> Tensor:
    if count == size:
        return torch.arange(size, device="cpu")
    return torch.randperm(size, generator=generator, device="cpu")[:count].sort().values


def draw_all(
    shapes: Sequence[tuple[int, ...]],
    sizes: Sequence[tuple[int, int]],
    generator: torch.Generator,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """As ``draw``, for many weights at once, on ``device``; not the same numbers.

    Dimensions of one length are drawn in one go, so that many weights cost a few calls. ``generator``, of the CPU, only
    seeds one of the device, and the host does not wait for that.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator, device="cpu"))
    own = torch.Generator(device).manual_seed(seed)
    wanted: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for at, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        for dim, (length, count) in enumerate(zip(shape[-2:], size, strict=True)):
            wanted.setdefault((length, count), []).append((at, dim, shape[0] if len(shape) == 3 else 1))
    found: list[list[Tensor]] = [[torch.empty(0, device="cpu")] * 2 for _ in shapes]
    for (length, count), places in wanted.items():
        many = [experts for *_, experts in places]
        drawn = _some_of_each(sum(many), length, count, own).split(many)
        for (at, dim, _), part in zip(places, drawn, strict=True):
            found[at][dim] = part if len(shapes[at]) == 3 else part[0]
    return [(rows, cols) for rows, cols in found]


def _some_of_each(many: int, length: int, count: int, generator: torch.Generator) -> Tensor:
    """(many, count) int64, each row sorted and distinct, below ``length``."""
    if count == length:
        return torch.arange(length, device=generator.device).expand(many, length)
    keys = torch.rand(many, length, generator=generator, device=generator.device)
    return keys.topk(count, sorted=False).indices.sort(-1).values
