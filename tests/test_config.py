"""Options: every wrong value answers with its name, and patterns match what they say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import losia_fx
from losia_fx import ConfigError, LosiaConfig
from losia_fx.config import matches, subnet_size

DEFAULTS = {
    "rank_factor": 0.125,
    "output_rank_factor": 0.125,
    "period": 50,
    "schedule": "async",
    "importance": "mixed",
    "beta1": 0.85,
    "beta2": 0.85,
    "rewarm": True,
    "target": None,
    "exclude": (),
    "trainable": (),
    "seed": 0,
    "compiler": "inductor",
    "train_tied_head": False,
    "profile_steps": None,
    "track_delta": False,
    "rewarm_steps": None,
    "head_rows": "importance",
    "count_steps": None,
    "carry_moments": False,
    "frozen_products": None,
    "head_period": None,
    "keep_dense": True,
}


def test_the_defaults_are_those_of_the_method() -> None:
    assert dataclasses.asdict(LosiaConfig()) == DEFAULTS


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LosiaConfig().period = 3  # type: ignore[misc]


WRONG: dict[str, list[Any]] = {
    "rank_factor": [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, "0.1", None, True, [0.1]],
    "output_rank_factor": [-0.01, 1.1, math.nan, "1", None, False],
    "period": [0, -1, 1.5, 2.0, "50", None, True, math.inf],
    "schedule": ["", "asinc", "Async", None, 1],
    "importance": ["", "mixedd", None, 2],
    "beta1": [-0.1, 1, 1.0, math.nan, "0.85", None, True],
    "beta2": [-0.1, 1, 1.0, math.nan, "0.85", None, True],
    "rewarm": [0, 1, None, "yes", 2],
    "train_tied_head": [0, None, "no"],
    "track_delta": [1, None, "yes"],
    "target": [("",), (1,), ("a", None)],
    "exclude": [None, ("",), (1,)],
    "trainable": [None, ("",), (b"a",)],
    "seed": [-1, 1.0, "0", None, True],
    "compiler": ["", "gcc", None, 3],
    "rewarm_steps": [0, -1, True, 2.5, "3"],
    "head_rows": ["", "often", None, 1],
    "count_steps": [0, -1, False, 1.0, "3"],
    "carry_moments": [0, None, "yes"],
    "frozen_products": ["", "int4", 8, True],
    "head_period": [0, -1, True, 2.5, "3"],
    "keep_dense": [0, 1, None, "no"],
    "profile_steps": [0, -1, 51, True, False, 2.5, 3.0, "3", math.inf],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        LosiaConfig(**{option: value})
    assert option in str(caught.value)
    if not isinstance(value, tuple):
        assert repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_options_that_say_nothing_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rewarm_steps=3: with rewarm=False nothing is rewarmed"):
        LosiaConfig(rewarm=False, rewarm_steps=3)
    with pytest.raises(ConfigError, match=r'count_steps=3: only head_rows="frequent" counts'):
        LosiaConfig(count_steps=3)
    with pytest.raises(ConfigError, match="keep_dense=False and frozen_products=None"):
        LosiaConfig(keep_dense=False)
    with pytest.raises(ConfigError, match="keep_dense=False and track_delta=True"):
        LosiaConfig(keep_dense=False, frozen_products="int8", track_delta=True)


@pytest.mark.parametrize("how", ["importance", "random", "fixed", "frequent"])
def test_roaming_takes_another_head(how: str) -> None:
    config = LosiaConfig.roaming(head_rows=how)
    assert (config.head_rows, config.count_steps, config.head_period) == (how, None, 50)
    assert not config.profiles
    if how != "frequent":
        with pytest.raises(ConfigError, match="count_steps=20: only"):
            LosiaConfig.roaming(head_rows=how, count_steps=20)
    assert LosiaConfig.of(LosiaConfig(rewarm_steps=5), {"rewarm": False}).rewarm_steps is None


def test_roaming_is_one_word_for_several_options() -> None:
    config = LosiaConfig.roaming(rank_factor=0.25)
    own = {"schedule": "all", "importance": "random", "period": 1}
    head = {"head_rows": "mixed", "head_period": 50, "profile_steps": 10}
    assert dataclasses.asdict(config) == {**DEFAULTS, **own, **head, "rank_factor": 0.25}
    assert config.profiles
    assert LosiaConfig.roaming(period=10, rewarm_steps=2).period == 10
    with pytest.raises(ConfigError, match="did you mean 'period'"):
        LosiaConfig.roaming(perod=2)


@pytest.mark.parametrize(
    ("options", "measured"),
    [({"head_period": 5}, None), ({"head_period": None}, None), ({"head_period": 10}, 10), ({"period": 20}, 10)],
)
def test_steps_that_a_shorter_slot_has_not_are_asked_of_nobody(options: dict[str, Any], measured: int | None) -> None:
    """LosiaConfig.roaming(head_period=5) was refused for a profile_steps=10 that nobody gave."""
    assert LosiaConfig.roaming(**options).profile_steps == measured
    assert LosiaConfig.of(LosiaConfig.roaming(), options).profile_steps == measured
    assert LosiaConfig.of(LosiaConfig.roaming(), {"schedule": "async"}).profile_steps is None
    with pytest.raises(
        ConfigError, match="profile_steps=6: give a whole number of at least 1 and at most the period, 5"
    ):
        LosiaConfig.roaming(head_period=5, profile_steps=6)


def test_roaming_in_turn_has_no_pace_of_the_head_that_nobody_asked_for() -> None:
    config = LosiaConfig.roaming(schedule="async", period=5)
    assert (config.head_period, config.profile_steps, config.head_rows) == (None, None, "mixed")
    assert LosiaConfig.of(LosiaConfig.roaming(period=10), {"schedule": "sync"}).head_period is None


@pytest.mark.parametrize("schedule", ["async", "sync", "static"])
def test_a_pace_of_the_head_is_refused_where_groups_take_turns(schedule: str) -> None:
    with pytest.raises(ConfigError, match=rf"head_period=7: with schedule='{schedule}' the groups take turns"):
        LosiaConfig(schedule=schedule, head_period=7)


def test_a_slot_of_the_head_may_be_longer_than_the_others() -> None:
    assert LosiaConfig(schedule="all", period=2, head_period=9, profile_steps=9).profile_steps == 9
    with pytest.raises(
        ConfigError, match="profile_steps=10: give a whole number of at least 1 and at most the period, 9"
    ):
        LosiaConfig(schedule="all", period=2, head_period=9, profile_steps=10)


@pytest.mark.parametrize(
    ("options", "others", "head"),
    [
        ({}, "mixed", "mixed"),
        ({"importance": "random"}, None, None),
        ({"importance": "random", "head_rows": "second"}, None, "second"),
        ({"importance": "visits", "head_rows": "first"}, "visits", "first"),
        ({"importance": "visits"}, "visits", "visits"),
        ({"head_rows": "frequent"}, "mixed", None),
        ({"head_rows": "random"}, "mixed", None),
        ({"schedule": "static", "head_rows": "mixed"}, None, None),
    ],
)
def test_what_a_slot_measures(options: dict[str, Any], others: str | None, head: str | None) -> None:
    config = LosiaConfig(**options)
    assert (config.scored_by(False), config.scored_by(True)) == (others, head)
    assert config.profiles == (others is not None or head is not None)


def test_profile_steps_fit_into_the_period() -> None:
    assert LosiaConfig(period=7, profile_steps=7).profile_steps == 7
    assert LosiaConfig(period=7, profile_steps=1).profile_steps == 1
    with pytest.raises(ConfigError, match=r"profile_steps=8: .*at least 1 and at most the period, 7"):
        LosiaConfig(period=7, profile_steps=8)
    with pytest.raises(ConfigError, match="profile_steps"):
        LosiaConfig.of(LosiaConfig(profile_steps=20), {"period": 10})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("schedule", []),
        ("schedule", {}),
        ("compiler", []),
        *[(option, 3) for option in ("target", "exclude", "trainable")],
    ],
)
def test_a_wrong_value_of_an_odd_type_is_named_too(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        LosiaConfig(**{option: value})


@pytest.mark.parametrize("option", ["rank_factor", "period", "schedule", "compiler", "trainable"])
def test_a_misspelt_option_gets_a_suggestion(option: str) -> None:
    for wrong in (option[:-1], option + "s", option[0] + option[2:]):
        with pytest.raises(ConfigError) as caught:
            LosiaConfig.of(None, {wrong: 1})
        assert repr(wrong) in str(caught.value)
        assert repr(option) in str(caught.value)


def test_an_option_far_from_all_lists_them() -> None:
    with pytest.raises(ConfigError) as caught:
        LosiaConfig.of(None, {"zzzzzz": 1})
    assert all(name in str(caught.value) for name in DEFAULTS)


def test_options_go_on_top_of_a_config() -> None:
    base = LosiaConfig(period=7, seed=3)
    assert LosiaConfig.of(base, {"seed": 4}) == LosiaConfig(period=7, seed=4)
    assert LosiaConfig.of(base, {}) == base
    assert base.seed == 3
    with pytest.raises(ConfigError, match="seed"):
        LosiaConfig.of(base, {"seed": -4})


@given(
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
    st.integers(1, 10**9),
    st.sampled_from(["async", "sync", "static"]),
    st.sampled_from(["mixed", "first", "second", "gradient", "random"]),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_right_values_are_kept(
    rank: float, output: float, period: int, schedule: str, importance: str, beta: float, rewarm: bool, seed: int
) -> None:
    config = LosiaConfig(rank, output, period, schedule, importance, beta, beta, rewarm, seed=seed)
    assert (config.rank_factor, config.output_rank_factor, config.period) == (rank, output, period)
    assert (config.schedule, config.importance, config.rewarm, config.seed) == (schedule, importance, rewarm, seed)
    assert config.profiles == (schedule != "static" and importance != "random")


def test_one_pattern_or_several() -> None:
    assert LosiaConfig(target="a").target == ("a",)
    assert LosiaConfig(target=["a", "b"]).target == ("a", "b")  # type: ignore[arg-type]
    assert hash(LosiaConfig(exclude=["a"])) == hash(LosiaConfig(exclude=("a",)))  # type: ignore[arg-type]


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**6))
def test_a_subnet_is_the_floor_and_at_least_one(factor: float, size: int) -> None:
    count = subnet_size(factor, size)
    assert count == max(1, math.floor(factor * size))
    assert 1 <= count <= size


@pytest.mark.parametrize(
    ("factor", "size", "count"), [(1 / 8, 4096, 512), (1 / 8, 11008, 1376), (1 / 8, 7, 1), (1, 9, 9)]
)
def test_sizes(factor: float, size: int, count: int) -> None:
    assert subnet_size(factor, size) == count


NAME = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("q_proj", True),
        ("self_attn", True),
        ("layers.10", True),
        ("layers", True),
        ("model", True),
        (NAME, True),
        ("*", True),
        ("*q_proj", True),
        ("q_*", True),
        ("layers.1[0-2]", True),
        ("layers.??", True),
        ("layers.*.self_attn", True),
        ("layers.1", False),
        ("layers.?", False),
        ("proj", False),
        ("attn", False),
        ("k_proj", False),
        ("Q_proj", False),
        ("10.q_proj", False),
        ("layers.10.self", False),
    ],
)
def test_patterns(pattern: str, hit: bool) -> None:
    assert matches(NAME, (pattern,)) == (pattern if hit else None)


def test_the_first_pattern_that_matches_is_the_answer() -> None:
    assert matches(NAME, ("k_proj", "layers.10", "q_proj")) == "layers.10"
    assert matches(NAME, ()) is None


parts = st.text("abc01_", min_size=1, max_size=4)


@given(st.lists(parts, min_size=1, max_size=5), st.data())
def test_any_run_of_whole_parts_is_a_pattern(names: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(names) - 1))
    end = data.draw(st.integers(start + 1, len(names)))
    assert matches(".".join(names), (".".join(names[start:end]),)) is not None


@given(st.lists(parts, min_size=1, max_size=5), parts)
def test_a_name_without_wildcards_matches_whole_parts_only(names: list[str], pattern: str) -> None:
    assert (matches(".".join(names), (pattern,)) is not None) == (pattern in names)


def test_the_public_names() -> None:
    promised = {"transform", "restore", "LosiaConfig", "subnets", "controller", "report"}
    assert promised <= set(losia_fx.__all__)
    assert all(getattr(losia_fx, name) is not None for name in losia_fx.__all__)
