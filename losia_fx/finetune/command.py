"""Fine-tunes a causal language model on text, and says what it learnt, what it forgot and what it cost.

This file is the command: its settings and arguments. What a run starts from is in run_inputs.py, the work in
finetune_job.py, what is shown in run_report.py and run_plots.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, fields
from pathlib import Path

from losia_fx.config import COMPILERS, LosiaConfig
from losia_fx.errors import ConfigError, LosiaError
from losia_fx.storage.checkpoint_folder import check_output

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED_MODEL = ASSETS / "default_model"
EMBEDDED_OLD_TEXT = ASSETS / "old_domain_heldout.txt.gz"
DTYPES = ("float32", "bfloat16")
# The embedded model is 5000 times smaller than what the method is made for, and learns at a rate as much larger.
EMBEDDED_LR = 1e-2
DEFAULT_LR = 5e-5
ROUNDS = 4  # re-selections of each group that a run should have room for
LONGEST_PERIOD = LosiaConfig().period
CHECKPOINTS, RUN_FILE = "checkpoints", "run.json"
"""In --out: the folder of the checkpoints while there are any, and the record of the run."""
CHECKPOINTS_OF_A_RUN = 10  # where it is to be resumable and does not say how often


@dataclass(frozen=True)
class FinetuneSettings:
    """What a run is asked to do. None means: chosen for the model and the machine (see ``run_inputs.settle``).

    steps are optimizer steps, each of accumulate x batch_size blocks of seq_length tokens.
    Raises ConfigError naming the option, its value and what is allowed.
    """

    model: Path | None = None
    data: tuple[Path, ...] = ()
    old_data: tuple[Path, ...] = ()
    out: Path = Path("losia-out")
    overwrite: bool = False
    resume: bool = False
    checkpoint_every: int | None = None
    steps: int = 400
    batch_size: int = 8
    seq_length: int = 128
    accumulate: int = 1
    lr: float | None = None
    rank_factor: float = 0.125
    period: int | None = None
    dtype: str = "float32"
    device: str | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    compiler: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("seq_length", 2), ("accumulate", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: give a whole number of at least {least}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ConfigError(f"--checkpoint-every {self.checkpoint_every}: give a whole number of at least 1")
        if self.lr is not None and not (0 < self.lr < math.inf):
            raise ConfigError(f"--lr {self.lr}: give a number above 0")
        if not 0 < self.rank_factor <= 1:
            raise ConfigError(f"--rank-factor {self.rank_factor}: give a number in (0, 1]")
        if self.period is not None and self.period < 1:
            raise ConfigError(f"--period {self.period}: give a whole number of at least 1")

    @property
    def model_folder(self) -> Path:
        return EMBEDDED_MODEL if self.model is None else self.model

    @property
    def step_tokens(self) -> int:
        return self.accumulate * self.batch_size * self.seq_length

    @property
    def old_texts(self) -> tuple[Path, ...]:
        """Held-out text of what the model knew before; of a model that is not ours only its owner can name it."""
        return (EMBEDDED_OLD_TEXT,) if self.model is None and not self.old_data else self.old_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = FinetuneSettings()
    text = parser.add_argument_group("what to train on what")
    text.add_argument("--model", type=Path, help="folder of a transformers checkpoint (default: the embedded Llama)")
    text.add_argument(
        "--data", type=Path, nargs="+", default=(), metavar="PATH",
        help='plain text, .jsonl or .json (field "text"), or folders (default: the Python standard library)',
    )  # fmt: skip
    text.add_argument("--old-data", type=Path, nargs="+", default=(), metavar="PATH", help="text it must not forget")
    text.add_argument("--out", type=Path, default=default.out, help="folder to write (default: %(default)s)")
    text.add_argument("--overwrite", action="store_true", help="write into --out though it is not empty")
    text.add_argument(
        "--resume", action="store_true",
        help="go on from the last checkpoint of the run in --out (none yet: begin), with the settings it began with",
    )  # fmt: skip
    text.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS",
        help=f"keep the last two checkpoints (default: none; with --resume, {CHECKPOINTS_OF_A_RUN} over the run)",
    )  # fmt: skip

    run = parser.add_argument_group("the run")
    run.add_argument("--steps", type=int, default=default.steps, help="optimizer steps (default: %(default)s)")
    run.add_argument("--batch-size", type=int, default=default.batch_size, help="default: %(default)s")
    run.add_argument("--seq-length", type=int, default=default.seq_length, help="tokens (default: %(default)s)")
    run.add_argument("--accumulate", type=int, default=default.accumulate, help="batches a step (default: %(default)s)")
    run.add_argument("--lr", type=float, help=f"peak (default: {DEFAULT_LR:g}; {EMBEDDED_LR:g} for the embedded model)")
    run.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")

    method = parser.add_argument_group("LoSiA")
    method.add_argument("--rank-factor", type=float, default=default.rank_factor, help="default: %(default)s")
    method.add_argument(
        "--period", type=int,
        help=f"steps in a time slot (default: {ROUNDS} rounds over all groups, {LONGEST_PERIOD} at most)",
    )  # fmt: skip

    machine = parser.add_argument_group("the machine")
    machine.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="default: %(default)s")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    machine.add_argument("--gradient-checkpointing", action="store_true", help="less memory for more time")
    machine.add_argument("--compiler", choices=COMPILERS, help="default: inductor where it can run, else aot_eager")


def run(args: argparse.Namespace) -> int:
    given = {field.name: getattr(args, field.name) for field in fields(FinetuneSettings)}
    settings = FinetuneSettings(**{**given, "data": tuple(args.data), "old_data": tuple(args.old_data)})
    if int(os.environ.get("RANK", 0)) == 0:  # one process looks: the others would find what it has made meanwhile
        check_out(settings)
    try:
        from .job import finetune  # transformers and matplotlib: seconds that --help should not cost
    except ModuleNotFoundError as error:
        raise LosiaError(f"finetune needs {error.name}: install losia-fx[cli]") from None
    return finetune(settings)


def check_out(settings: FinetuneSettings) -> None:
    """Raises ConfigError unless --out can be made, or is empty, or may be written over, or holds a run to resume."""
    out = settings.out
    resumable = (out / CHECKPOINTS).is_dir() or is_finished(out)
    if settings.resume and not settings.overwrite and not resumable and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: holds no run with checkpoints, so there is nothing to --resume")
    check_output(out, settings.model_folder, settings.overwrite or settings.resume)


def is_finished(out: Path) -> bool:
    """Whether a run has come to its end here: its record says so, and its checkpoints are gone."""
    path = out / RUN_FILE
    if not path.is_file() or (out / CHECKPOINTS).is_dir():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8"))["interrupted"] is False
    except (ValueError, KeyError, TypeError):
        return False


def inductor_obstacle() -> str | None:
    """What inductor would miss on this machine (it builds C++ against Python's headers even for a GPU), or None."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h (the package python3-dev or the like)"
    return None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
