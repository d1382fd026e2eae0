"""Writes one HTML page that shows a model or a run: its layers, what the passes did, where the subnets are, the cost.

    losia-fx page losia-out --out page.html

The page needs no network and no server. MODEL alone shows the first subnets; a RUN, a folder that ``losia-fx finetune``
wrote, shows how they moved, and brings its own rank factor, period and seed. What is in the page is made in
page_data.py; how it looks is in assets/page.html, .css and .js.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from losia_fx.errors import ConfigError, LosiaError

from ..load_model import HELP
from ..losia_options import add_losia_options, config_of

ASSETS = Path(__file__).parent / "assets"
STEPS = 400
"""Of a run that nobody has described: what losia-fx finetune does unasked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL|RUN", help=f"{HELP}; or a folder that finetune wrote")
    parser.add_argument("--out", type=Path, default=Path("losia.html"), help="file to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of the run (default: the run's, or {STEPS})")
    parser.add_argument("--batch-size", type=int, help="of the step that is forecast (default: the run's)")
    parser.add_argument("--seq-length", type=int, help="tokens of each of its rows (default: the run's)")
    add_losia_options(parser)


def run(args: argparse.Namespace) -> int:
    out: Path = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: name a file in a folder that exists")
    if args.steps is not None and args.steps < 1:
        raise ConfigError(f"--steps {args.steps}: give a whole number of at least 1")
    config = config_of(args)
    from losia_fx.storage.atomic import write_file

    from ..plot.run_folder import is_run
    from .sources import of_model, of_run

    step = (args.batch_size, args.seq_length)
    if args.model is not None and is_run(Path(args.model)):
        data = of_run(Path(args.model), config, step, args.steps)
    else:
        data = of_model(args.model, config, step, args.steps or STEPS)
    text = html(data)

    def write(draft: Path) -> None:
        draft.write_text(text, encoding="utf-8")

    write_file(out, write)
    print(out)
    return 0


def html(data: Mapping[str, Any]) -> str:
    """The page with its style, its script and ``data`` inside."""
    # "<" ends a script element as "</script>", wherever it stands in JSON
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = _asset("page.html")
    for mark, text in (
        ("style", _asset("page.css")),
        ("script", _asset("draw.js") + _asset("page.js")),
        ("data", payload),
    ):
        before, found, after = page.partition(f"@@{mark}@@")
        if not found:
            raise LosiaError(f"page.html has no place for its {mark}")
        page = before + text + after
    return page


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
