"""Measures what methods learn of a new text and forget of the old one, each over learning rates and seeds.

    python -m losia_fx.tools.quality --out quality
    python -m losia_fx.tools.quality --out quality --methods paper roaming --seeds 1 --part 1/8
    python -m losia_fx.tools.quality --out quality --report-only

Two bases of 1.3M parameters: the shipped one, which knows the Perl manual and learns the standard library's sources;
and one that is pretrained here on those, once, and learns the Perl manual. --text adds a text that both learn. Every
run is a line of OUT/runs.jsonl as soon as it is done; the same command goes on with those that are left, and writes
OUT/quality.md and OUT/quality.png. Parts write files of their own, which are read together.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from losia_fx.errors import LosiaError

from ..bench.record import environment
from . import text
from .bases import BASES, Base, base_of
from .methods import METHODS
from .record import Record, Setting
from .report import draw, markdown
from .text import Corpus
from .training import Run, Task


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all runs are there, 2 wrong use, 130 interrupted."""
    args = _parser().parse_args(argv)
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    part, parts = args.part
    name = "runs.jsonl" if parts == 1 else f"runs-{part}-of-{parts}.jsonl"
    try:
        record = Record(args.out, name, None if args.report_only else _setting(args))
        work = _Work(args, Console())
        runs = [] if args.report_only else work.runs()[part - 1 :: parts]
        interrupted = not work.make(record, runs)
    except LosiaError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    shown = {run: record.outcomes[run] for run in _ordered(record, args)}
    if args.report_only and not shown:
        print(f"quality: {args.out} holds no run of these bases and methods", file=sys.stderr)
        return 2
    if shown:
        words = [] if argv is None and not sys.argv[1:] else list(argv if argv is not None else sys.argv[1:])
        command = shlex.join(["python", "-m", "losia_fx.tools.quality", *words])
        (args.out / "quality.md").write_text(markdown(record, shown, command), encoding="utf-8")
        draw(args.out / "quality.png", shown)
    return 130 if interrupted else 0


def _ordered(record: Record, args: argparse.Namespace) -> list[Run]:
    """Of the bases and methods that were asked for, in their order, whatever order the runs were made in."""
    places = {pair: number for number, pair in enumerate(itertools.product(BASES, METHODS))}
    asked = [run for run in record.outcomes if run.base in args.bases and run.method in args.methods]
    return sorted(asked, key=lambda run: (places[run.base, run.method], run.lr, run.seed))


def _setting(args: argparse.Namespace) -> Setting:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LosiaError(f"--device {args.device}: torch {torch.__version__} sees no GPU; leave it out to use the CPU")
    return Setting(args.steps, args.base_steps, args.threads, environment(device)["machine"])


