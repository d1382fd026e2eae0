"""Shows a delta file, applies it to a checkpoint, takes it off again, or turns it into a LoRA adapter.

The work is in show.py and convert.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from losia_fx.errors import ConfigError, LosiaError
from losia_fx.storage.checkpoint_folder import check_output

ACTIONS = {
    "show": "what the file changes, weight by weight",
    "apply": "the base checkpoint with the changes, as a checkpoint of its own",
    "undo": "the tuned checkpoint without the changes: the base again, to the bit",
    "export": "the changes as a LoRA adapter in PEFT's format, and what its rank loses",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action", dest="action")
    for name, summary in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("file", type=Path, metavar="FILE", help="delta file")
        if name == "show":
            continue
        action.add_argument("--model", type=Path, required=True, help="folder of a transformers checkpoint")
        action.add_argument("--out", type=Path, required=True, help="folder to write")
        action.add_argument("--overwrite", action="store_true", help="write into --out though it is not empty")
        if name == "export":
            action.add_argument("--rank", type=int, required=True, help="of the adapter")


def run(args: argparse.Namespace) -> int:
    if args.action == "show":
        from .show import show

        show(args.file)
        return 0
    check_output(args.out, args.model, args.overwrite)
    if args.action == "export" and args.rank < 1:
        raise ConfigError(f"--rank {args.rank}: give a whole number of at least 1")
    try:
        from .convert import change, export  # transformers: seconds that show and --help should not cost
    except ModuleNotFoundError as error:
        raise LosiaError(f"delta {args.action} needs {error.name}: install losia-fx[cli]") from None
    if args.action == "export":
        export(args.file, args.model, args.out, args.rank)
    else:
        change(args.file, args.model, args.out, undo=args.action == "undo")
    return 0
