"""Products of rows sorted by expert, by torch's kernel and by the loop, against a loop of the tests' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losia_fx.ops import grouped
from losia_fx.ops.grouped import ends_for, grouped_outer, grouped_product

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ENDS = {"all used": (2, 5, 7), "one idle": (3, 3, 7), "rows past the end": (0, 2, 4), "none": (0, 0, 0)}
TOKENS = 7


def made(ends: tuple[int, ...], dtype: torch.dtype, *widths: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Rows (TOKENS, width) of each width, the same in float64, and offsets."""
    narrow = [torch.randn(TOKENS, width).to(dtype) for width in widths]
    return narrow, [each.double() for each in narrow], torch.tensor(ends, dtype=torch.int32)


def slices(ends: tuple[int, ...]) -> list[slice]:
    return [slice(start, end) for start, end in zip((0, *ends), ends, strict=False)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    if actual.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("ends", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(16, 8), (5, 8), (16, 3)], ids=str)
def test_outer(ends: tuple[int, ...], dtype: torch.dtype, widths: tuple[int, int]) -> None:
    (x, y), (exact_x, exact_y), offsets = made(ends, dtype, *widths)
    x[ends[-1] :], y[ends[-1] :] = float("nan"), float("inf")  # of no expert, as a kernel may leave them
    found = grouped_outer(x, y, ends_for(offsets, dtype))
    assert found.shape == (3, *widths)
    assert found.dtype == dtype
    close(found, torch.stack([exact_x[rows].t() @ exact_y[rows] for rows in slices(ends)]))


@pytest.mark.parametrize("ends", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(16, 8), (5, 8), (16, 3)], ids=str)
@pytest.mark.parametrize("stored", ["(in, out)", "(out, in)"])
def test_product(ends: tuple[int, ...], dtype: torch.dtype, widths: tuple[int, int], stored: str) -> None:
    into, out = widths
    (x,), (exact,), offsets = made(ends, dtype, into)
    weight = torch.randn(3, into, out).to(dtype)
    weight = weight if stored == "(in, out)" else weight.mT.contiguous().mT
    found = grouped_product(x, weight, ends_for(offsets, dtype, *widths))[: ends[-1]]
    rows = [exact[rows] @ weight[e].double() for e, rows in enumerate(slices(ends))]
    assert found.dtype == dtype
    if ends[-1]:
        close(found, torch.cat(rows))


def test_a_gradient_that_is_not_contiguous() -> None:
    """As the backward of a sum gives it: the kernel would refuse its strides."""
    (x, y), (exact_x, exact_y), offsets = made((2, 5, 7), torch.bfloat16, 16, 8)
    ends, weight = ends_for(offsets, x.dtype, 16, 8), torch.randn(3, 16, 8).bfloat16()
    ones = torch.ones((), dtype=x.dtype).expand(TOKENS, 16)
    close(grouped_product(ones, weight, ends), torch.cat([ones[r].double() @ weight[e].double()
          for e, r in enumerate(slices((2, 5, 7)))]))  # fmt: skip
    turned = x.t().contiguous().t()
    close(grouped_outer(turned, y, ends), torch.stack([exact_x[r].t() @ exact_y[r] for r in slices((2, 5, 7))]))


def test_what_a_kernel_makes_of_an_idle_expert_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def blackwell(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
        found = original(x, y, offs=offs)
        found[1] = float("nan")
        return found

    original = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", blackwell)
    (x, y), _, offsets = made((3, 3, 7), torch.bfloat16, 16, 8)
    found = grouped_outer(x, y, ends_for(offsets, x.dtype))
    assert not found[1].any()
    assert found[0].any()
    assert found[2].any()


@pytest.mark.parametrize(
    ("dtype", "widths", "kernel"),
    [
        (torch.bfloat16, (), True),
        (torch.bfloat16, (16, 8), True),
        (torch.bfloat16, (16, 12), False),
        (torch.float32, (), False),
        (torch.float16, (16, 8), False),
    ],
)
@pytest.mark.parametrize("given", [torch.int32, torch.int64])
def test_where_rows_end(dtype: torch.dtype, widths: tuple[int, ...], kernel: bool, given: torch.dtype) -> None:
    offsets = torch.tensor([2, 5, 7], dtype=given)
    ends = ends_for(offsets, dtype, *widths)
    assert ends.tolist() == [2, 5, 7]
    assert ends.dtype == (torch.int32 if kernel else torch.int64)
    assert ends_for(offsets.to("meta"), torch.bfloat16).device.type == "meta"


def test_the_kernel_asks_the_host_for_nothing() -> None:
    """On "meta" no value exists."""
    x, y, weight = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((7, 16), (7, 5), (3, 16, 8)))
    ends = ends_for(torch.empty(3, dtype=torch.int32, device="meta"), x.dtype)
    assert grouped_outer(x, y, ends).shape == (3, 16, 5)
    assert grouped_product(x, weight, ends).shape == (7, 8)


def test_opcheck() -> None:
    (x, y), _, offsets = made((2, 5, 7), torch.float32, 16, 8)
    ends = ends_for(offsets, x.dtype)
    arguments: list[tuple[Any, tuple[Tensor, ...]]] = [
        (grouped._ends_on_host, (offsets,)),
        (grouped._grouped_mm, (x, torch.randn(3, 16, 8), ends)),
        (grouped._grouped_outer, (x, y, ends)),
    ]
    for op, args in arguments:
        torch.library.opcheck(op, args)
