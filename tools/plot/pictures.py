"""The pictures of a run that losia_fx/finetune/plots.py has not: rates with rewarm, importance, moves, coverage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from losia_fx.config import matches
from losia_fx.errors import LosiaError
from losia_fx.finetune.plots import DPI, GREY, INK, coverage_of, map_of, plot_losses, plot_subnets
from losia_fx.finetune.record import Names, RunRecord
from losia_fx.method.schedule import rewarm_factor, rewarmed_steps
from losia_fx.storage.atomic import write_file

from .overlap import jaccard
from .run_folder import Run

MOST_WEIGHTS, MOST_MOVES = 8, 10  # of the picture of moves
SEVERAL = matplotlib.colormaps["viridis"]


def draw(run: Run, out: Path, pictures: Iterable[str], kind: str, layers: Sequence[str] | None) -> Iterator[Path]:
    """Writes the pictures into ``out`` and yields their paths. Raises LosiaError at a pattern that matches nothing."""
    chosen = _chosen(run.record, layers)
    figures: dict[str, Callable[[], Figure]] = {
        "learning_rate": lambda: learning_rates(run),
        "importance": lambda: importance(run.record),
        "moves": lambda: moves(run.record, chosen),
        "coverage": lambda: coverage(run.record),
    }
    writers: dict[str, Callable[[Path], None]] = {
        "losses": lambda path: plot_losses(path, run.record, Names(run.new, run.old), kind),
        "subnets": lambda path: plot_subnets(path, run.record, kind),
        **{name: _saving(figure, kind) for name, figure in figures.items()},
    }
    for picture in pictures:
        path = out / f"{picture}.{kind}"
        write_file(path, writers[picture])
        yield path


def _saving(figure: Callable[[], Figure], kind: str) -> Callable[[Path], None]:
    return lambda path: figure().savefig(path, format=kind, dpi=DPI)


def rates(run: Run) -> np.ndarray[Any, Any]:
    """(groups, steps): the learning rate of each optimizer step, as far as rewarm lets each group have it."""
    record = run.record
    config = run.config
    table = np.tile([step.lr for step in record.steps], (len(record.groups), 1))
    for move in record.moves:
        for update, column in enumerate(
            range(move.step, min(move.step + rewarmed_steps(config), len(record.steps))), 1
        ):
            table[move.group, column] = record.steps[column].lr * rewarm_factor(config, update)
    return table


def learning_rates(run: Run) -> Figure:
    """What the scheduler gives above; below, a row a group, what of it counts while the group is rewarmed."""
    record, table = run.record, rates(run)
    figure = Figure(figsize=(9, 3 + 0.3 * len(record.groups)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1 + 0.2 * len(record.groups)])
    steps = [step.step for step in record.steps]
    for group, row in enumerate(table):
        above.plot(steps, row, color=SEVERAL(group / max(1, len(table) - 1)), linewidth=0.9)
    above.plot(steps, [step.lr for step in record.steps], color=INK, linewidth=1.6, label="the scheduler's")
    above.set(title="Learning rate, by group with its rewarm", ylabel="learning rate")
    above.legend(frameon=False)
    edges = [0, *steps] if steps else [0, 1]
    if steps:
        image = below.pcolormesh(edges, np.arange(len(table) + 1) - 0.5, table, cmap="YlGnBu", vmin=0)
        figure.colorbar(image, ax=below, fraction=0.03, pad=0.01)
    _groups(below, record)
    below.set_xlabel("optimizer step")
    _plain(above)
    return figure


def importance(record: RunRecord) -> Figure:
    """The share of the group's importance that each selection holds, beside the share that its size would give."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for group in range(len(record.groups)):
        points = [(m.step, m.captured) for m in record.moves if m.group == group and m.captured is not None]
        if points:
            colour = SEVERAL(group / max(1, len(record.groups) - 1))
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=record.group_label(group))
            axes.axhline(_size_share(record, group), color=colour, linestyle=":", linewidth=0.9)
    axes.set(title="Importance that the subnets hold when they are chosen", xlabel="optimizer step", ylim=(0, 1))
    axes.set_ylabel("share of the group's score (dotted: of its elements)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if axes.lines:
        axes.legend(frameon=False, fontsize=7, ncols=1 + len(record.groups) // 12)
    else:
        axes.text(0.5, 0.5, "no slot of this run came to its end", ha="center", transform=axes.transAxes)
    _plain(axes)
    return figure


def moves(record: RunRecord, names: Sequence[str]) -> Figure:
    """A line a weight: its subnet in each slot, with the overlap (Jaccard) of its elements with those before."""
    most = max(len(record.selections[name]) for name in names)
    shown = np.linspace(0, most - 1, min(most, MOST_MOVES)).round().astype(int).tolist()
    figure = Figure(figsize=(1.5 * len(shown) + 2.4, 1.75 * len(names) + 0.8), layout="constrained")
    figure.suptitle(f"How the subnets moved (J: overlap with the selection before){record.gaps}", fontsize=12)
    grid = figure.subplots(len(names), len(shown), squeeze=False)
    for line, name in zip(grid, names, strict=True):
        for place, at in zip(line, shown, strict=True):
            place.set(xticks=[], yticks=[])
            if at >= len(record.selections[name]):
                place.axis("off")
                continue
            selection = record.selections[name][at]
            overlap = "first" if at == 0 else f"J {jaccard(record.selections[name][at - 1], selection):.2f}"
            place.set_title(f"step {selection.step}, {overlap}", fontsize=7)
            place.imshow(map_of(selection, record.shapes[name]), cmap="magma_r", vmin=0, vmax=1, aspect="auto")
        line[0].set_ylabel(name.removesuffix(".weight").removeprefix("model."), fontsize=6)
    return figure


def coverage(record: RunRecord) -> Figure:
    """Each weight, a row: the share of its elements that had been in the subnet by each step."""
    names = [name for group in record.groups for name in group]
    end = max(1, len(record.steps))
    table = np.zeros((len(names), end))
    for row, name in zip(table, names, strict=True):
        shares = coverage_of(record.selections[name], record.shapes[name])
        for selection, share in zip(record.selections[name], shares, strict=True):
            row[selection.step :] = share
    figure = Figure(figsize=(9, min(40.0, 1.6 + 0.2 * len(names))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        table, cmap="YlGnBu", vmin=0, aspect="auto", interpolation="nearest", extent=(0, end, len(names), 0)
    )
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.08, format=lambda value, _: f"{value:.0%}")
    if len(names) <= 200:
        labels = [name.removesuffix(".weight").removeprefix("model.") for name in names]
        axes.set_yticks(np.arange(len(names)) + 0.5, labels, fontsize=6)
        last = axes.secondary_yaxis("right")
        last.set_yticks(np.arange(len(names)) + 0.5, [f"{share:.0%}" for share in table[:, -1]], fontsize=6)
    axes.set(title=f"Elements of each weight that have been in its subnet{record.gaps}", xlabel="optimizer step")
    return figure


def _chosen(record: RunRecord, layers: Sequence[str] | None) -> list[str]:
    """The weights whose moves are drawn: those that the patterns name, or some of the middle block."""
    if not layers:
        blocks = [names for names in record.groups if len(names) > 1] or list(record.groups)
        return list(blocks[len(blocks) // 2])[:MOST_WEIGHTS]
    for pattern in layers:
        if not any(matches(name, (pattern,)) for name in record.selections):
            some = ", ".join(list(record.selections)[:3])
            raise LosiaError(
                f"--layer {pattern!r} matches none of the run's {len(record.selections)} weights ({some}, ...)"
            )
    return [name for name in record.selections if matches(name, layers)]


def _size_share(record: RunRecord, group: int) -> float:
    """The share of the group's elements that its subnets are made of."""
    sizes = [int(np.prod(record.shapes[name])) for name in record.groups[group]]
    inside = [coverage_of(record.selections[name][:1], record.shapes[name])[0] for name in record.groups[group]]
    return float(np.average(inside, weights=sizes))


def _groups(axes: Axes, record: RunRecord) -> None:
    labels = [record.group_label(group) for group in range(len(record.groups))]
    axes.set_yticks(range(len(labels)), labels, fontsize=8 if len(labels) <= 20 else 4)
    axes.invert_yaxis()


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color=GREY, linewidth=0.4)
