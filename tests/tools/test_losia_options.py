"""LosiaConfig's fields as options: all of them, with the dataclass's own type, default and words."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import pytest

from losia_fx import LosiaConfig
from losia_fx.errors import ConfigError
from losia_fx.tools.losia_options import add_losia_options, config_of

GIVEN: dict[str, tuple[list[str], Any]] = {
    "rank_factor": (["--rank-factor", "0.5"], 0.5),
    "output_rank_factor": (["--output-rank-factor", "0"], 0.0),
    "period": (["--period", "7"], 7),
    "schedule": (["--schedule", "sync"], "sync"),
    "importance": (["--importance", "first"], "first"),
    "beta1": (["--beta1", "0.5"], 0.5),
    "beta2": (["--beta2", "0.25"], 0.25),
    "rewarm": (["--no-rewarm"], False),
    "target": (["--target", "q_proj", "--target", "v_proj"], ("q_proj", "v_proj")),
    "exclude": (["--exclude", "layers.0"], ("layers.0",)),
    "trainable": (["--trainable", "*norm*"], ("*norm*",)),
    "seed": (["--seed", "3"], 3),
    "compiler": (["--compiler", "inductor"], "inductor"),
    "train_tied_head": (["--train-tied-head"], True),
    "profile_steps": (["--profile-steps", "5"], 5),
    "track_delta": (["--track-delta"], True),
    "rewarm_steps": (["--rewarm-steps", "4"], 4),
    "head_rows": (["--head-rows", "random"], "random"),
    "count_steps": (["--count-steps", "9", "--head-rows", "frequent"], 9),
    "carry_moments": (["--carry-moments"], True),
    "frozen_products": (["--frozen-products", "float8"], "float8"),
    "head_period": (["--head-period", "9", "--schedule", "all"], 9),
    "keep_dense": (["--no-keep-dense", "--frozen-products", "int8"], False),
}

BESIDE: dict[str, dict[str, Any]] = {
    "count_steps": {"head_rows": "frequent"},
    "head_period": {"schedule": "all"},
    "keep_dense": {"frozen_products": "int8"},
}
"""Options that another one asks for."""


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser()
    add_losia_options(found)
    return found


def test_nothing_given_is_the_defaults(parser: argparse.ArgumentParser) -> None:
    assert config_of(parser.parse_args([])) == LosiaConfig(compiler="aot_eager")


@pytest.mark.parametrize("option", [field.name for field in fields(LosiaConfig)])
def test_every_field_is_an_option(option: str, parser: argparse.ArgumentParser) -> None:
    argv, value = GIVEN[option]
    made = config_of(parser.parse_args(argv))
    assert made == LosiaConfig(**{"compiler": "aot_eager", **BESIDE.get(option, {}), option: value})
    (action,) = (action for action in parser._actions if action.dest == option)
    assert action.help
    assert "\n" not in action.help


def test_help_is_the_docstrings_first_clause(parser: argparse.ArgumentParser) -> None:
    text = " ".join(parser.format_help().split())
    assert "p, the share of a weight's rows and of its columns that learns (default: 0.125)" in text
    assert "T, the length of a time slot in optimizer steps (default: 50)" in text
    assert "{aot_eager,inductor}" in text


def test_a_value_that_cannot_be_is_named(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(ConfigError, match=r"period=0: give a whole number of at least 1"):
        config_of(parser.parse_args(["--period", "0"]))
