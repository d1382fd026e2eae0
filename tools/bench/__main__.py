"""The command; see the package."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils.logging import set_verbosity_error

from losia_fx.console import progress, wide_console
from losia_fx.errors import ConfigError, LosiaError

from .. import bench as package
from .apart import run_apart
from .catalogue import METHODS
from .clock import Clock, clock_of
from .grow import AXES, BASE, Growth, grow
from .host import REPEATS, host_times, print_host
from .methods import COMPILED, MODES, Method, chosen
from .plot import draw_bench, draw_growth
from .record import Bench, environment, write_json, write_text
from .rounds import Report, entries_of, run
from .schedule import LARGEST, over_rounds, reselection_ms, selection_ms, watched
from .sizes import DTYPES, SIZES, Setup, Size, check_device
from .starts import import_times, new_cache, warm_start
from .table import growth_markdown, markdown, print_table

OVERRIDES = ("layers", "batch", "length", "rank_factor", "dtype", "rounds")
ALL = "all"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 wrong use, 130 interrupted."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(given)
    set_verbosity_error()
    try:
        return _run(args, given)
    except LosiaError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, given: Sequence[str]) -> int:
    if args.host:
        return _host(args, given)
    if args.grow is not None:
        for option, value in (("size", args.size), ("apart", args.apart), ("warm-start", args.warm_start)):
            if value:
                raise ConfigError(f"--grow {args.grow}: measures losia on a base of its own; leave out --{option}")
    overrides = {name: getattr(args, name) for name in OVERRIDES}
    size = (BASE if args.grow is not None else SIZES[args.size or "small"]).with_overrides(overrides)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_device(size, device)
    methods = chosen(METHODS, args.methods)
    _make_folder(args.out)
    torch.set_num_threads(1)
    command = _said(given)
    if args.grow is None:
        _compare(args, size, device, methods, command)
    else:
        _grow(args, size, device, command)
    return 0


def _make_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)


def _said(given: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "losia_fx.tools.bench", *given])


def _host(args: argparse.Namespace, given: Sequence[str]) -> int:
    others = ("size", "layers", "batch", "length", "rank_factor", "dtype", "device", "apart", "warm_start", "grow")
    for option in others:
        if getattr(args, option):
            raise ConfigError(f"--host: measures a model of its own; leave out --{option.replace('_', '-')}")
    repeats = REPEATS if args.rounds is None else args.rounds
    if repeats < 1:
        raise ConfigError(f"--rounds {repeats}: give a whole number of at least 1")
    _make_folder(args.out)
    times = host_times(repeats)
    found = {"command": _said(given), "repeats": repeats, "environment": environment(torch.device("cpu"))}
    write_json(args.out / "host.json", {**found, "times": [asdict(each) for each in times]})
    print_host(wide_console(), times)
    return 0


def _compare(
    args: argparse.Namespace, size: Size, device: torch.device, methods: Sequence[Method], command: str
) -> None:
    console = wide_console()
    clock = clock_of(device)
    entries = entries_of(size, methods, args.modes)
    bench = Bench(command, size, device.type, [entry.row for entry in entries], environment(device))
    with new_cache(), progress(console, file=sys.stderr) as report:
        if args.apart:
            bench.rows = run_apart(size, device, methods, entries, report)
        else:
            setup = Setup.of(size, device)
            run(setup, entries, clock, report)
            _write(args.out, bench)  # what comes now takes minutes of a large model, and somebody may not wait for it
            _follow_schedule(bench, setup, clock, report)
        report("imports in fresh processes")
        bench.import_s = import_times()
        if args.warm_start:
            report("losia's first step in fresh processes")
            bench.warm_start_s = warm_start(size, device)
    _write(args.out, bench)
    print_table(console, bench)
    console.print(f"written: {args.out}/bench.json, bench.md, bench.png", highlight=False)


def _write(out: Path, bench: Bench) -> None:
    write_json(out / "bench.json", bench.as_dict())
    write_text(out / "bench.md", markdown(bench))
    draw_bench(out / "bench.png", bench)


def _follow_schedule(bench: Bench, setup: Setup, clock: Clock, report: Report) -> None:
    for method in watched(bench.rows):
        report(f"two rounds of the schedule: {method}")
        bench.rounds_of_schedule.append(over_rounds(setup, method, COMPILED))
    modes = [row.mode for row in bench.rows if row.steps and row.method == "losia, a block profiled"]
    if modes:
        report("re-selections")
        bench.reselection_ms = reselection_ms(setup, modes[-1], clock)
        rows, cols = LARGEST
        alone = selection_ms(torch.device(bench.device), bench.size.rank_factor)
        bench.reselection_ms[f"a {rows} x {cols} weight by itself"] = alone


def _grow(args: argparse.Namespace, base: Size, device: torch.device, command: str) -> None:
    console = wide_console()
    axes = list(AXES) if args.grow == ALL else [args.grow]
    mode = args.modes[-1]
    with progress(console, file=sys.stderr) as report:
        points = grow(axes, base, device, mode, clock_of(device), report)
    growth = Growth(command, base, environment(device), points)
    write_json(args.out / "grow.json", growth.as_dict())
    write_text(args.out / "grow.md", growth_markdown(growth))
    draw_growth(args.out / "grow.png", points)
    console.print(f"written: {args.out}/grow.json, grow.md, grow.png", highlight=False)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m losia_fx.tools.bench", description=package.__doc__)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    add = found.add_argument
    add("--size", choices=SIZES, help="(default: small) tiny is a check: floor and losia also compiled, all else eager")
    for name in ("layers", "batch", "length", "rounds"):
        add(f"--{name}", type=int, metavar="N", help="instead of the size's own")
    add("--rank-factor", type=float, metavar="P", help="of losia (default: 0.125)")
    add("--dtype", choices=DTYPES, help="of the weights (default: bfloat16)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add(
        "--methods",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="names or patterns (default: all); floors come along",
    )
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="(default: both; --grow takes the last)")
    add("--apart", action="store_true", help="each method in a process of its own, with its floor; the table alone")
    add("--warm-start", action="store_true", help="also losia's first step in fresh processes, cold and warm cache")
    add("--grow", choices=(*AXES, ALL), help="instead of the table: losia along an axis of a smaller model's size")
    add("--host", action="store_true", help="instead of the table: what losia costs the host; --rounds times each")
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="folder of the results (default: bench)")
    return found


if __name__ == "__main__":
    sys.exit(main())
