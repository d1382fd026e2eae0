"""Shows a model's graphs before and after each pass, as text, JSON, DOT, GraphML, GEXF or ONNX."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losia_fx.config import COMPILERS
from losia_fx.passes import FORWARD_STAGES, JOINT_STAGES

from ..load_model import HELP
from ..losia_options import add_losia_options, config_of

if TYPE_CHECKING:
    from .capture import Captured
    from .documents import Document

FORMATS = ("text", "json", "dot", "graphml", "gexf", "onnx")
STYLES = {
    "rewritten": "bold yellow",
    "planned": "yellow",
    "added": "cyan",
    "remade": "green",
    "part": "yellow",
    "heading": "bold",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=HELP)
    add_losia_options(parser, COMPILERS, "inductor")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--stage",
        help=f"{', '.join(FORWARD_STAGES)}; {', '.join(JOINT_STAGES)}; forward or backward (default: all)",
    )
    shown.add_argument(
        "--layer",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="only these modules (layers.0, q_proj, ...) and what is next to them",
    )
    shown.add_argument("--format", choices=FORMATS, default="text", help="default: %(default)s")
    shown.add_argument("--out", type=Path, metavar="PATH", help="file, or folder for a file a graph (default: print)")
    shown.add_argument("--no-weights", action="store_true", help="ONNX: shapes of the weights only, a small file")


def run(args: argparse.Namespace) -> int:
    from losia_fx.errors import ConfigError  # heavy imports cost seconds that --help should not

    from ..load_model import load_model
    from .capture import capture
    from .documents import check_file, documents, one_document, write_documents

    if args.format == "onnx":
        return _export(args)
    if args.no_weights:
        raise ConfigError(f"--no-weights: is about ONNX, not --format {args.format}")
    if args.out is not None and args.format in ("text", "json"):
        check_file(args.out)
    loaded = load_model(args.model)
    captured = capture(loaded.model, loaded.example, config_of(args))
    found = documents(captured, args.stage, args.layer)
    if args.out is not None:
        for path in write_documents(captured, found, args.format, args.out):
            print(path)
    elif args.format == "text" and sys.stdout.isatty():
        _print_coloured(captured, found)
    else:
        sys.stdout.write(one_document(captured, found, args.format))
    return 0


def _export(args: argparse.Namespace) -> int:
    from losia_fx.errors import ConfigError

    from ..load_model import load_model
    from .onnx_export import export_onnx

    for option in ("stage", "layer"):
        if getattr(args, option):
            raise ConfigError(f"--{option}: an ONNX file holds the whole model's forward; leave it out")
    if args.out is None:
        raise ConfigError("--format onnx: name the file with --out")
    loaded = load_model(args.model)
    for path in export_onnx(
        loaded.model, loaded.example, args.out, config=config_of(args), weights=not args.no_weights
    ):
        print(path)
    return 0


def _print_coloured(captured: Captured, found: list[Document]) -> None:
    from rich.console import Console
    from rich.text import Text

    from .documents import lines

    console: Any = Console()
    for line, status in lines(captured, found):
        console.print(Text(line, style=STYLES.get(status, "")), soft_wrap=True)