@dataclass
class _Work:
    args: argparse.Namespace
    console: Console

    def __post_init__(self) -> None:
        self._texts: list[Corpus] = []
        self._task: Task | None = None

    def runs(self) -> list[Run]:
        """All that were asked for; of one base and text one after the other, as they share what is tokenized."""
        rates = {**{name: METHODS[name].rates for name in self.args.methods}, **dict(self.args.rates)}
        if unknown := [name for name, _ in self.args.rates if name not in self.args.methods]:
            raise LosiaError(f"--rates names {unknown[0]!r}, which is not among the methods of this call")
        self._texts = [text.folder(path) for path in self.args.text]
        _refuse_twice("--methods", self.args.methods)
        _refuse_twice("--bases", self.args.bases)
        _refuse_twice("--rates", [name for name, _ in self.args.rates])
        _refuse_twice("the folders of --text, with the texts of the bases,", [*BASES, *(t.name for t in self._texts)])
        tasks = [(base, learnt) for base in self.args.bases for learnt in self._learnt_by(base)]
        return [
            Run(base, learnt, method, lr, seed)
            for (base, learnt), seed, method in itertools.product(tasks, range(self.args.seeds), self.args.methods)
            for lr in rates[method]
        ]

    def _learnt_by(self, base: str) -> list[str]:
        own = "python" if base == "perl" else "perl"
        return [own, *(corpus.name for corpus in self._texts)]

    def make(self, record: Record, runs: Sequence[Run]) -> bool:
        """Makes those of ``runs`` that are not there yet; False where the user has cut in."""
        left = record.left(runs)
        if len(left) < len(runs):
            self.console.print(f"{len(runs) - len(left)} of {len(runs)} runs are in {self.args.out}", highlight=False)
        began = time.monotonic()
        try:
            for number, run in enumerate(left, 1):
                outcome = self._task_of(run).run(METHODS[run.method], run.lr, run.seed, self.args.steps)
                record.add(run, outcome)
                minutes = (time.monotonic() - began) / number * (len(left) - number) / 60
                self.console.print(
                    f"{number}/{len(left)}  {run.base} -> {run.text}  {run.method} lr {run.lr:g} seed {run.seed}:  "
                    f"learnt {outcome.learnt:.3f}  forgotten {outcome.forgotten:.3f}  (about {minutes:.0f} min left)",
                    highlight=False,
                    soft_wrap=True,
                )
        except KeyboardInterrupt:
            return False
        return True

    def _task_of(self, run: Run) -> Task:
        task = self._task
        if task is None or (task.base.name, task.name) != (run.base, run.text):
            known = None if task is None else task.base
            base = self._base(run.base) if known is None or known.name != run.base else known
            task = self._task = Task(base, self._corpus(run.text), torch.device(self.args.device))
        return task

    def _base(self, name: str) -> Base:
        return base_of(name, self.args.out, self.args.base_steps, torch.device(self.args.device), self.console)

    def _corpus(self, name: str) -> Corpus:
        own = {"python": text.standard_library, "perl": text.perl_manual}
        found = next((corpus for corpus in self._texts if corpus.name == name), None)
        return found if found is not None else own[name]()


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    """A run is known by these names alone: two of one name would be counted as one."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise LosiaError(f"{what} name {twice!r} twice: give each a name of its own, once")


def _part(given: str) -> tuple[int, int]:
    try:
        part, parts = map(int, given.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{given}: give a part and the number of parts, as in 1/8")
    return part, parts


def _rates(given: str) -> tuple[str, tuple[float, ...]]:
    method, _, numbers = given.partition("=")
    try:
        rates = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        rates = ()
    fit = rates and len(set(rates)) == len(rates) and all(0 < rate < math.inf for rate in rates)
    if method not in METHODS or not fit:
        raise argparse.ArgumentTypeError(
            f"{given}: give a method and its learning rates, each once, as in full=1e-4,3e-4"
        )
    return method, rates


def _positive(given: str) -> int:
    value = int(given) if given.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{given}: give a whole number of at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m losia_fx.tools.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    documentation = text.installed_documentation()
    add("--out", type=Path, required=True, metavar="FOLDER", help="runs, tables, picture, and the base made here")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--rates", nargs="+", type=_rates, default=[], metavar="METHOD=RATE,...", help="in place of a method's own")
    add("--seeds", type=_positive, default=3, help="how many, from 0 on (default: %(default)s)")
    add("--bases", nargs="+", choices=BASES, default=list(BASES), help="by what they know (default: both)")
    add(
        "--text",
        nargs="*",
        type=Path,
        default=[] if documentation is None else [documentation],
        metavar="FOLDER",
        help="of text files, for both bases to learn (default: what Debian's python3-doc has installed, if anything)",
    )
    add("--steps", type=_positive, default=400, help="of each run (default: %(default)s)")
    add("--base-steps", type=_positive, default=2000, help="that the second base is pretrained (default: %(default)s)")
    add("--threads", type=_positive, default=1, help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--part", type=_part, default=(1, 1), metavar="1/8", help="every eighth of the runs, from the first on")
    add("--report-only", action="store_true", help="no run: tables and picture of what is there")
    return parser
