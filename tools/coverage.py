"""Runs every architecture of transformers, tiny, and says which are exact under losia_fx, and why the others are not.

    python -m losia_fx.tools.coverage "llama*" mixtral --compiler aot_eager

Each runs in a process of its own, so that a crash or a hang costs one line of the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import set_verbosity_error

from losia_fx.config import COMPILERS

from .architectures import architectures
from .check_architecture import EXACT, INEXACT, REFUSED, UNBUILT, Result, check

DIED = "no result"
STYLES = {EXACT: "green", INEXACT: "bold red", REFUSED: "yellow", UNBUILT: "dim", DIED: "bold yellow"}
Check = Callable[[str, str, str], Result]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 nothing is inexact, 1 something is, 2 wrong use, 130 interrupted."""
    args = _parser().parse_args(argv)
    set_verbosity_error()
    known = architectures()
    for pattern in args.patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            print(f"coverage: {pattern!r} matches none of the {len(known)} architectures", file=sys.stderr)
            return 2
    if args.out is not None and not args.out.parent.is_dir():
        print(f"coverage: --out {args.out}: there is no folder {args.out.parent}", file=sys.stderr)
        return 2
    names = [name for name in known if any(fnmatchcase(name, pattern) for pattern in args.patterns or ["*"])]
    console = Console()
    results: list[Result] = []
    interrupted = False
    try:
        for result in shown(console, run(names, args.compiler, args.dtype, args.jobs, args.timeout), len(names)):
            results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    results.sort(key=lambda result: result.architecture)
    print_results(console, results)
    if args.out is not None:
        write(args.out, results)
    return 130 if interrupted else exit_code(results)


def exit_code(results: Sequence[Result]) -> int:
    return int(any(result.verdict == INEXACT for result in results))


def print_results(console: Console, results: Sequence[Result]) -> None:
    table = Table(title="losia_fx: gradients against plain autograd", title_justify="left")
    for column in ("architecture", "model", "dtype", "verdict", "subnets", "of the linears", "why"):
        table.add_column(
            column, overflow="fold", justify="right" if column in ("subnets", "of the linears") else "left"
        )
    for result in results:
        share = "" if result.share is None else f"{100 * result.share:.1f}%"
        subnets = str(result.subnets) if result.subnets else ""
        verdict = f"[{STYLES[result.verdict]}]{result.verdict}[/]"
        table.add_row(result.architecture, result.model, result.dtype, verdict, subnets, share, _escaped(result.why))
    console.print(table)
    counts = Counter(result.verdict for result in results)
    console.print(
        ", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES), f"of {len(results)}", highlight=False
    )


def write(path: Path, results: Sequence[Result]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    os.replace(part, path)


def shown(console: Console, results: Iterator[Result], total: int) -> Iterator[Result]:
    """``results``, with a progress bar; where there is no terminal, now and then a line."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for number, result in enumerate(results, 1):
            progress.update(task, advance=1, description=f"{result.architecture}: {result.verdict}")
            if not console.is_terminal and number % 25 == 0:
                console.print(f"{number}/{total}", highlight=False)
            yield result


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


def run(names: Sequence[str], compiler: str, dtype: str, jobs: int, timeout: float) -> Iterator[Result]:
    """A Result for each name, in the order in which they are done."""
    methods = multiprocessing.get_all_start_methods()
    # A fork server imports torch and transformers once; where there is none, each process does.
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["losia_fx.tools.check_architecture"])
    waiting, running = list(reversed(names)), list[_Job]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), compiler, dtype, timeout))
            wait([job.answer for job in running], timeout=max(0.0, min(j.ends for j in running) - time.monotonic()))
            for job in list(running):
                answered = job.answer.poll()
                if answered or time.monotonic() >= job.ends:
                    result = job.result() if answered else Result(job.name, DIED, f"not done after {timeout:g} s")
                    running.remove(job)
                    job.stop()
                    yield result
    finally:
        for job in running:
            job.stop()


def _start(context: Any, name: str, compiler: str, dtype: str, timeout: float) -> _Job:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, name, compiler, dtype), daemon=True)
    process.start()
    theirs.close()
    return _Job(name, process, ours, time.monotonic() + timeout)


def _child(answer: Connection, name: str, compiler: str, dtype: str) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what models and compilers print would tear the table
        os.dup2(nothing, stream)
    set_verbosity_error()
    try:
        answer.send(check(name, compiler, dtype))
    except Exception as error:  # one line of the table, not the end of it
        answer.send(Result(name, DIED, f"the check itself failed: {type(error).__name__}: {error}"[:300]))
    answer.close()


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m losia_fx.tools.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="model types, as in a shell (default: all)")
    parser.add_argument("--compiler", choices=COMPILERS, default="aot_eager", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64", help="float64: where the model runs in it"
    )
    parser.add_argument("--jobs", type=_positive, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=_positive, default=180, help="seconds for one (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
