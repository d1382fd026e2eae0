"""Draws a run: loss, learning rate with rewarm, captured importance, subnets over time, coverage of each weight.

    losia-fx plot losia-out --out pictures

RUN is a folder that ``losia-fx finetune`` wrote. The drawing itself is in pictures.py and losia_fx/finetune/plots.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from losia_fx.errors import LosiaError

PICTURES = ("losses", "learning_rate", "importance", "subnets", "moves", "coverage")
FORMATS = ("png", "svg", "pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder that losia-fx finetune wrote")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: RUN)")
    parser.add_argument("--format", choices=FORMATS, default="png", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=PICTURES, metavar="PICTURE", help=f"of {', '.join(PICTURES)}")
    parser.add_argument(
        "--layer", action="append", metavar="PATTERN", help="weights whose moves are drawn (default: of one block)"
    )


def run(args: argparse.Namespace) -> int:
    from .run_folder import read_run

    found = read_run(args.run_folder)
    out = args.run_folder if args.out is None else args.out
    try:
        from .pictures import draw
    except ModuleNotFoundError as error:
        raise LosiaError(f"plot needs {error.name}: install losia-fx[cli]") from None
    if out.exists() and not out.is_dir():
        raise LosiaError(f"--out {out}: is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    for path in draw(found, out, args.only or PICTURES, args.format, args.layer):
        print(path)
    return 0
