"""The arguments that the commands share which look at a model under LoSiA."""

from __future__ import annotations

import argparse

from losia_fx.config import COMPILERS, LosiaConfig


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a transformers checkpoint, a config.json, or module:function that returns a model and inputs "
        "(default: the embedded Llama)",
    )
    method = parser.add_argument_group("LoSiA")
    method.add_argument("--rank-factor", type=float, default=0.125, help="default: %(default)s")
    method.add_argument(
        "--compiler", choices=COMPILERS, default="inductor", help="whose forward and backward (default: %(default)s)"
    )


def config_of(args: argparse.Namespace) -> LosiaConfig:
    """Raises ConfigError for a value that cannot be."""
    return LosiaConfig(rank_factor=args.rank_factor, compiler=args.compiler)
