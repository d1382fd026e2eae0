"""The table of a run, for the screen and as Markdown, from one list of columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from losia_fx.console import make_table

from .grow import Growth
from .methods import COMPILED
from .record import Bench, Row
from .sizes import Size

Column = tuple[str, Callable[[Row], str]]


def _spread(row: Row) -> str:
    return f"{row.ratio.median:.3f} ({row.ratio.least:.3f} to {row.ratio.most:.3f})" if row.ratios else ""


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _memory(part: str) -> Callable[[Row], str]:
    return lambda row: "" if row.memory is None else _mebibytes(getattr(row.memory, part))


COLUMNS: tuple[Column, ...] = (
    ("method", lambda row: row.method),
    ("mode", lambda row: row.mode),
    ("step ms", lambda row: f"{row.step.median:.1f}"),
    ("least", lambda row: f"{row.step.least:.1f}"),
    ("most", lambda row: f"{row.step.most:.1f}"),
    ("forward", lambda row: f"{row.part('forward_ms'):.1f}"),
    ("backward", lambda row: f"{row.part('backward_ms'):.1f}"),
    ("optimizer", lambda row: f"{row.part('optimizer_ms'):.2f}"),
    ("to floor", _spread),
    ("trained", lambda row: f"{row.trained:,}"),
    ("peak MiB", _memory("peak")),
    ("saved MiB", _memory("saved")),
    ("optimizer MiB", _memory("optimizer")),
    ("compile s", lambda row: f"{row.compile_s:.1f}" if row.mode == COMPILED else ""),
    ("graphs, breaks, again", lambda row: _graphs(row)),
)
COMPILE = (
    "compile s: wall time of the first step less that of the second; the compiler's cache is empty when the run "
    "begins, so a method pays less for what one above it has had compiled"
)
SCREEN = ("method", "mode", "step ms", "to floor", "peak MiB", "trained")


def _graphs(row: Row) -> str:
    found = row.graphs
    return f"{found.graphs}, {found.breaks}, {found.recompilations}" if found.graphs else ""


def _cells(row: Row) -> list[str]:
    if not row.steps:
        return [row.method, row.mode, "skipped"] + [""] * (len(COLUMNS) - 3)
    return [show(row) for _, show in COLUMNS]


def print_table(console: Console, bench: Bench) -> None:
    """The columns that fit a screen; the Markdown file has all."""
    found = make_table(title(bench.size), *SCREEN, left=SCREEN[:2])
    for row in bench.rows:
        cells = dict(zip((name for name, _ in COLUMNS), _cells(row), strict=True))
        found.add_row(*(cells[name] for name in SCREEN))
    console.print(found)
    for line in notes(bench):
        console.print(line, markup=False, highlight=False)


def title(size: Size) -> str:
    return (
        f"{size.name}: Llama, hidden {size.hidden}, intermediate {size.intermediate}, {size.heads} heads "
        f"({size.kv_heads} of keys and values), {size.layers} layers, vocabulary {size.vocabulary}, {size.dtype}, "
        f"{size.batch} x {size.length} tokens, rank factor {size.rank_factor:g}"
    )


def notes(bench: Bench) -> list[str]:
    """Everything that is said beside the table, a line each."""
    lines = [COMPILE] if any(row.mode == COMPILED for row in bench.rows) else []
    lines += [f"{row.name}: skipped: {row.skipped}" for row in bench.rows if row.skipped]
    for whole in bench.rounds_of_schedule:
        found = whole.graphs
        lines.append(
            f"{whole.method} (compiled), {whole.steps} steps of two rounds, {whole.moves} re-selections: "
            f"graphs {found.graphs}, graph breaks {found.breaks}, recompilations {found.recompilations}"
        )
    lines += [f"re-selection of {group}: {ms:.1f} ms" for group, ms in bench.reselection_ms.items()]
    lines += [f"import {name}: {seconds:.2f} s" for name, seconds in bench.import_s.items()]
    if bench.warm_start_s:
        cold, warm = bench.warm_start_s
        lines.append(f"first step of losia (compiled) in a fresh process: {cold:.1f} s, with a warm cache {warm:.1f} s")
    return lines


def markdown(bench: Bench) -> str:
    facts = {
        "command": f"`{bench.command}`",
        **bench.environment,
        "model": title(bench.size),
        "clock": bench.clock,
        "memory": bench.tracker,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", _line([name for name, _ in COLUMNS]), _line(["---"] * 2 + ["---:"] * (len(COLUMNS) - 2))]
    lines += [_line(_cells(row)) for row in bench.rows]
    said = dict.fromkeys((row.method, row.note) for row in bench.rows if row.note)
    lines += ["", *(f"- {line}" for line in notes(bench))]
    lines += ["", *(f"- {method}: {note}" for method, note in said)]
    return "\n".join(lines) + "\n"


def growth_markdown(growth: Growth) -> str:
    facts = {"command": f"`{growth.command}`", **growth.environment, "base": title(growth.base)}
    columns = [
        (name, show) for name, show in COLUMNS if name in ("method", "step ms", "to floor", "peak MiB", "saved MiB")
    ]
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", _line(["axis", "at", *(name for name, _ in columns)]), _line(["---"] * 3 + ["---:"] * 4)]
    for axis, points in growth.points.items():
        for value, rows in points.items():
            lines += [_line([axis, f"{value:g}", *(show(row) for _, show in columns)]) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
