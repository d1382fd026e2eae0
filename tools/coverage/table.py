"""Tables of what coverage has found: for a terminal, and in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from losia_fx.console import make_table

from ..tiny.model import ALONE
from .check import DIED, EXACT, INEXACT, REFUSED, UNBUILT, Result
from .record import Conditions

COLUMNS = ("architecture", "model", "dtype", "verdict", "subnets", "of the linears", "why")
STYLES = {EXACT: "green", INEXACT: "bold red", REFUSED: "yellow", UNBUILT: "dim", DIED: "bold yellow"}


def print_results(console: Console, results: Sequence[Result]) -> None:
    left = ("model", "dtype", "verdict", "why")
    shown = make_table("losia_fx: gradients against plain autograd", *COLUMNS, left=left)
    for result in results:
        share = "" if result.share is None else f"{100 * result.share:.1f}%"
        subnets = str(result.subnets) if result.subnets else ""
        verdict = f"[{STYLES[result.verdict]}]{result.verdict}[/]"
        shown.add_row(result.architecture, result.model, result.dtype, verdict, subnets, share, _escaped(result.why))
    console.print(shown)
    counts = Counter(result.verdict for result in results)
    console.print(
        ", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES), f"of {len(results)}", highlight=False
    )


def markdown(conditions: Conditions, dates: Iterable[str], results: Sequence[Result], total: int) -> str:
    """What was found, with its conditions: the counts, then a line for every model that is not exact throughout.

    total: models there are; the results may be of some of them.
    """
    days = sorted(dates)
    when = "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    lines = [
        f"`python -m losia_fx.tools.coverage{_options(conditions)}`: {len(results)} of {total} models of "
        f"{conditions.library} {conditions.version}; {when}, torch {conditions.torch}, Python {conditions.python}, "
        f"compiler {conditions.compiler}, {_dtypes(conditions)}.",
        "",
        "| | |",
        "|---|---:|",
        *(f"| {said} | {count} |" for said, count in _counts(results)),
    ]
    others = [result for result in results if result.verdict != EXACT or result.why]
    if others:
        lines += ["", "| model | | why |", "|---|---|---|"]
        lines += [f"| {result.architecture} | {result.verdict} | {_cell(result.why)} |" for result in others]
    return "\n".join(lines) + "\n"


def _options(conditions: Conditions) -> str:
    library = "" if conditions.library == "transformers" else f" --library {conditions.library}"
    return f"{library} --compiler {conditions.compiler}"


def _dtypes(conditions: Conditions) -> str:
    return conditions.dtype if conditions.dtype == "float32" else "float64 where the model runs in it, else float32"


def _counts(results: Sequence[Result]) -> Iterator[tuple[str, int]]:
    exact = [result for result in results if result.verdict == EXACT]
    whole = sum(result.share == 1 for result in exact)
    yield "exact, every linear inside a block trained through a subnet", whole
    yield "exact, some of them left as they are", len(exact) - whole
    if parts := sum(result.why.endswith(ALONE) for result in exact):
        yield "of the exact, those of which only a part was run", parts
    for verdict, said in ((INEXACT, "not exact"), (REFUSED, "refused"), (UNBUILT, "not built"), (DIED, "no result")):
        yield said, sum(result.verdict == verdict for result in results)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
