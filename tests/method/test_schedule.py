"""What happens at which optimizer step, as tables (T = 2, L = 3 unless said otherwise)."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losia_fx import LosiaConfig
from losia_fx.method.schedule import (
    checked_steps,
    chosen_apart,
    ends_slot,
    profiled_groups,
    reselecting_groups,
    rewarm_factor,
    round_length,
    slot_groups,
)

Groups = tuple[int, ...]


def config(schedule: str = "async", period: int = 2, rewarm: bool = True) -> LosiaConfig:
    return LosiaConfig(schedule=schedule, period=period, rewarm=rewarm)


TABLE = [
    # t, async, sync, static, last of its slot
    (0, (0,), (0, 1, 2), (), False),
    (1, (0,), (0, 1, 2), (), True),
    (2, (1,), (), (), False),
    (3, (1,), (), (), True),
    (4, (2,), (), (), False),
    (5, (2,), (), (), True),
    (6, (0,), (0, 1, 2), (), False),
    (7, (0,), (0, 1, 2), (), True),
    (8, (1,), (), (), False),
]


@pytest.mark.parametrize(("step", "asynchronous", "synchronous", "static", "last"), TABLE)
def test_the_schedules(
    step: int, asynchronous: tuple[int, ...], synchronous: tuple[int, ...], static: tuple[int, ...], last: bool
) -> None:
    assert profiled_groups(config("async"), 3, step) == asynchronous
    assert profiled_groups(config("sync"), 3, step) == synchronous
    assert profiled_groups(config("static"), 3, step) == static
    assert ends_slot(config(), step) == last


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 10**7))
def test_the_formula_of_the_paper(period: int, groups: int, step: int) -> None:
    expected = (step // period) % groups
    assert profiled_groups(config("async", period), groups, step) == (expected,)
    assert profiled_groups(config("sync", period), groups, step) == (tuple(range(groups)) if expected == 0 else ())
    assert ends_slot(config(period=period), step) == ((step + 1) % period == 0)


@given(st.integers(1, 30), st.integers(1, 12))
def test_a_round_gives_every_group_one_slot(period: int, groups: int) -> None:
    settings = config("async", period)
    length = round_length(settings, groups)
    assert length == period * groups
    for start in (0, 3 * length):
        ended = [
            profiled_groups(settings, groups, t)[0] for t in range(start, start + length) if ends_slot(settings, t)
        ]
        assert ended == list(range(groups))


WINDOW = [
    # t, its slot's groups, profiled with profile_steps=1, 2, 3 (T = 3, L = 2)
    (0, (0,), (), (), (0,)),
    (1, (0,), (), (0,), (0,)),
    (2, (0,), (0,), (0,), (0,)),
    (3, (1,), (), (), (1,)),
    (4, (1,), (), (1,), (1,)),
    (5, (1,), (1,), (1,), (1,)),
    (6, (0,), (), (), (0,)),
]


@pytest.mark.parametrize(("step", "slot", "one", "two", "three"), WINDOW)
def test_the_last_steps_of_a_slot(step: int, slot: Groups, one: Groups, two: Groups, three: Groups) -> None:
    settings = [LosiaConfig(period=3, profile_steps=count) for count in (1, 2, 3)]
    assert [slot_groups(each, 2, step) for each in settings] == [slot] * 3
    assert [profiled_groups(each, 2, step) for each in settings] == [one, two, three]


@given(
    st.sampled_from(["async", "sync", "static"]),
    st.sampled_from(["mixed", "random"]),
    st.integers(1, 40),
    st.integers(0, 12),
    st.integers(0, 10**6),
    st.data(),
)
def test_profiling_is_the_slot_in_its_last_steps(
    schedule: str, importance: str, period: int, groups: int, step: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, period))
    whole = LosiaConfig(schedule=schedule, importance=importance, period=period)
    part = dataclasses.replace(whole, profile_steps=count)
    assert slot_groups(part, groups, step) == slot_groups(whole, groups, step)
    inside = importance != "random" and step % period >= period - count
    assert profiled_groups(part, groups, step) == (slot_groups(whole, groups, step) if inside else ())
    if count == period:
        assert profiled_groups(part, groups, step) == profiled_groups(whole, groups, step)
    if ends_slot(part, step) and importance != "random":
        assert profiled_groups(part, groups, step) == slot_groups(part, groups, step)


def test_without_groups_nothing_is_profiled() -> None:
    assert profiled_groups(config(), 0, 5) == ()


@pytest.mark.parametrize(
    ("period", "factors"), [(1, [1.0, 1.0]), (2, [0.5, 1.0, 1.0]), (4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])]
)
def test_the_kth_update_counts_k_of_t(period: int, factors: list[float]) -> None:
    assert [rewarm_factor(config(period=period), k) for k in range(1, len(factors) + 1)] == factors


@given(st.integers(1, 100), st.integers(1, 300))
def test_rewarm(period: int, update: int) -> None:
    factor = rewarm_factor(config(period=period), update)
    assert factor == min(1.0, update / period)
    assert 0 < factor <= 1
    assert rewarm_factor(config(period=period, rewarm=False), update) == 1.0


def test_all_groups_have_every_slot() -> None:
    settings = config("all")
    assert [slot_groups(settings, 3, step) for step in range(4)] == [(0, 1, 2)] * 4
    assert [profiled_groups(settings, 3, step) for step in range(4)] == [(0, 1, 2)] * 4
    assert [reselecting_groups(settings, 3, step) for step in range(4)] == [(), (0, 1, 2)] * 2
    assert round_length(settings, 3) == 2
    assert slot_groups(settings, 0, 1) == ()


@pytest.mark.parametrize(
    ("schedule", "rewarm", "steps", "shares"),
    [
        ("async", True, None, [0.5, 1.0, 1.0]),
        ("async", True, 3, [1 / 3, 2 / 3, 1.0]),
        ("async", False, None, [1.0, 1.0, 1.0]),
        ("all", True, None, [1.0, 1.0, 1.0]),
        ("all", True, 2, [0.5, 1.0, 1.0]),
    ],
)
def test_rewarming_has_a_length_of_its_own(schedule: str, rewarm: bool, steps: int | None, shares: list[float]) -> None:
    settings = dataclasses.replace(config(schedule, rewarm=rewarm), rewarm_steps=steps)
    assert [rewarm_factor(settings, k) for k in (1, 2, 3)] == pytest.approx(shares)


HEADS = [
    # head_rows, profiled and re-selecting groups of t = 0 to 5 (T = 2, L = 2, async); the head is group 0
    ("importance", [(0,), (0,), (1,), (1,), (0,), (0,)], [(), (0,), (), (1,), (), (0,)]),
    ("random", [(), (), (1,), (1,), (), ()], [(), (0,), (), (1,), (), (0,)]),
    ("fixed", [(), (), (1,), (1,), (), ()], [(), (), (), (1,), (), ()]),
    ("frequent", [(), (), (1,), (1,), (), ()], [(), (0,), (), (1,), (), ()]),
    ("second", [(0,), (0,), (1,), (1,), (0,), (0,)], [(), (0,), (), (1,), (), (0,)]),
]


@pytest.mark.parametrize(("rows", "profiled", "due"), HEADS)
def test_how_the_head_is_chosen_for(rows: str, profiled: list[Groups], due: list[Groups]) -> None:
    settings = LosiaConfig(period=2, head_rows=rows)
    assert [profiled_groups(settings, 2, step, 0) for step in range(6)] == profiled
    assert [reselecting_groups(settings, 2, step, 0) for step in range(6)] == due


def test_the_head_counts_for_as_long_as_it_is_told_whatever_the_schedule() -> None:
    for schedule in ("async", "all", "static"):
        settings = LosiaConfig(schedule=schedule, period=2, head_rows="frequent", count_steps=3)
        moves = [step for step in range(8) if 0 in reselecting_groups(settings, 2, step, 0)]
        assert moves == [2], schedule
    assert not any(0 in reselecting_groups(LosiaConfig(period=1, head_rows="fixed"), 2, step, 0) for step in range(8))


OWN_PACE = [
    # head_rows, importance, profiled and re-selecting groups of t = 0 to 5 (T = 1, of the head 3, L = 2, the last 2)
    ("mixed", "random", [(), (0,), (0,)] * 2, [(1,), (1,), (0, 1)] * 2),
    ("importance", "random", [()] * 6, [(1,), (1,), (0, 1)] * 2),
    ("importance", "first", [(1,), (0, 1), (0, 1)] * 2, [(1,), (1,), (0, 1)] * 2),
    ("first", "visits", [(1,), (0, 1), (0, 1)] * 2, [(1,), (1,), (0, 1)] * 2),
    ("frequent", "first", [(1,)] * 6, [(1,), (1,), (0, 1), (1,), (1,), (1,)]),
    ("fixed", "first", [(1,)] * 6, [(1,)] * 6),
]


@pytest.mark.parametrize(("rows", "importance", "profiled", "due"), OWN_PACE)
def test_a_pace_of_the_head(rows: str, importance: str, profiled: list[Groups], due: list[Groups]) -> None:
    settings = LosiaConfig(
        schedule="all", importance=importance, period=1, head_rows=rows, head_period=3, profile_steps=2
    )
    assert [profiled_groups(settings, 2, step, 0) for step in range(6)] == profiled
    assert [reselecting_groups(settings, 2, step, 0) for step in range(6)] == due


@pytest.mark.parametrize(
    ("rows", "importance", "apart"),
    [
        ("importance", "mixed", False),
        ("mixed", "mixed", False),
        ("mixed", "random", True),
        ("frequent", "mixed", False),
    ],
)
def test_who_is_chosen_for_apart(rows: str, importance: str, apart: bool) -> None:
    assert chosen_apart(LosiaConfig(schedule="all", importance=importance, head_rows=rows)) is apart


@given(st.integers(1, 60))
def test_short_slots_of_all_groups_are_checked_together(period: int) -> None:
    steps = checked_steps(config("all", period))
    assert steps % period == 0
    assert 16 <= steps < 16 + period or steps == period >= 16
    assert checked_steps(config("async", period)) == period
