"""Runs ``losia-fx`` in forked children of a process that has imported everything: a start costs no seconds.

Reads lines of JSON from stdin, {"argv": [...], "kill_after": seconds or null}; answers each with {"code", "seconds"}.
The children draw no pictures. Nothing of torch may have run here before the fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import losia_fx.finetune_job
from losia_fx.cli import main


def draw_nothing(path: Path, *record: Any) -> None:
    path.write_bytes(b"")


def child(argv: list[str]) -> None:
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    code = 99
    try:
        code = main(argv)
    finally:
        os._exit(code)


def run(argv: list[str], kill_after: float | None) -> tuple[int, float]:
    began, pid = time.perf_counter(), os.fork()
    if pid == 0:
        child(argv)
    if kill_after is None:
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), time.perf_counter() - began
    while time.perf_counter() - began < kill_after:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.perf_counter() - began
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL, time.perf_counter() - began


if __name__ == "__main__":
    losia_fx.finetune_job.plot_losses = draw_nothing
    losia_fx.finetune_job.plot_subnets = draw_nothing
    for line in sys.stdin:
        order = json.loads(line)
        code, seconds = run(order["argv"], order["kill_after"])
        print(json.dumps({"code": code, "seconds": seconds}), flush=True)
