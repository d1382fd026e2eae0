"""Training with W in 8 bits alone, against the same by plain loops: products of those numbers, writes that are rounded
to the nearest, rows that outgrow their scales, and draws where a subnet leaves a place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx import StateError
from losia_fx.method.packing import DTYPES
from losia_fx.method.subnet import draw, draw_all
from losia_fx.runtime import expected
from losia_fx.runtime.quantised_weight import QuantisedWeight
from tests.support.eight_bits import KINDS, trained_by_two
from tests.support.toy_runs import adamw, assert_same, batches, learning, train
from tests.support.toys import Toy, loss_of

LARGEST, ROOM = {"int8": 127.0, "float8": 448.0}, 1.125
PERIOD, FACTOR = 3, 0.25
OPTIONS: dict[str, Any] = {
    "rank_factor": FACTOR, "output_rank_factor": 0.0, "compiler": "eager", "period": PERIOD, "importance": "random",
    "rewarm": False, "keep_dense": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which 8-bit products are fast, so that nothing is said of it."""
    monkeypatch.setattr(expected, "share_of_dense", lambda *_: 0.5)


# -- the same by plain loops ------------------------------------------------------------------------------------------


def table_of(kind: str) -> Tensor:
    """Every number, sorted."""
    if kind == "int8":
        return torch.arange(-127, 128, dtype=torch.float64)
    every = torch.arange(256, dtype=torch.uint8).view(DTYPES[kind]).double()
    return every[every.isfinite()].unique()


def neighbours(x: float, table: Tensor) -> tuple[float, float]:
    at = int(torch.searchsorted(table, torch.tensor(x, dtype=torch.float64), right=True))
    return float(table[max(0, at - 1)]), float(table[min(at, len(table) - 1)])


def nearest(x: float, table: Tensor) -> float:
    below, above = neighbours(x, table)
    return below if x - below < above - x else above


def by_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Numbers, as float32, and scales of the rows of x."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    numbers = x * (LARGEST[kind] / largest)
    numbers = numbers.round() if kind == "int8" else numbers.to(DTYPES[kind])
    return numbers.float(), largest / LARGEST[kind]


class Product(torch.autograd.Function):
    """y = (q s) (Q t)^T, dL/dx = (g t in 8 bits) Q, and the block of dL/dW."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any, values: Tensor) -> Tensor:
        ctx.linear, ctx.x = linear, x
        numbers, scales = by_rows(x, linear.kind)
        return (numbers @ linear.numbers.t()) * scales * linear.scales.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,), linear = grads, ctx.linear
        numbers, scales = by_rows(grad * linear.scales.t(), linear.kind)
        block = grad[..., linear.rows].flatten(0, -2).t() @ ctx.x[..., linear.cols].flatten(0, -2)
        return (numbers @ linear.numbers) * scales, None, block


class Linear(nn.Module):
    """A linear of a W in 8 bits, with its subnet."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        self.kind, self.table = kind, table_of(kind)
        self.numbers, self.scales = by_rows(weight.detach(), kind)
        self.grown = self.anew = 0
        self.rows = self.cols = torch.arange(0)

    def put(self, rows: Tensor, cols: Tensor) -> None:
        self.rows, self.cols = rows, cols
        self.values = nn.Parameter((self.numbers * self.scales)[rows][:, cols])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Product.apply(x, self, self.values)  # type: ignore[no-untyped-call]
        return y

    def write(self, noise: Tensor | None = None) -> None:
        for i, row in enumerate(self.rows.tolist()):
            values = self.values.detach()[i]
            if float(values.abs().max()) > float(LARGEST[self.kind] * self.scales[row]):
                before = float(self.scales[row])
                self.scales[row] = values.abs().max() * (ROOM / LARGEST[self.kind])
                for col in range(self.numbers.shape[1]):
                    x = float(self.numbers[row, col]) * before / float(self.scales[row])
                    self.anew += nearest(x, self.table) != float(self.numbers[row, col])
                    self.numbers[row, col] = nearest(x, self.table)
                self.grown += 1
            for j, col in enumerate(self.cols.tolist()):
                x = float(values[j]) / float(self.scales[row])
                if noise is None:
                    self.numbers[row, col] = nearest(x, self.table)
                else:
                    below, above = neighbours(x, self.table)
                    up = above > below and float(noise[i, j]) < (x - below) / (above - below)
                    self.numbers[row, col] = above if up else below


