"""Runs ``losia-fx`` in forked children of a process that has imported everything: a start costs no seconds.

Reads lines of JSON: {"argv": [...], "ranks": how many processes (as torchrun would start them), "kill_after": seconds
or null, "kill_when": a pattern that a file or folder fits, or null, "victim": the rank to kill, or null for all,
"prints": file for what they print, ".<rank>.out" and ".<rank>.err" added}. Answers each with {"codes": by rank,
"seconds"}. The children draw no pictures. Torch may not have run here before the fork.
"""

from __future__ import annotations

import glob
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

import losia_fx.finetune.job
from losia_fx.cli import main


def draw_nothing(path: Path, *record: Any) -> None:
    path.write_bytes(b"")


def child(argv: list[str], rank: int, ranks: int, port: int, prints: str) -> None:
    warnings.simplefilter("ignore")
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{prints}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    code = 99
    try:
        code = main(argv)
    except BaseException:
        traceback.print_exc()
        code = 1  # as the interpreter ends after an exception
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_time(kill_after: float | None, began: float) -> bool:
    return kill_after is not None and time.perf_counter() - began > kill_after


def _is_there(pattern: str | None) -> bool:
    return pattern is not None and bool(glob.glob(pattern))


def run(
    argv: list[str], ranks: int, kill_after: float | None, kill_when: str | None, victim: int | None, prints: str
) -> tuple[list[int], float]:
    began, port, pids, codes = time.perf_counter(), free_port(), {}, dict[int, int]()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            child(argv, rank, ranks, port, prints)
        pids[pid] = rank
    while len(codes) < ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        elif _is_time(kill_after, began) or _is_there(kill_when):
            for other, rank in pids.items():
                if rank not in codes and victim in (None, rank):
                    os.kill(other, signal.SIGKILL)
            kill_after = kill_when = None
        else:
            time.sleep(0.005)
    return [codes[rank] for rank in range(ranks)], time.perf_counter() - began


if __name__ == "__main__":
    losia_fx.finetune.job.plot_losses = draw_nothing
    losia_fx.finetune.job.plot_subnets = draw_nothing
    for line in sys.stdin:
        codes, seconds = run(**json.loads(line))
        print(json.dumps({"codes": codes, "seconds": seconds}), flush=True)
