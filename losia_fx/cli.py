"""The command line: ``losia-fx <command>``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``. It imports what is heavy only in
``run``, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from losia_fx.errors import LosiaError

COMMANDS = {
    "finetune": "losia_fx.finetune.command",
    "delta": "losia_fx.delta.command",
    "dump": "losia_fx.tools.graphs.dump",
    "diff": "losia_fx.tools.graphs.diff",
    "explain": "losia_fx.tools.forecast.explain",
    "page": "losia_fx.tools.page.command",
    "plot": "losia_fx.tools.plot.command",
}


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is an exception of one line: its own way prints the usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise LosiaError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 the machine failed it (a full disk), 2 wrong use, 130 interrupted."""
    try:
        args, unknown = _parser(sys.argv[1:] if argv is None else argv).parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown[0], args.parser)}")
        return int(args.run(args))
    except LosiaError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted before there was anything to save", 130)


def command(name: str) -> Callable[..., int]:
    """``main`` of one command, as ``python -m losia_fx.tools.<name>`` and Python call it."""

    def run(argv: Sequence[str] | None = None) -> int:
        return main([name, *(sys.argv[1:] if argv is None else argv)])

    return run


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Of the commands the one in ``argv`` alone says its arguments: some have to look for theirs."""
    parser = _Parser(prog="losia-fx", description="LoSiA: fine-tuning through subnets that move with the importance.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        summary = (module.__doc__ or name).partition("\n")[0]
        subparser = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run, parser=subparser)
    return parser


def _meant(unknown: str, parser: argparse.ArgumentParser) -> str:
    known = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(unknown.partition("=")[0], known, n=1)
    return f": did you mean {close[0]}?" if close else ""


def _fail(message: str, code: int) -> int:
    print(f"losia-fx: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
