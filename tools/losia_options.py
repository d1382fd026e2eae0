"""The options of LosiaConfig as arguments of a command: each field one, as the dataclass has it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any, get_args, get_type_hints

from losia_fx.config import CHOICES, LosiaConfig, described

AOT_COMPILERS = ("aot_eager", "inductor")
"""Those that say beforehand what they keep for the backward; "eager" keeps what plain autograd does."""


def add_losia_options(
    parser: argparse.ArgumentParser, compilers: Sequence[str] = AOT_COMPILERS, compiler: str = AOT_COMPILERS[0]
) -> None:
    """The options, with the compilers that the command knows and the one that it takes by default."""
    group = parser.add_argument_group("LoSiA", "the options of losia_fx.LosiaConfig")
    types, said = get_type_hints(LosiaConfig), described()
    for option in fields(LosiaConfig):
        settings = _settings(option, types[option.name], said.get(option.name, ""))
        if option.name == "compiler":
            settings |= {"choices": compilers, "default": compiler}
        group.add_argument(_flag(option), dest=option.name, **settings)


def config_of(args: argparse.Namespace) -> LosiaConfig:
    """Raises ConfigError, naming the option, for a value that cannot be."""
    given = {field.name: getattr(args, field.name) for field in fields(LosiaConfig)}
    return LosiaConfig(**{name: value for name, value in given.items() if value is not None})


def _settings(option: Field[Any], kind: Any, said: str) -> dict[str, Any]:
    """add_argument's keywords. kind: bool, int, float or str, or one of them or None, or several str."""
    if kind is bool:
        return {"action": "store_false" if option.default else "store_true", "help": said}
    kinds = (kind, *get_args(kind))
    if tuple[str, ...] in kinds:
        return {"action": "append", "metavar": "PATTERN", "help": said}
    word = next(each for each in kinds if each in (int, float, str))
    shown = said if option.default is None else f"{said} (default: %(default)s)"
    return {"type": word, "choices": CHOICES.get(option.name), "default": option.default, "help": shown}


def _flag(option: Field[Any]) -> str:
    """ "--no-..." of what is on by default."""
    return ("--no-" if option.default is True else "--") + option.name.replace("_", "-")
