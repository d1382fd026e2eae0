"""The runs as Markdown tables and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from losia_fx.storage.atomic import write_file

from .frontier import Outcomes, Point, at_level, levels, of_task, points, tasks
from .methods import METHODS
from .record import Record

COLOURS = ("#1f6f8b", "#b5483a", "#c2a25a", "#5a8f5a", "#7d5ba6", "#444444", "#d08bb0", "#4aa3a2", "#8c6d46", "#9aa0a6")


def markdown(record: Record, shown: Outcomes, command: str) -> str:
    """Of every base and text: each method at each rate, and what all forget where they have learnt the same.

    shown: those of the record's outcomes that the tables have.
    """
    about = [
        f"- command: `{command}`",
        f"- date: {' to '.join(sorted({min(record.dates), max(record.dates)}))}",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in asdict(record.setting).items()),
        "",
        "Losses are held-out nats a token, lower is better; ± is the standard error over n seeds.",
    ]
    parts = [_task(of_task(shown, task), *task) for task in tasks(shown)]
    return "\n\n".join(["\n".join(about), *parts]) + "\n"


def _task(outcomes: Outcomes, base: str, text: str) -> str:
    first = next(iter(outcomes.values()))
    title = (
        f"## {text}, learnt by the base that knows {base}\n\n"
        f"Before: {first.learnt_before:.3f} on {text}, {first.forgotten_before:.3f} on {base}."
    )
    found = points(outcomes)
    rows = [
        (p.method, METHODS[p.method].says if p.method in METHODS else "", f"{p.trained:,}", f"{p.lr:g}",
         str(p.learnt.count), str(p.learnt), str(p.forgotten), f"{p.seconds.value:.0f}")
        for p in found
    ]  # fmt: skip
    table = _table(("method", "what", "trained", "rate", "n", f"learnt ({text})", f"forgotten ({base})", "s"), rows)
    return f"{title}\n\n{table}\n\n{_frontier(outcomes, found)}"


def _frontier(outcomes: Outcomes, found: Sequence[Point]) -> str:
    at = levels(outcomes)
    if not at:
        return "No two methods have learnt the same, so nothing can be held against each other."
    methods = list(dict.fromkeys(point.method for point in found))
    rows = []
    for method in methods:
        values = [at_level(outcomes, method, level) for level in at]
        rows.append((method, *("" if value is None else f"{value} (n={value.count})" for value in values)))
    head = "What is forgotten where the same is learnt, between the rates in a straight line; empty: not reached."
    return f"{head}\n\n{_table(('learnt', *(f'{level:.3f}' for level in at)), rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def draw(path: Path, outcomes: Outcomes) -> None:
    """A panel a base and text: a line a method, a point a rate, with standard errors."""
    found, methods = tasks(outcomes), dict.fromkeys(run.method for run in outcomes)
    colours = dict(zip(methods, COLOURS * 2, strict=False))
    figure = Figure(figsize=(6.5 * len(found), 5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        mine = points(of_task(outcomes, task))
        for method in dict.fromkeys(point.method for point in mine):
            some = [point for point in mine if point.method == method]
            axes.errorbar(
                [point.learnt.value for point in some],
                [point.forgotten.value for point in some],
                xerr=[point.learnt.error or 0.0 for point in some],
                yerr=[point.forgotten.error or 0.0 for point in some],
                color=colours[method],
                marker="o",
                markersize=4,
                label=method,
            )
        axes.set(title=f"{task[0]} -> {task[1]}", xlabel=f"held-out loss on {task[1]}", ylabel=f"on {task[0]}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    write_file(path, lambda part: figure.savefig(part, dpi=150, format="png"))
