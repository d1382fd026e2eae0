"""What a step makes the host wait for, by kind, with the model on a device that counts it (tests/device/dry.py).

A wait empties the queue that the host has filled ahead of the device: 20 to 100 us each, and none of them overlaps.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import losia_fx
from losia_fx.method.transfers import copies, numbers_of
from tests.device.dry import CASES, DryRun, Waits
from tests.support.table import TOY

NONE: Counter[str] = Counter()
FITS = Counter({"cpu": 1})
"""The numbers of all profiled weights at once."""
MOVES = Counter({"cpu": 1})
"""The numbers of all selections."""
BASE = Counter({"cpu": 2})
"""Their places, and what the weights hold there: where the base is tracked."""


@pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")
@pytest.mark.parametrize(
    ("name", "tracked"),
    [
        ("llama", True),
        ("mixtral", False),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("mixtral", True, marks=pytest.mark.slow),
        pytest.param("vit", False, marks=pytest.mark.slow),
    ],
)
def test_a_round(name: str, tracked: bool, waits: Waits) -> None:
    """Every group in turn, the head and the blocks: what it costs does not depend on how many weights they have."""
    run = DryRun(*CASES[name], period=3, profile_steps=2, track_delta=tracked)
    run.step()  # in which the base is kept, with a few copies a weight
    controller = losia_fx.controller(run.model)
    assert len({len(group) for group in controller.groups}) > 1 or name == "vit"
    waits.taken()
    for group in range(len(controller.groups)):
        assert controller.step == 3 * group + 1
        found = []
        for micro_batches, set_to_none in ((3, False), (2, True), (2, True)):
            run.step(micro_batches, set_to_none)
            places = list(waits.places)
            found.append((waits.taken(), places))
        expected = [FITS, FITS + MOVES + (BASE if tracked else NONE), NONE]
        for (kinds, places), wanted in zip(found, expected, strict=True):
            assert kinds == wanted, places
    assert len(controller.history) == len(controller.groups)


def test_where_nothing_is_ever_profiled(waits: Waits) -> None:
    run = DryRun(TOY, torch.float32, importance="random", period=2)
    run.step()
    waits.taken()
    run.step(2)
    assert waits.taken() == MOVES, waits.places
    run.step(2)
    assert waits.taken() == NONE


def test_all_groups_at_once_ask_once_for_their_fits(waits: Waits) -> None:
    run = DryRun(TOY, torch.float32, schedule="sync", period=3)
    run.step()
    waits.taken()
    run.step()
    assert waits.taken() == FITS
    run.step()
    groups = len(losia_fx.controller(run.model).groups)
    assert waits.taken() == FITS + Counter({"cpu": groups * MOVES["cpu"]})


def test_the_counter_counts(waits: Waits) -> None:
    """Or it would find nothing anywhere."""
    x, mask, one = (torch.ones(size, dtype=dtype, device="meta") for size, dtype in SAMPLES)
    x.sum().item(), float(x.sum()), int(x.sum()), x.tolist(), x.cpu(), x.to("cpu"), x[mask]
    x.nonzero(), torch.unique(x), x.nanmedian(), torch.equal(x, x), torch.ones(3).to("meta")
    torch.tensor(1.0, device="meta"), x.copy_(torch.ones(3))
    if x.any():
        x.to("cpu", non_blocking=True)
    with pytest.raises(RuntimeError, match="item"):
        x[one]  # torch reads it in a place that cannot be patched
    seen = "item __float__ __int__ tolist cpu nonzero unique nanmedian equal __bool__ mask tensor copy_".split()
    assert waits.taken().keys() == {*seen, "to cpu", "to meta"}


SAMPLES = (((3,), torch.float32), ((3,), torch.bool), ((), torch.int64))


def test_copies_are_transferred_together(waits: Waits) -> None:
    shapes = (((2,), torch.float32), ((1, 3), torch.int64), ((0,), torch.float32))
    parts = [torch.ones(size, dtype=dtype, device="meta") for size, dtype in shapes]
    found = copies(parts)
    assert waits.taken() == Counter({"cpu": 2})
    assert [(copy.shape, copy.dtype, copy.device.type) for copy in found] == [(p.shape, p.dtype, "cpu") for p in parts]


def test_copies_are_copies() -> None:
    """Nobody else's memory, in the order and the shape they were given, and to the bit."""
    given = [torch.randn(2, 3), torch.arange(4), torch.randn(()), torch.tensor([[float("nan"), -0.0]]), torch.arange(0)]
    found = copies(given)
    for copy, tensor in zip(found, given, strict=True):
        assert copy.dtype == tensor.dtype
        torch.testing.assert_close(copy, tensor, rtol=0, atol=0, equal_nan=True)
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not tensor.numel()
        assert copy.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert numbers_of([torch.tensor([1.0, 2.5]), torch.tensor([3.0])]) == [[1.0, 2.5], [3.0]]
    assert copies([]) == []
