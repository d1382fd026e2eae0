"""The options of LosiaConfig as arguments of a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from losia_fx.config import BY_SUMS, IMPORTANCES, SCHEDULES, LosiaConfig

AOT_COMPILERS = ("aot_eager", "inductor")
"""Those that say beforehand what they keep for the backward; "eager" keeps what plain autograd does."""


def add_losia_options(
    parser: argparse.ArgumentParser, compilers: Sequence[str] = AOT_COMPILERS, compiler: str = AOT_COMPILERS[0]
) -> None:
    """The options, with the compilers that the command knows and the one that it takes by default."""
    default = LosiaConfig()
    group = parser.add_argument_group("LoSiA", "the options of losia_fx.LosiaConfig")
    for option, kind in (("rank_factor", float), ("output_rank_factor", float), ("period", int), ("seed", int)):
        group.add_argument(_flag(option), type=kind, default=getattr(default, option), help="default: %(default)s")
    group.add_argument(
        "--profile-steps", type=int, metavar="STEPS", help="of a slot, its last, that measure (default: the whole slot)"
    )
    for option, choices in (("schedule", SCHEDULES), ("importance", (*IMPORTANCES, *BY_SUMS))):
        group.add_argument(
            _flag(option), choices=choices, default=getattr(default, option), help="default: %(default)s"
        )
    group.add_argument("--compiler", choices=compilers, default=compiler, help="whose graphs (default: %(default)s)")
    for option, help_text in (
        ("target", "modules whose linears learn (default: every linear inside the blocks, and the head)"),
        ("exclude", "modules that stay as they are"),
        ("trainable", "other parameters to train in full"),
    ):
        group.add_argument(_flag(option), action="append", metavar="PATTERN", help=help_text)
    group.add_argument("--train-tied-head", action="store_true", help="train a head tied to the embedding too")


def config_of(args: argparse.Namespace) -> LosiaConfig:
    """Raises ConfigError, naming the option, for a value that cannot be."""
    given = {field.name: getattr(args, field.name) for field in fields(LosiaConfig) if hasattr(args, field.name)}
    return LosiaConfig(**{name: value for name, value in given.items() if value is not None})


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
