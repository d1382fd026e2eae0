"""What a fresh process pays: the imports, and losia's first step with a cold and with a warm compiler cache."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from losia_fx.errors import LosiaError

from .clock import compile_time
from .losia_methods import build_idle
from .methods import COMPILED
from .sizes import Setup, Size

PROCESSES = 3
"""The imports are timed in so many processes; the medians count."""
IMPORTS = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import losia_fx
print(middle - start, time.perf_counter() - middle)
"""
FIRST_STEP = "import sys; from losia_fx.tools.bench.starts import print_first_step; print_first_step(*sys.argv[1:])"
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def import_times() -> dict[str, float]:
    """Seconds for torch, and for losia_fx after it."""
    found = [[float(word) for word in _answer([IMPORTS]).split()] for _ in range(PROCESSES)]
    torch_s, losia_s = (statistics.median(times) for times in zip(*found, strict=True))
    return {"torch": torch_s, "losia_fx, after torch": losia_s}


@contextmanager
def new_cache() -> Iterator[None]:
    """Inductor's cache is an empty one inside, for this process and those that it starts."""
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE]
            if before is not None:
                os.environ[CACHE] = before


def warm_start(size: Size, device: torch.device) -> list[float]:
    """Seconds that losia's compiled first step takes longer than its second, in two processes with one new cache."""
    arguments = [FIRST_STEP, json.dumps(asdict(size)), str(device)]
    with new_cache():
        return [float(_answer(arguments)) for _ in range(2)]


def print_first_step(size: str, device: str) -> None:
    """What a process of warm_start does. size: a Size's fields as JSON."""
    torch.set_num_threads(1)
    trial = build_idle(Setup.of(Size(**json.loads(size)), torch.device(device)), COMPILED)
    print(compile_time(trial.step))


def _answer(arguments: list[str]) -> str:
    """The last line that ``python -c`` with these arguments prints. Raises LosiaError where it fails."""
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LosiaError(f"a process of the bench failed: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout.splitlines()[-1]
