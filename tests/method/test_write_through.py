"""What 8-bit numbers hold of what is written to them: nearest or drawn, of rows that keep or outgrow their scales."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from losia_fx.method import write_through
from losia_fx.method.packing import DTYPES, LARGEST, pack
from losia_fx.method.write_through import HEADROOM, dequantise, drawn, grown, held, nearest, write

KINDS = tuple(DTYPES)
ROWS, COLS = torch.tensor([1, 2, 5]), torch.tensor([0, 3, 4, 7])


def numbers_of(kind: str) -> Tensor:
    """Every number that there is, sorted, float64."""
    if kind == "int8":
        return torch.arange(-127, 128, dtype=torch.float64)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return every[every.isfinite()].unique()


def around(x: float, kind: str) -> tuple[float, float]:
    """The number at or below x, and the one above."""
    numbers = numbers_of(kind)
    at = int(torch.searchsorted(numbers, torch.tensor(x, dtype=torch.float64), right=True)) - 1
    return float(numbers[at]), float(numbers[min(at + 1, len(numbers) - 1)])


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture
def packed(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return pack(torch.randn(6, 8), request.param)


each_kind = pytest.mark.parametrize("kind", KINDS)
each_packed = pytest.mark.parametrize(("packed", "kind"), [(kind, kind) for kind in KINDS], indirect=["packed"])
POINTS = (0.0, 0.3, -0.5, 1.7, 12.4, -100.25, 127.0, 447.0, 3e-3, -2e-4, 17.0)


@each_kind
@pytest.mark.parametrize("x", POINTS)
def test_the_nearest_number_is_one_of_the_two_around(x: float, kind: str) -> None:
    x = max(-LARGEST[kind], min(LARGEST[kind], x))
    below, above = around(x, kind)
    found = float(nearest(torch.tensor([x]), kind).float())
    assert found in (below, above)
    assert abs(found - x) <= min(x - below, above - x) + 1e-6 * abs(x)


@each_kind
@pytest.mark.parametrize("x", POINTS)
def test_a_drawn_number_is_one_of_the_two_around_and_right_on_average(x: float, kind: str) -> None:
    draws = 2**16
    x = float(torch.tensor(max(-LARGEST[kind], min(LARGEST[kind], x))))
    below, above = around(x, kind)
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(3))
    found = drawn(torch.full((draws,), x), noise, kind).double()
    assert set(found.tolist()) <= {below, above}
    if x == below:
        assert set(found.tolist()) == {below}  # what can be said is said, always
    else:
        share = (x - below) / (above - below)
        deviation = math.sqrt(share * (1 - share) / draws) * (above - below)
        assert abs(float(found.mean()) - x) <= 5 * deviation + 1e-6 * abs(x)


@each_kind
def test_noise_next_to_one_draws_no_number_that_x_does_not_lie_towards(kind: str) -> None:
    every = numbers_of(kind).float()
    for noise in (0.0, 1 - 2**-24):
        assert torch.equal(drawn(every, torch.full_like(every, noise), kind).float(), every)


@each_kind
def test_what_is_beyond_the_largest_becomes_that(kind: str) -> None:
    x = torch.tensor([1e3, -1e3, math.inf, -math.inf])
    largest = LARGEST[kind] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert torch.equal(nearest(x, kind).float(), largest)
    assert torch.equal(drawn(x, torch.full_like(x, 0.999), kind).float(), largest)


@each_packed
def test_a_write_goes_where_it_is_told_and_nowhere_else(packed: tuple[Tensor, Tensor], kind: str) -> None:
    numbers, scales = (part.clone() for part in packed)
    values = 0.9 * dequantise(*packed, torch.float32)[ROWS][:, COLS] + 1e-3
    write(numbers, scales, ROWS, COLS, values, None)
    assert torch.equal(scales, packed[1])
    expected = packed[0].float()
    for i, row in enumerate(ROWS):
        for j, col in enumerate(COLS):
            expected[row, col] = nearest((values[i, j] / scales[row]), kind).float()
    assert torch.equal(numbers.float(), expected)
    assert torch.equal(dequantise(numbers, scales, torch.float32)[ROWS][:, COLS], held(values, scales[ROWS], kind))


@each_packed
def test_a_value_that_just_fits_leaves_its_row(packed: tuple[Tensor, Tensor], kind: str) -> None:
    numbers, scales = (part.clone() for part in packed)
    values = torch.zeros(3, 4)
    values[:, 1] = -LARGEST[kind] * scales[ROWS, 0]
    write(numbers, scales, ROWS, COLS, values, None)
    assert torch.equal(scales, packed[1])
    assert torch.equal(numbers[ROWS][:, COLS[1]].float(), torch.full((3,), -LARGEST[kind]))


@each_packed
@pytest.mark.parametrize("factor", [1.001, 3.0])
def test_a_row_that_outgrows_its_scale_is_packed_anew_with_room(
    packed: tuple[Tensor, Tensor], kind: str, factor: float
) -> None:
    numbers, scales = (part.clone() for part in packed)
    before = dequantise(*packed, torch.float32)
    values = before[ROWS][:, COLS].clone()
    values[1, 2] = factor * LARGEST[kind] * float(scales[2])
    write(numbers, scales, ROWS, COLS, values, None)
    wanted = float(values[1, 2]) / LARGEST[kind] * HEADROOM
    assert float(scales[2]) == pytest.approx(wanted, rel=1e-6)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(scales[others], packed[1][others])
    assert same(numbers[others], packed[0][others])
    now = dequantise(numbers, scales, torch.float32)
    # The rest of the row is the nearest of what its numbers said, and no longer exact.
    rest = [col for col in range(8) if col not in COLS.tolist()]
    assert torch.equal(now[2, rest], held(before[2:3, rest], scales[2:3], kind)[0])
    assert float(now[2, 4]) == pytest.approx(float(values[1, 2]), rel=0.07)


def test_the_headroom_is_what_is_said() -> None:
    assert HEADROOM >= 1.1
    scale = torch.tensor([[1.0]])
    assert float(grown(torch.tensor([[254.0]]), scale, "int8")) == pytest.approx(2 * HEADROOM)
    assert float(grown(torch.tensor([[127.0]]), scale, "int8")) == 1.0


@each_packed
def test_scales_stay_through_many_writes_of_what_is_there(packed: tuple[Tensor, Tensor], kind: str) -> None:
    """Derived anew each time from what the numbers say they would creep."""
    numbers, scales = (part.clone() for part in packed)
    for _ in range(100):
        write(numbers, scales, ROWS, COLS, dequantise(numbers, scales, torch.float32)[ROWS][:, COLS], None)
    assert same(numbers, packed[0])
    assert torch.equal(scales, packed[1])


@each_packed
def test_scales_never_shrink(packed: tuple[Tensor, Tensor], kind: str) -> None:
    numbers, scales = (part.clone() for part in packed)
    write(numbers, scales, ROWS, COLS, torch.zeros(3, 4), None)
    assert torch.equal(scales, packed[1])
    assert not numbers[ROWS][:, COLS].float().any()


@each_packed
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_row_so_and_no_other(packed: tuple[Tensor, Tensor], kind: str, bad: float) -> None:
    numbers, scales = (part.clone() for part in packed)
    values = torch.zeros(3, 4)
    values[0, 0] = bad
    for noise in (None, torch.rand(3, 4)):
        write(numbers, scales, ROWS, COLS, values, noise)
        now = dequantise(numbers, scales, torch.float32)
        assert bool(now[1].isnan().all())
        assert bool(now[[0, 2, 3, 4, 5]].isfinite().all())
        assert bool(held(values, scales[ROWS], kind)[0].isnan().all())
    write(numbers, scales, ROWS, COLS, torch.zeros(3, 4), None)  # what was lost is not taken for zeros
    assert bool(dequantise(numbers, scales, torch.float32)[1].isnan().all())


@each_kind
def test_a_row_of_zeros_takes_what_is_written(kind: str) -> None:
    numbers, scales = pack(torch.zeros(6, 8), kind)
    values = torch.linspace(-1, 1, 12).view(3, 4)
    write(numbers, scales, ROWS, COLS, values, None)
    found = dequantise(numbers, scales, torch.float32)[ROWS][:, COLS]
    assert float((found - values).abs().max()) <= 0.05
    assert not dequantise(numbers, scales, torch.float32)[[0, 3, 4]].any()


@each_packed
def test_written_at_random_the_mean_is_what_was_written(packed: tuple[Tensor, Tensor], kind: str) -> None:
    """Also where the nearest would always be what is there: an update of a tenth of the distance of two numbers."""
    generator, draws = torch.Generator().manual_seed(1), 4000
    step = packed[1][ROWS] * (1.0 if kind == "int8" else 2.0**-4)
    values = 0.5 * dequantise(*packed, torch.float32)[ROWS][:, COLS] + 0.1 * step
    total = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(draws):
        numbers, scales = (part.clone() for part in packed)
        write(numbers, scales, ROWS, COLS, values, torch.rand(3, 4, generator=generator))
        total += dequantise(numbers, scales, torch.float32)[ROWS][:, COLS]
    distances = values.clone()
    for at, x in enumerate((values / packed[1][ROWS]).flatten().tolist()):
        below, above = around(x, kind)
        distances.view(-1)[at] = (above - below) * float(packed[1][ROWS].expand(3, 4).reshape(-1)[at])
    assert bool(((total / draws - values).abs() <= 5 * 0.5 * distances / math.sqrt(draws) + 1e-7).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@each_packed
def test_dense_values_and_scales_say_the_numbers(packed: tuple[Tensor, Tensor], kind: str, dtype: torch.dtype) -> None:
    """What a checkpoint relies on: of every number there is, at scales of many sizes."""
    every = numbers_of(kind).float().to(DTYPES[kind])
    scales = torch.logspace(-6, 3, 50).unsqueeze(1)
    dense = dequantise(every.expand(50, -1), scales, dtype)
    found = nearest(dense.float() / scales, kind).float()
    assert torch.equal(found, every.float().expand(50, -1))


@each_packed
def test_a_part_at_a_time_is_the_same(
    packed: tuple[Tensor, Tensor], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dequantise(*packed, torch.bfloat16)
    monkeypatch.setattr(write_through, "CHUNK", 16)
    assert torch.equal(dequantise(*packed, torch.bfloat16), whole)


def test_the_two_kinds_are_told_apart() -> None:
    rounds: Callable[[str], float] = lambda kind: float(nearest(torch.tensor([17.0]), kind).float())  # noqa: E731
    assert (rounds("int8"), rounds("float8")) == (17.0, 16.0)
