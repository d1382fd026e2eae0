"""Says what would be trained before it is: weights, groups, the length of a round, and memory by part.

    losia-fx explain my-checkpoint --steps 500 --batch-size 4 --seq-length 512 --measure

Nothing is trained: the model's graphs are captured in one step of a copy. The arithmetic is in forecast.py; --measure
runs three more steps and counts what is really there (measure.py).
"""

from __future__ import annotations

import argparse
import json

from losia_fx.errors import ConfigError

from ..load_model import HELP
from ..losia_options import add_losia_options, config_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=HELP)
    parser.add_argument("--steps", type=int, help="optimizer steps of the run: does a round fit?")
    parser.add_argument("--batch-size", type=int, help="of the step (default: as small as MODEL's inputs are)")
    parser.add_argument("--seq-length", type=int, help="tokens of each of its rows")
    parser.add_argument("--ranks", type=int, help="processes that FSDP2 shards it over: what each holds and sends")
    parser.add_argument("--measure", action="store_true", help="also run some steps, and count")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_losia_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.steps is not None and args.steps < 1:
        raise ConfigError(f"--steps {args.steps}: give a whole number of at least 1")
    if args.ranks is not None and args.ranks < 2:
        raise ConfigError(f"--ranks {args.ranks}: give a whole number of at least 2")
    config = config_of(args)
    from ..graphs.capture import capture
    from ..load_model import load_model
    from .explanation import explain, show
    from .resize import resize

    loaded = load_model(args.model)
    example = resize(loaded.example, args.batch_size, args.seq_length)
    captured = capture(loaded.model, example, config)
    found = explain(loaded.model, captured, example, args.steps, args.measure, args.ranks)
    if args.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found)
    return 0
