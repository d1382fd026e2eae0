"""Pictures of a run: ratios and memory by method, and both along an axis of the model's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from losia_fx.finetune.plots import DPI, GREY
from losia_fx.storage.atomic import write_file

from .methods import COMPILED, EAGER
from .record import Bench, Row
from .table import title

COLOURS = {EAGER: "#c2a25a", COMPILED: "#1f6f8b"}
LINES = ("#1f6f8b", "#b5483a")


def draw_bench(path: Path, bench: Bench) -> None:
    """A bar a method and mode: the step over the floor's, with the rounds' extremes, and the peak of memory."""
    rows = [row for row in bench.rows if row.steps]
    names = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(names)), layout="constrained")
    figure.suptitle(title(bench.size), fontsize=8)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for mode, colour in COLOURS.items():
        mine = [row for row in rows if row.mode == mode]
        places = [names.index(row.method) + (0.2 if mode == COMPILED else -0.2) for row in mine]
        _ratios(left, mine, places, colour, mode)
        peaks = [0 if row.memory is None else row.memory.peak / 2**20 for row in mine]
        right.barh(places, peaks, height=0.38, color=colour)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("step over the floor of the same mode (bar: median of the rounds; line: least to most)")
    right.set_xlabel("peak memory of a step, MiB")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        _plain(axes, "x")
    _save(path, figure)


def _ratios(axes: Axes, rows: Sequence[Row], places: Sequence[float], colour: str, mode: str) -> None:
    spreads = [row.ratio for row in rows]
    medians = np.array([spread.median for spread in spreads])
    ends = np.array([[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]])
    axes.barh(places, medians, height=0.38, color=colour, label=mode)
    axes.errorbar(medians, places, xerr=ends, fmt="none", ecolor="black", elinewidth=0.8)


def draw_growth(path: Path, found: Mapping[str, Mapping[float, Sequence[Row]]]) -> None:
    """A panel an axis: step (solid) and peak memory (dashed) of each method over the floor's."""
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.6 * lines), layout="constrained")
    panels = np.array(figure.subplots(lines, columns, squeeze=False)).flat
    for panel, (axis, points) in zip(panels, found.items(), strict=False):
        floors = [rows[0] for rows in points.values()]
        for number, colour in enumerate(LINES, 1):
            rows = [rows[number] for rows in points.values()]
            steps = [row.ratio.median for row in rows]
            ends = [
                [s.median - s.least for s in (r.ratio for r in rows)],
                [r.ratio.most - r.ratio.median for r in rows],
            ]
            label = rows[0].method
            panel.errorbar(list(points), steps, yerr=ends, color=colour, marker="o", label=f"{label}: step")
            peaks = [_peak(row) / _peak(floor) for row, floor in zip(rows, floors, strict=True)]
            panel.plot(list(points), peaks, "--", color=colour, marker=".", label=f"{label}: peak memory")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set(xlabel=axis.replace("_", " "), ylabel="over the floor")
        panel.set_xticks(list(points), [f"{point:g}" for point in points])
        _plain(panel, "y")
    next(iter(figure.axes)).legend(frameon=False, fontsize=7, handlelength=4)
    _save(path, figure)


def _peak(row: Row) -> int:
    assert row.memory is not None
    return row.memory.peak


def _plain(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    axes.grid(axis=grid, color=GREY, linewidth=0.4)
    axes.set_axisbelow(True)


def _save(path: Path, figure: Figure) -> None:
    write_file(path, lambda draft: figure.savefig(draft, format="png", dpi=DPI))
