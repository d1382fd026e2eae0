"""The selections against what losia.md says, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from losia_fx.method.selection import select_experts, select_rows, select_subnet, share_moved, top

Array = np.ndarray[Any, np.dtype[Any]]

# Whole numbers: sums are exact in float32 whatever their order, and ties are many.
whole = st.integers(0, 6).map(float)


@st.composite
def scores(draw: st.DrawFn) -> tuple[Array, int, int]:
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    score = draw(hnp.arrays(np.float32, shape, elements=whole))
    return score, draw(st.integers(1, shape[0])), draw(st.integers(1, shape[1]))


# -- the same, written from losia.md alone -------------------------------------------------------------------------


def brute_top(sums: Array, count: int) -> list[int]:
    return sorted(sorted(range(len(sums)), key=lambda i: (-sums[i], i))[:count])


def brute_candidates(score: Array, rows: int, cols: int) -> list[tuple[list[int], list[int]]]:
    by_rows, by_cols = brute_top(score.sum(1), rows), brute_top(score.sum(0), cols)
    return [
        (by_rows, by_cols),
        (by_rows, brute_top(score[by_rows].sum(0), cols)),
        (brute_top(score[:, by_cols].sum(1), rows), by_cols),
    ]


def brute_subnet(score: Array, rows: int, cols: int) -> tuple[list[int], list[int], float]:
    best: tuple[list[int], list[int], float] | None = None
    for r, c in brute_candidates(score, rows, cols):
        inside = float(score[np.ix_(r, c)].sum())
        if best is None or inside > best[2]:  # the first of equals
            best = (r, c, inside)
    assert best is not None
    return best


# -- selection -----------------------------------------------------------------------------------------------------


@given(st.lists(whole, min_size=1, max_size=40), st.data())
def test_top(sums: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sums)))
    chosen = top(torch.tensor(sums), count)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == brute_top(np.array(sums), count)


@given(st.integers(1, 5000), st.data())
@settings(max_examples=25)
def test_top_of_equals_is_the_lowest_indices(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    assert top(torch.ones(size), count).tolist() == list(range(count))


@given(scores())
@settings(max_examples=300)
def test_select_subnet(case: tuple[Array, int, int]) -> None:
    score, rows, cols = case
    chosen = select_subnet(torch.from_numpy(score), rows, cols)
    expected = brute_subnet(score, rows, cols)
    assert (chosen.rows.tolist(), chosen.cols.tolist(), float(chosen.captured)) == expected
    for index, count, size in ((chosen.rows, rows, score.shape[0]), (chosen.cols, cols, score.shape[1])):
        listed = index.tolist()
        assert index.dtype == torch.int64
        assert listed == sorted(set(listed))
        assert len(listed) == count
        assert 0 <= listed[0] <= listed[-1] < size
    assert all(float(chosen.captured) >= score[np.ix_(r, c)].sum() for r, c in brute_candidates(score, rows, cols))


def test_each_candidate_wins_somewhere() -> None:
    """Or the test above might compare one branch with itself."""
    generator = np.random.default_rng(0)
    winners = set()
    for _ in range(400):
        score = generator.integers(0, 7, (5, 5)).astype(np.float32)
        sums = [score[np.ix_(r, c)].sum() for r, c in brute_candidates(score, 2, 2)]
        winners.add(int(np.argmax(sums)))
        assert float(select_subnet(torch.from_numpy(score), 2, 2).captured) == max(sums)
    assert winners == {0, 1, 2}


@given(st.integers(1, 4), st.data())
def test_select_experts(experts: int, data: st.DataObject) -> None:
    """Each as by itself; one that saw no token keeps what it had."""
    shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    score = data.draw(hnp.arrays(np.float32, (experts, *shape), elements=whole))
    idle = data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    score[idle] = 0
    size = [data.draw(st.integers(1, count)) for count in shape]
    old = [torch.stack([torch.randperm(n)[:k].sort().values for _ in range(experts)])
           for n, k in zip(shape, size, strict=True)]  # fmt: skip
    chosen = select_experts(torch.from_numpy(score), (old[0], old[1]))
    captured = 0.0
    for expert, part in enumerate(score):
        if part.any():
            rows, cols, inside = brute_subnet(part, *size)
            captured += inside
        else:
            rows, cols = old[0][expert].tolist(), old[1][expert].tolist()
        assert chosen.rows[expert].tolist() == rows
        assert chosen.cols[expert].tolist() == cols
    assert chosen.captured.shape == ()
    assert float(chosen.captured) == captured


@given(scores())
def test_select_rows(case: tuple[Array, int, int]) -> None:
    score, rows, _ = case
    chosen = select_rows(torch.from_numpy(score), rows)
    assert chosen.rows.tolist() == brute_top(score.sum(1), rows)
    assert chosen.cols.tolist() == list(range(score.shape[1]))
    assert float(chosen.captured) == score[chosen.rows.tolist()].sum()


@given(scores(), st.randoms(use_true_random=False))
def test_share_moved(case: tuple[Array, int, int], random: Any) -> None:
    score, rows, cols = case
    out, into = score.shape
    old, new = ((sorted(random.sample(range(out), rows)), sorted(random.sample(range(into), cols))) for _ in range(2))
    before = {(r, c) for r in old[0] for c in old[1]}
    after = {(r, c) for r in new[0] for c in new[1]}
    moved = share_moved(*((torch.tensor(r), torch.tensor(c)) for r, c in (old, new)))
    assert moved.shape == ()
    assert float(moved) == pytest.approx(len(after - before) / len(after))


def test_share_moved_of_experts_is_the_mean() -> None:
    old = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 4], [1, 2]])
    new = torch.tensor([[0, 1], [0, 3]]), torch.tensor([[0, 4], [0, 2]])
    assert float(share_moved(old, new)) == pytest.approx((0 + 3 / 4) / 2)
    assert float(share_moved(old, old)) == 0.0
