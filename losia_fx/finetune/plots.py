"""The two pictures of a fine-tuning run: its losses, and where in the weights it learnt, over time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from losia_fx.method.subnet import scatter

from .record import Names, RunRecord, SelectionRecord

DPI = 140
INK, GREY, NEW, OLD = "#1f2430", "#c3c7cf", "#0b6e99", "#c4572c"
SMOOTHING = 0.9
MOST_BLOCKS, MOST_KINDS = 6, 8  # of the weights' maps: more would be too small to read
BINS = 64  # of a weight's map in each direction


def plot_losses(path: Path, record: RunRecord, names: Names, kind: str = "png") -> None:
    """Loss over steps (training and held out) above; the learning rate and the profiled group below."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps = [step.step for step in record.steps]
    losses = [step.loss for step in record.steps]
    above.plot(steps, losses, color=GREY, linewidth=0.8, label="training, each step")
    above.plot(steps, _smoothed(losses), color=INK, linewidth=1.6, label="training, smoothed")
    at = [evaluation.step for evaluation in record.evaluations]
    new = [evaluation.new for evaluation in record.evaluations]
    old = [(evaluation.step, evaluation.old) for evaluation in record.evaluations if evaluation.old is not None]
    above.plot(at, new, "o-", color=NEW, label=f"held out, new: {names.new}")
    if old:
        above.plot(*zip(*old, strict=True), "s-", color=OLD, label=f"held out, old: {names.old}")
    above.set(ylabel="loss (nats a token)", title="Loss over the run")
    above.legend(frameon=False)

    below.plot(steps, [step.lr for step in record.steps], color=INK)
    below.set(xlabel="optimizer step", ylabel="learning rate")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (above, below):
        _plain(axes)
    for move in record.moves:
        below.axvline(move.step, color=GREY, linewidth=0.8, zorder=0)
    if record.moves:
        below.set_title("grey: a group re-selects its subnets", fontsize=8, loc="right")
    figure.savefig(path, format=kind, dpi=DPI)


def plot_subnets(path: Path, record: RunRecord, kind: str = "png") -> None:
    """The groups over time (how much moved, what it held, how far it reached), then the map of each weight."""
    kinds, grid = _weight_grid(record)
    head = next((names[0] for names in record.groups if len(names) == 1 and len(record.groups) > 1), None)
    heights = [max(2.2, 0.34 * len(record.groups) + 1.2), 1.65 * len(grid) + 0.7] + ([1.9] if head else [])
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    figure.suptitle(f"Where the subnets have been{record.gaps}", fontsize=14)
    places = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    parts = [figure.add_subfigure(places[part, 0]) for part in range(len(heights))]
    _draw_groups(parts[0], record)
    _draw_weights(parts[1], record, kinds, grid)
    if head:
        _draw_rows_over_time(parts[2], record, head)
    figure.savefig(path, format=kind, dpi=DPI)


