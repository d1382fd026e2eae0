"""All that wants a GPU, in one go: the tests marked gpu, and the bench of a model of 7B parameters.

    python -m losia_fx.tools.gpu --out gpu

Writes gpu.json, and gpu.md, which can be put into docs/speed.md as it is; both after each part, so that what one part
found outlives whatever ends the next. Of a run with --only, the other part stays as it is in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from losia_fx.errors import ConfigError, LosiaError

from ..bench.record import environment, write_json, write_text
from ..bench.sizes import SIZES

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("tests", "bench")
METHODS = ("losia", "losia, a block profiled", "lora r=16", "lora r=16, no casts", "lora r=64")
"""Of the bench: all of them, full fine-tuning too, would take an hour, and more memory than most GPUs have."""
OUTCOMES = ("passed", "failed", "skipped")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is well, 1 a test or the bench failed (the files say which), 2 wrong use, 130 interrupted."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(given)
    try:
        return _run(args, given)
    except LosiaError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, given: Sequence[str]) -> int:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} of {sys.executable} sees no GPU; PYTHON=... bash tools/run.sh gpu takes another"
        )
    if not (ROOT / "tests" / "gpu").is_dir():
        raise ConfigError(f"{ROOT}: is no checkout of losia_fx: the tests are not there")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found["command"] = shlex.join(["python", "-m", "losia_fx.tools.gpu", *given])
    found["environment"] = environment(device)
    for part in PARTS if args.only is None else (args.only,):
        found[part] = _tests(args) if part == "tests" else _bench(args)
        write_json(path, found)
        write_text(args.out / "gpu.md", markdown(found))
    print(f"written: {path}, {args.out}/gpu.md")
    return int(any(failures(found)))


def _tests(args: argparse.Namespace) -> dict[str, Any]:
    report = (args.out / "tests.xml").resolve()
    report.unlink(missing_ok=True)
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", args.tests]
    stands_in = {"LOSIA_TEST_DEVICE": args.device} if args.device != "cuda" else {}
    options += [] if args.workers is None else ["-n", str(args.workers), "--dist", "worksteal"]
    start, command = time.monotonic(), [sys.executable, "-m", "pytest", *options]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **stands_in}, check=False).returncode
    cases = list(read_cases(report.read_text())) if report.is_file() else []
    return {"ended": ended, "seconds": round(time.monotonic() - start, 1), "cases": cases}


def read_cases(report: str) -> Iterator[dict[str, Any]]:
    """Every test of pytest's XML: file, name, outcome (of OUTCOMES), seconds, and the first line of what went wrong."""
    for case in ElementTree.fromstring(report).iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        said = "" if wrong is None else wrong.get("message") or ""
        yield {
            "file": str(case.get("classname")).rpartition(".")[2],
            "name": case.get("name"),
            "outcome": "passed" if wrong is None else "skipped" if wrong.tag == "skipped" else "failed",
            "seconds": round(float(case.get("time", 0)), 2),
            "said": " ".join(said.strip().splitlines()[:1]),
        }


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    folder = args.out / "bench"
    options = ["--size", args.size, "--device", args.device, "--modes", *args.modes, "--out", str(folder)]
    options += [] if args.rounds is None else ["--rounds", str(args.rounds)]
    (folder / "bench.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "losia_fx.tools.bench", *options, "--methods", *args.methods]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
    if ended:
        return {"ended": ended}
    record = json.loads((folder / "bench.json").read_text())
    return {"ended": ended, "record": record, "table": (folder / "bench.md").read_text()}


def failures(found: dict[str, Any]) -> list[str]:
    """What went wrong, a line each."""
    tests, bench = found.get("tests", {}), found.get("bench", {})
    bad = [case for case in tests.get("cases", []) if case["outcome"] == "failed"]
    lines = [f"{case['file']}: {case['name']}: {case['said']}" for case in bad]
    lines += [f"pytest ended with {tests['ended']}"] if tests.get("ended") and not bad else []
    lines += [f"the bench ended with {bench['ended']}"] if bench.get("ended") else []
    return lines


def markdown(found: dict[str, Any]) -> str:
    """A section for docs/speed.md: where it ran, the tests by file, what failed, and the bench's own table."""
    facts = {"command": f"`{found['command']}`", **found["environment"]}
    lines = [f"## On a GPU: {found['environment']['machine']}", "", *(f"- {name}: {v}" for name, v in facts.items())]
    if "tests" in found:
        lines += ["", *_tests_table(found["tests"])]
    lines += ["", *(f"- {line}" for line in failures(found))] if failures(found) else []
    table = found.get("bench", {}).get("table")
    return "\n".join(lines) + "\n" + (f"\n### The bench\n\n{table}" if table else "")


def _tests_table(tests: dict[str, Any]) -> Iterator[str]:
    yield f"| tests marked gpu | {' | '.join(OUTCOMES)} | seconds |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for file in dict.fromkeys(case["file"] for case in tests["cases"]):
        mine = [case for case in tests["cases"] if case["file"] == file]
        count = Counter(case["outcome"] for case in mine)
        seconds = sum(case["seconds"] for case in mine)
        yield f"| {file} | {' | '.join(str(count[outcome]) for outcome in OUTCOMES)} | {seconds:.0f} |"
    count = Counter(case["outcome"] for case in tests["cases"])
    yield f"| all | {' | '.join(str(count[outcome]) for outcome in OUTCOMES)} | {tests['seconds']:.0f} |"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m losia_fx.tools.gpu", description=__doc__)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    add = found.add_argument
    add("--only", choices=PARTS, help="one part, beside what the folder has of the other")
    add("--tests", default="tests/gpu", metavar="PATH", help="which of the tests marked gpu (default: all)")
    add("--workers", type=int, metavar="N", help="processes of the tests, all on the one GPU (default: this one alone)")
    add("--size", choices=SIZES, default="7b", help="of the bench's model (default: 7b)")
    add("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=f"of the bench (default: {METHODS})")
    add("--modes", nargs="+", default=["compiled"], help="of the bench (default: compiled)")
    add("--rounds", type=int, metavar="N", help="of the bench, instead of the size's own")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a check of this command without a GPU")
    add("--out", type=Path, default=Path("gpu"), metavar="DIR", help="folder of the results (default: gpu)")
    return found
