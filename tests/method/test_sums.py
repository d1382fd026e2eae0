"""Importance by rows and columns, and subnets drawn for many weights at once, against loops over single numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losia_fx.method import sums as module
from losia_fx.method.subnet import draw_all
from losia_fx.method.sums import add_sums, per_visit, select_by_sums, sums_shapes, visit


def in_loops(grads: list[Tensor], factor: float, limit: float | None, beta: float) -> tuple[list[float], list[float]]:
    """Of one matrix: the running means of the sums of its rows and of its columns."""
    rows, cols = [0.0] * grads[0].shape[0], [0.0] * grads[0].shape[1]
    for grad in grads:
        values = [[factor * float(g) for g in line] for line in grad]
        squares = [[v * v if limit is None else min(max(v, -limit), limit) ** 2 for v in line] for line in values]
        for at in range(len(rows)):
            rows[at] = beta * rows[at] + (1 - beta) * sum(squares[at])
        for at in range(len(cols)):
            cols[at] = beta * cols[at] + (1 - beta) * sum(line[at] for line in squares)
    return rows, cols


@pytest.mark.parametrize("lines", [1, 2, 100])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_sums_are_running_means_of_the_squares(
    shape: tuple[int, ...], limit: float | None, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(module.CHUNK, "cpu", lines * torch.Size(shape).numel() // shape[-2])  # so many rows at a time
    grads = [torch.randn(shape) for _ in range(3)]
    found = tuple(torch.zeros(size) for size in sums_shapes(grads[0]))
    for grad in grads:
        add_sums(*found, grad, 0.5, limit, 0.85)
    matrices = [grads] if len(shape) == 2 else [[grad[expert] for grad in grads] for expert in range(shape[0])]
    for expert, mine in enumerate(matrices):
        for sums, expected in zip(found, in_loops(mine, 0.5, limit, 0.85), strict=True):
            torch.testing.assert_close(sums if len(shape) == 2 else sums[expert], torch.tensor(expected))


def test_visits_count_the_places_before_and_the_present_one_of_each_expert() -> None:
    sums, present = torch.tensor([[12.0, 12.0, 12.0], [6.0, 6.0, 6.0]]), torch.tensor([[0, 1], [1, 2]])
    assert per_visit(sums, None, present).tolist() == [[6, 6, 12], [6, 3, 3]]
    before = visit(visit(torch.zeros(2, 3, dtype=torch.int64), present), torch.tensor([[0, 2], [0, 1]]))
    assert before.tolist() == [[2, 1, 1], [1, 2, 1]]
    assert per_visit(sums, before, present).tolist() == [[3, 4, 6], [3, 1.5, 2]]


def test_an_expert_goes_by_its_own_sums_and_one_without_a_token_stays() -> None:
    rows = torch.tensor([[1.0, 4.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [5.0, 1.0, 1.0, 1.0]])
    cols = torch.tensor([[6.0, 3.0, 1.0], [0.0, 0.0, 0.0], [2.0, 2.0, 4.0]])
    old = torch.tensor([[0, 1], [1, 3], [2, 3]]), torch.tensor([[0], [2], [0]])
    selection, total = select_by_sums((rows, cols), (rows, cols), old, whole_cols=False)
    assert selection.rows.tolist() == [[1, 2], [1, 3], [0, 1]]
    assert selection.cols.tolist() == [[0], [2], [2]]
    assert total.item() == 18
    assert selection.captured.item() == pytest.approx((4 + 3) * 6 / 10 + (5 + 1) * 4 / 8)


def test_whole_columns_stay_and_what_they_capture_is_the_rows_own() -> None:
    rows, cols = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([3.0, 5.0])
    selection, total = select_by_sums((rows, cols), (rows, cols), (torch.tensor([0]), torch.arange(2)), whole_cols=True)
    assert (selection.rows.tolist(), selection.cols.tolist()) == ([1], [0, 1])
    assert (selection.captured.item(), total.item()) == (5, 8)


def test_many_are_drawn_at_once_each_by_itself_and_every_index_as_often() -> None:
    shapes, sizes = [(8, 6), (8, 8), (3, 6, 8), (6, 4)], [(2, 3), (2, 2), (3, 2), (2, 4)]
    generator = torch.Generator().manual_seed(0)
    often: list[Tensor] = []
    for _ in range(600):
        drawn = draw_all(shapes, sizes, generator, torch.device("cpu"))
        flat = []
        for (rows, cols), shape, size in zip(drawn, shapes, sizes, strict=True):
            for index, length, count in ((rows, shape[-2], size[0]), (cols, shape[-1], size[1])):
                assert index.shape == (*shape[:-2], count)
                assert (index.diff() > 0).all()  # sorted and distinct
                flat += [torch.bincount(each, minlength=length) / count * length for each in index.view(-1, count)]
        often.append(torch.cat(flat))
    mean = torch.stack(often).mean(0)
    assert (mean - 1).abs().max() < 0.25
    assert (mean[-4:] == 1).all()  # the last one's columns learn whole
    first, second = (torch.stack(often)[:, part] for part in (slice(0, 8), slice(14, 22)))  # two of one length
    assert not torch.equal(first, second)