def _draw_groups(figure: SubFigure, record: RunRecord) -> None:
    moved, captured, reached = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    news = {(m.group, m.step): m.moved for m in record.moves}
    _draw_slots(moved, record, news, "share of the subnets that is new at each re-selection")
    shares = {(m.group, m.step): m.captured for m in record.moves if m.captured is not None}
    _draw_slots(captured, record, shares, "share of the importance that they hold")
    colours = matplotlib.colormaps["viridis"].resampled(max(2, len(record.groups)))
    for group in range(len(record.groups)):
        steps, shares_reached = _coverage(record, group)
        reached.step(steps, shares_reached, where="post", color=colours(group), label=record.group_label(group))
    reached.set(title="share of all elements reached so far", xlabel="optimizer step", ylim=(0, None))
    reached.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    reached.legend(frameon=False, fontsize=7, ncols=1 + len(record.groups) // 9)
    _plain(reached)


def _draw_slots(axes: Axes, record: RunRecord, values: dict[tuple[int, int], float], title: str) -> None:
    """A row a group; a bar from each re-selection to the next, coloured and lettered by its value."""
    end = max(1, len(record.steps))
    colours = matplotlib.colormaps["YlGnBu"]
    letters = len(values) <= 90
    for group in range(len(record.groups)):
        axes.barh(group, end, color="#eceef1", height=0.86)  # the first subnets, drawn by chance
        times = [move.step for move in record.moves if move.group == group]
        for start, stop in itertools.pairwise([*times, end]):
            value = values.get((group, start))
            if value is None:
                continue
            axes.barh(group, stop - start, left=start, color=colours(value), height=0.86, edgecolor="white")
            if letters and stop - start > end / 16:
                ink = "white" if value > 0.55 else INK
                axes.text((start + stop) / 2, group, f"{value:.0%}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_yticks(range(len(record.groups)), [record.group_label(group) for group in range(len(record.groups))])
    axes.tick_params(axis="y", labelsize=8 if len(record.groups) <= 20 else 4)
    axes.set(title=title, xlabel="optimizer step (grey: the first subnets, by chance)", xlim=(0, end))
    axes.invert_yaxis()
    _plain(axes)


def _draw_weights(figure: SubFigure, record: RunRecord, kinds: Sequence[str], grid: dict[int, dict[str, str]]) -> None:
    """A small map a weight: rows down, columns across, darker where more of the run was spent."""
    figure.suptitle("share of the run that an element of each weight spent in the subnet", fontsize=11)
    axes = figure.subplots(len(grid), len(kinds), squeeze=False)
    image = None
    for line, (group, weights) in zip(axes, grid.items(), strict=True):
        line[0].set_ylabel(record.group_label(group), fontsize=9)
        for place, kind in zip(line, kinds, strict=True):
            place.set_xticks([])
            place.set_yticks([])
            if group == next(iter(grid)):
                place.set_title(kind, fontsize=9)
            if kind in weights:
                map_of_weight = _time_map(record.selections[weights[kind]], record.shapes[weights[kind]], _end(record))
                image = place.imshow(map_of_weight, cmap="magma_r", vmin=0, vmax=0.5, aspect="auto")
            else:
                place.axis("off")
    if image is not None:
        bar = figure.colorbar(image, ax=axes.ravel().tolist(), fraction=0.012, pad=0.01, extend="max")
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_rows_over_time(figure: SubFigure, record: RunRecord, name: str) -> None:
    """The output head has rows only: one for each token of the vocabulary."""
    axes = figure.subplots()
    selections = record.selections[name]
    rows = record.shapes[name][0]
    bins = min(rows, 4 * BINS)
    edges = [*(selection.step for selection in selections), max(_end(record), selections[-1].step + 1)]
    densities = torch.cat([_density(selection.rows, rows, bins) for selection in selections])
    across = torch.arange(bins + 1, device="cpu") * (rows / bins)
    axes.pcolormesh(edges, across.numpy(), densities.T.numpy(), cmap="magma_r", vmin=0, vmax=1)
    axes.set(title=f"rows of {name} (tokens of the vocabulary) in the subnet", xlabel="optimizer step", ylabel="row")
    axes.invert_yaxis()


def _weight_grid(record: RunRecord) -> tuple[list[str], dict[int, dict[str, str]]]:
    """The kinds of weights ("q_proj") that are drawn, and {group: {kind: name}} of at most MOST_BLOCKS groups."""
    blocks = [group for group, names in enumerate(record.groups) if len(names) > 1] or list(range(len(record.groups)))
    count = min(MOST_BLOCKS, len(blocks))
    spread = torch.linspace(0, len(blocks) - 1, count, device="cpu").round().int().tolist()
    grid: dict[int, dict[str, str]] = {}
    for group in (blocks[index] for index in spread):
        grid[group] = {}
        for name in record.groups[group]:
            # the first of a kind: of a layer's many experts one has to stand for all
            grid[group].setdefault(name.removesuffix(".weight").rpartition(".")[2], name)
    kinds = list(dict.fromkeys(kind for weights in grid.values() for kind in weights))[:MOST_KINDS]
    return kinds, grid


def _time_map(selections: Sequence[SelectionRecord], shape: tuple[int, ...], end: int) -> Tensor:
    """(bins, bins) float32: the share of the run that the elements of each bin were in the subnet."""
    stops = [*(selection.step for selection in selections[1:]), end]
    pairs = zip(selections, stops, strict=True)
    maps = [map_of(selection, shape) * ((stop - selection.step) / end) for selection, stop in pairs]
    return torch.stack(maps).sum(0)


def map_of(selection: SelectionRecord, shape: tuple[int, ...]) -> Tensor:
    """(bins, bins) float32: the share of each bin's elements that is in the subnet; of experts, the mean over them."""
    down, across = (min(size, BINS) for size in shape[-2:])
    rows, cols = (
        _density(i, n, b) for i, n, b in ((selection.rows, shape[-2], down), (selection.cols, shape[-1], across))
    )
    return torch.einsum("er,ec->rc", rows, cols) / rows.shape[0]


def _density(indices: Tensor, size: int, bins: int) -> Tensor:
    """(1, bins), or (E, bins) of experts, float32: the share of each bin's indices that is chosen."""
    bin_of = torch.arange(size, device=indices.device) * bins // size
    table = indices.reshape(-1, indices.shape[-1])
    ones = torch.ones(table.shape, device=table.device)
    chosen = ones.new_zeros(table.shape[0], bins).scatter_add_(1, bin_of[table], ones)
    return chosen / torch.bincount(bin_of, minlength=bins)


def _coverage(record: RunRecord, group: int) -> tuple[list[int], list[float]]:
    """Steps, and the share of the group's elements that had been in a subnet by then."""
    names = record.groups[group]
    sizes = [math.prod(record.shapes[name]) for name in names]
    shares = [coverage_of(record.selections[name], record.shapes[name]) for name in names]
    steps = [selection.step for selection in record.selections[names[0]]]
    whole = [sum(map(math.prod, zip(sizes, step, strict=True))) / sum(sizes) for step in zip(*shares, strict=True)]
    return [*steps, _end(record)], [*whole, whole[-1]]


def coverage_of(selections: Sequence[SelectionRecord], shape: tuple[int, ...]) -> list[float]:
    """After each selection, the share of the weight's elements that had been in the subnet by then."""
    reached = torch.zeros(shape, dtype=torch.bool, device="cpu")
    shares = []
    for selection in selections:
        scatter(reached, selection.rows, selection.cols, reached.new_ones(()))
        shares.append(int(reached.sum()) / reached.numel())
    return shares


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean without the pull of a start at zero."""
    smooth: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth


def _end(record: RunRecord) -> int:
    return max(1, len(record.steps))


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