def replaced(model: nn.Module, kind: str) -> dict[str, Linear]:
    """Exchanges the linears of the blocks; by the names of their weights."""
    found = {}
    for name, module in list(model.named_modules()):
        if name.startswith("layers") and isinstance(module, nn.Linear):
            parent, _, key = name.rpartition(".")
            found[f"{name}.weight"] = Linear(module.weight, kind)
            setattr(model.get_submodule(parent), key, found[f"{name}.weight"])
    return found


def drawn_places(schedule: str, linears: list[Linear], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    shapes = [tuple(linear.numbers.shape) for linear in linears]
    sizes = [(int(FACTOR * out), int(FACTOR * into)) for out, into in shapes]
    if schedule == "all":
        return draw_all(shapes, sizes, generator, torch.device("cpu"))
    return [draw(shape, size, generator) for shape, size in zip(shapes, sizes, strict=True)]


def leave(linears: list[Linear], generator: torch.Generator) -> None:
    seed = int(torch.randint(2**62, (1,), generator=generator))
    sizes = [linear.values.numel() for linear in linears]
    noise = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed)).split(sizes)
    for linear, part in zip(linears, noise, strict=True):
        linear.write(part.view_as(linear.values))


@pytest.mark.parametrize("schedule", ["async", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_of_plain_loops(kind: str, schedule: str) -> None:
    """Over two rounds of re-selections, at a rate at which rows outgrow their scales."""
    torch.manual_seed(1)
    plain = Toy(width=16, inner=32)
    model = losia_fx.transform(copy.deepcopy(plain), **OPTIONS, frozen_products=kind, schedule=schedule, seed=4)
    linears, rate = replaced(plain, kind), 2.0
    generator = torch.Generator().manual_seed(4)
    for state in losia_fx.controller(model).states:
        linears[state.name].put(*draw(state.shape, state.size, generator))
    groups = losia_fx.controller(model).groups
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    due = 0
    for step, ids in enumerate(batches(4 * PERIOD + 1, size=2)):
        loss, mine = loss_of(plain, ids), loss_of(model, ids)
        assert mine.item() == pytest.approx(loss.item(), rel=1e-5), step
        loss.backward()
        mine.backward()
        optimizer.step()
        optimizer.zero_grad()
        for linear in linears.values():
            assert linear.values.grad is not None
            linear.values.data.sub_(linear.values.grad, alpha=rate)
            linear.values.grad = None
            linear.write()
        if (step + 1) % PERIOD == 0:
            turn = [name for names in groups for name in names] if schedule == "all" else groups[due % len(groups)]
            moving = [linears[name] for name in turn]
            places = drawn_places(schedule, moving, generator)
            leave(moving, generator)
            for linear, place in zip(moving, places, strict=True):
                linear.put(*place)
            due += 1
        assert_equal(model, linears, step)
    assert sum(linear.grown for linear in linears.values()) > 5
    assert sum(linear.anew for linear in linears.values()) > 50
    assert len(losia_fx.controller(model).history) == due == 4


def assert_equal(model: nn.Module, linears: dict[str, Linear], step: int) -> None:
    for state in losia_fx.controller(model).states:
        found, wanted = state.stored, linears[state.name]
        assert isinstance(found, QuantisedWeight)
        assert torch.equal(state.rows, wanted.rows), (step, state.name)
        assert torch.equal(found.numbers.float(), wanted.numbers), (step, state.name)
        torch.testing.assert_close(found.scales, wanted.scales, rtol=1e-6, atol=0)
        torch.testing.assert_close(state.values.detach(), wanted.values.detach(), rtol=1e-4, atol=1e-6)


# -- what goes on, and what it learns ----------------------------------------------------------------------------------


def made(dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    given = {**OPTIONS, "frozen_products": "int8", "importance": "mixed", "rewarm": True, **options}
    return losia_fx.transform(Toy(width=16, inner=32).to(dtype), **given)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("cut", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_bit(kind: str, dtype: torch.dtype, cut: int, weights_first: bool) -> None:
    """In a slot, at its edge, and after re-selections: from dense weights and scales, in either order, into a model
    that has been trained otherwise."""
    options: dict[str, Any] = {"frozen_products": kind, "schedule": "all" if cut == 8 else "async"}
    steps, whole = batches(13), made(dtype, **options)
    optimizer = torch.optim.Adam(learning(whole), lr=0.1)  # rows outgrow their scales
    train(whole, optimizer, steps[:cut])
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), losia_fx.state_dict(whole)))
    train(whole, optimizer, steps[cut:])

    resumed = made(dtype, seed=2, **options)
    train(resumed, adamw(learning(resumed)), steps[:4])
    continued = torch.optim.Adam(learning(resumed), lr=0.1)
    continued.load_state_dict(saved[1])
    if weights_first:
        resumed.load_state_dict(saved[0])
    losia_fx.load_state_dict(resumed, saved[2])
    if not weights_first:
        resumed.load_state_dict(saved[0])
    train(resumed, continued, steps[cut:])
    assert_same(whole, resumed)
    for one, other in zip(losia_fx.controller(whole).states, losia_fx.controller(resumed).states, strict=True):
        assert one.stored is not None
        assert other.stored is not None
        assert torch.equal(one.stored.numbers.view(torch.uint8), other.stored.numbers.view(torch.uint8))
        assert torch.equal(one.stored.scales, other.stored.scales)
    assert losia_fx.controller(resumed).history


@pytest.mark.parametrize("period", [1, 4])
def test_updates_that_no_number_tells_apart_add_up(period: int) -> None:
    """A tenth of the distance of two numbers a step, into one direction, while subnets move: rounded to the nearest,
    nothing would ever be learnt of them."""
    model = made(torch.float32, schedule="all", importance="random", period=period, rank_factor=0.5, rewarm=False)
    states = losia_fx.controller(model).states
    optimizer = torch.optim.SGD(learning(model), lr=1.0)
    before = {state: state.weight.dense() for state in states if state.stored is not None}  # type: ignore[operator]
    scales = {state: state.stored.scales.clone() for state in states if state.stored is not None}
    steps = 80
    for ids in batches(steps, size=1):
        loss_of(model, ids).backward()
        for state in states:
            assert state.stored is not None
            room = 0.8 * 127 * scales[state][state.rows] - state.values.detach().abs()
            state.values.grad = -0.1 * scales[state][state.rows] * (room > 0)
        optimizer.step()
        optimizer.zero_grad()
    moved, asked = 0.0, 0.0
    for state, start in before.items():
        inside = start.abs() < 0.6 * 127 * scales[state]
        moved += float((((state.weight.dense() - start) / scales[state]) * inside).sum())  # type: ignore[operator]
        asked += 0.1 * steps * 0.25 * float(inside.sum())  # half of the rows and half of the columns at a time
    assert moved == pytest.approx(asked, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_goes_down_as_it_does_with_dense_weights(kind: str) -> None:
    ends = []
    for keep_dense in (True, False):
        model = made(frozen_products=kind, period=5, keep_dense=keep_dense)
        optimizer = torch.optim.AdamW(learning(model), lr=2e-2)
        ids, losses = batches(1)[0], []
        for _ in range(30):
            loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends.append(losses[0] - losses[-1])
    assert ends[0] > 0.5
    assert abs(ends[1] - ends[0]) <= 0.05 * ends[0]


TWO = """
from tests.truth.test_keep_dense import made
model = made(seed=1 + rank, period=4)
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DistributedDataParallel: the ranks agree to the bit, their draws too, and nearly with one process."""
    first, second = trained_by_two(TWO, tmp_path)
    one = made(period=4)
    train(one, adamw(learning(one)), batches(9), clip=None)
    for name, value in one.state_dict().items():
        assert torch.equal(first[0][name], second[0][name]), name
        assert torch.allclose(first[0][name], value, rtol=0.01, atol=6e-3), name
    assert first[1].keys() == second[1].keys()
    for name, entry in first[1].items():
        assert not isinstance(entry, Tensor) or torch.equal(entry, second[1][name]) or "importance" in name, name
    assert len(first[1]["history"]) == len(losia_fx.controller(one).history) == 2


@pytest.mark.usefixtures("one_process")
def test_sharded_it_is_refused_by_name() -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = made()
    for module in (*model.layers, model):
        fully_shard(module)
    with pytest.raises(StateError, match="frozen_products='int8' and a model that fully_shard has sharded"):
        loss_of(model, batches(1)[0])
