"""Shows what the passes changed in a model's graphs, and the FLOPs and bytes that it saves against full training."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losia_fx.config import COMPILERS

from ..load_model import HELP
from ..losia_options import add_losia_options, config_of

if TYPE_CHECKING:
    from .changes import Diff, LayerDiff, StageDiff


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=HELP)
    add_losia_options(parser, COMPILERS, "inductor")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    shown.add_argument("--out", type=Path, metavar="FILE", help="default: print")
    shown.add_argument("--nodes", action="store_true", help="text: also every node that a pass has touched")


def run(args: argparse.Namespace) -> int:
    from ..load_model import load_model
    from .capture import capture  # heavy imports cost seconds that --help should not
    from .changes import diff
    from .documents import check_file, write_text

    if args.out is not None:
        check_file(args.out)
    loaded = load_model(args.model)
    found = diff(capture(loaded.model, loaded.example, config_of(args)))
    as_json = json.dumps(asdict(found), indent=1)
    content = as_json if args.format == "json" else text(found, nodes=args.nodes)
    if args.out is not None:
        print(write_text(args.out, f"{content}\n"))
    else:
        print(content)
    return 0


def text(found: Diff, *, nodes: bool = False) -> str:
    """The whole as aligned text; nodes: with the names of all nodes that a pass has touched."""
    parts = [f"{found.model}: what the passes changed"]
    parts += [_stage(stage, nodes) for stage in found.stages]
    parts.append(f"rewritten layers (before: full training of the same weights, with {found.compiler}'s partition)")
    parts.append(_table(found))
    parts += [f"note: {note}" for note in found.notes]
    return "\n\n".join(parts)


def _stage(stage: StageDiff, nodes: bool) -> str:
    lines = [
        f"graph {stage.graph}, {stage.before} -> {stage.after}: {len(stage.rewritten)} nodes rewritten, "
        f"{len(stage.added)} added, {len(stage.removed)} removed"
        + (f", {len(stage.remade)} to be made again in the backward" if stage.remade else "")
    ]
    width = max((len(op) for op in stage.ops), default=0)
    lines += [f"  {op:{width}}  {change:+d}" for op, change in stage.ops.items()]
    if nodes:
        lines += [f"  * {old}" + (f" -> {new}" if new != old else "") for old, new in stage.rewritten.items()]
        for mark, names in (("+", stage.added), ("-", stage.removed), ("~", stage.remade)):
            lines += [f"  {mark} {name}" for name in names]
    return "\n".join(lines)


HEAD = ("weight", "shape", "subnet", "group", "used by", "MFLOPs", "->", "saved", "kept bytes", "->", "saved")
LEFT = (0, 4)  # columns of text


def _table(found: Diff) -> str:
    rows = [HEAD, *(_layer(layer) for layer in found.layers)]
    rest = ("all graphs", "", "", "", "", *_costs(found.before.flops, found.after.flops, 1e6))
    rows.append((*rest, *_costs(found.before.saved_bytes, found.after.saved_bytes, 1)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _layer(layer: LayerDiff) -> tuple[str, ...]:
    place: tuple[Any, ...] = (
        layer.weight,
        _shape(layer.shape),
        _shape(layer.subnet),
        layer.group,
        ", ".join(layer.uses),
    )
    flops = _costs(layer.before.flops, layer.after.flops, 1e6)
    return (*map(str, place), *flops, *_costs(layer.before.saved_bytes, layer.after.saved_bytes, 1))


def _costs(before: int, after: int, unit: float) -> tuple[str, str, str]:
    """Before, after, and the share of it that is saved."""
    decimals = 0 if unit == 1 else 2
    saved = f"{100 * (before - after) / before:.1f}%" if before else ""
    return f"{before / unit:,.{decimals}f}", f"{after / unit:,.{decimals}f}", saved


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
