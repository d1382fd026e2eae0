"""Runs every model of a library, tiny, and says which are exact under losia_fx, and why the others are not.

    python -m losia_fx.tools.coverage "llama*" mixtral --compiler inductor
    python -m losia_fx.tools.coverage --library diffusers --out diffusers.jsonl --table diffusers.md

Each runs in a process of its own, so that a crash or a hang costs one line of the table. With --out, a run that was
cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import set_verbosity_error

from losia_fx._compat import draw_as_eager
from losia_fx._compat.cpp_kernels import compile_kernels_together, keep_strides
from losia_fx.config import COMPILERS
from losia_fx.console import progress
from losia_fx.errors import LosiaError

from .check import DIED, INEXACT, Result, check
from .libraries import LIBRARIES
from .record import Conditions, Record
from .table import markdown, print_results


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 nothing is inexact, 1 something is, 2 wrong use, 130 interrupted."""
    args = _parser().parse_args(argv)
    set_verbosity_error()
    library = LIBRARIES[args.library]
    try:
        known = library.names()
        names = _chosen(known, args.patterns, args.part)
        _check_folders(args.out, args.table)
        record = Record(args.out, Conditions.of(library, args.compiler, args.dtype))
    except LosiaError as error:
        print(f"coverage: {error}", file=sys.stderr)
        return 2
    console = Console()
    todo = record.left(names, args.retry)
    if len(todo) < len(names):
        console.print(f"{len(names) - len(todo)} of {len(names)} are in {args.out}", highlight=False)
    interrupted = False
    try:
        with progress(console, len(todo)) as tell:
            for result in run(todo, args):
                record.add(result)
                tell(f"{result.architecture}: {result.verdict}")
    except KeyboardInterrupt:
        interrupted = True
    results = record.of(names)
    print_results(console, results)
    if args.table is not None:
        args.table.write_text(markdown(record.conditions, record.dates, results, len(known)), encoding="utf-8")
    return 130 if interrupted else exit_code(results)


def _chosen(known: Sequence[str], patterns: Sequence[str], part: tuple[int, int]) -> list[str]:
    """The models that the patterns name; of those, the part. Raises LosiaError for a pattern that names none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise LosiaError(f"{pattern!r} matches none of the {len(known)} models")
    names = [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns or ["*"])]
    return names[part[0] - 1 :: part[1]]


def _check_folders(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise LosiaError(f"{file}: there is no folder {file.parent}")


def exit_code(results: Sequence[Result]) -> int:
    return int(any(result.verdict == INEXACT for result in results))


@dataclass
class _Job:
    """One architecture in its process."""

    name: str
    process: Any
    answer: Connection
    ends: float = field(default=0.0)

    def result(self) -> Result:
        try:
            if self.answer.poll():
                result = self.answer.recv()
                assert isinstance(result, Result)
                return result
        except EOFError:
            pass
        self.process.join()
        code = self.process.exitcode
        died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Result(self.name, DIED, f"the process died: {died}")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.answer.close()


def run(names: Sequence[str], args: argparse.Namespace) -> Iterator[Result]:
    """A Result for each name, in the order in which they are done.

    args: what check() takes beside the name (compiler, dtype, library), the number of jobs and the timeout in seconds.
    """
    methods = multiprocessing.get_all_start_methods()
    # A fork server imports torch and the library once; where there is none, each process does.
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        source = f"losia_fx.tools.{LIBRARIES[args.library].source}"
        context.set_forkserver_preload(["losia_fx.tools.coverage.command", source])
    waiting, running = list(reversed(names)), list[_Job]()
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                running.append(_start(context, waiting.pop(), args))
            wait([job.answer for job in running], timeout=max(0.0, min(j.ends for j in running) - time.monotonic()))
            for job in list(running):
                answered = job.answer.poll()
                if answered or time.monotonic() >= job.ends:
                    result = job.result() if answered else Result(job.name, DIED, f"not done after {args.timeout:g} s")
                    running.remove(job)
                    job.stop()
                    yield result
    finally:
        for job in running:
            job.stop()


def _start(context: Any, name: str, args: argparse.Namespace) -> _Job:
    ours, theirs = context.Pipe(duplex=False)
    given = (theirs, name, args.compiler, args.dtype, args.library)
    process = context.Process(target=_child, args=given, daemon=True)
    process.start()
    theirs.close()
    return _Job(name, process, ours, time.monotonic() + args.timeout)


def _child(answer: Connection, name: str, compiler: str, dtype: str, library: str) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what models and compilers print would tear the table
        os.dup2(nothing, stream)
    set_verbosity_error()
    if compiler == "inductor":  # nearly all of the time goes into g++, and most of that into reading headers
        compile_kernels_together()
        keep_strides()
        draw_as_eager()
    gc.disable()  # the process ends with its model
    try:
        answer.send(check(name, compiler, dtype, library))
    except Exception as error:  # one line of the table, not the end of it
        answer.send(Result(name, DIED, f"the check itself failed: {type(error).__name__}: {error}"[:300]))
    answer.close()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return value


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text}: give a part and the number of parts, as in 1/8")
    return part, parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m losia_fx.tools.coverage", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("patterns", nargs="*", metavar="PATTERN", help="models, as in a shell (default: all)")
    add("--library", choices=LIBRARIES, default="transformers", help="default: %(default)s")
    add("--compiler", choices=COMPILERS, default="aot_eager", help="default: %(default)s")
    add("--dtype", choices=("float32", "float64"), default="float64", help="float64: where the model runs in it")
    add("--jobs", type=_positive, default=1, help="processes at a time (default: %(default)s)")
    add("--timeout", type=_positive, default=180, help="seconds for one (default: %(default)s)")
    add("--part", type=_part, default=(1, 1), metavar="1/8", help="every eighth of them, from the first on")
    add("--out", type=Path, metavar="FILE.jsonl", help="results, a line each; those that are there are not done again")
    add("--retry", action="store_true", help="do again what is in --out but neither exact nor refused")
    add("--table", type=Path, metavar="FILE.md", help="also write what came out as Markdown")
    return parser
