"""Fine-tunes a causal language model on your data, and says what it learnt, what it forgot and what it cost.

This file is the command: from its arguments to settings. The arguments are in options.py, the work in job.py.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from losia_fx.errors import ConfigError, LosiaError
from losia_fx.storage.checkpoint_folder import check_output

from . import options
from .settings import CONFIG_FILE, LOSIA_OPTIONS, FinetuneSettings, flag, read_config

NEVER_FETCH = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Nothing comes from a network, or goes there, unless the environment says otherwise (HF_HUB_OFFLINE=0)."""

NO_NULL = {*LOSIA_OPTIONS, *(option.name for option in fields(FinetuneSettings))}
"""Options that a null in YAML leaves as they are by default; for one of SFTConfig it is a value."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(args).items() if name not in ("command", "run", "parser", "config")}
    if (config := getattr(args, "config", None)) is not None:
        given = {**from_config(config, args.parser), **given}
    settings = FinetuneSettings.of(given)
    if int(os.environ.get("RANK", 0)) == 0:  # one process looks: the others would find what it has made meanwhile
        check_out(settings)
    for name, value in NEVER_FETCH.items():
        os.environ.setdefault(name, value)
    try:
        from .job import finetune  # torch, transformers, trl, matplotlib: seconds that a wrong argument should not cost
    except ModuleNotFoundError as error:
        raise LosiaError(f"finetune needs {error.name}: install losia-fx[cli]") from None
    return finetune(settings)


def from_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What a YAML file gives: read as arguments, so that it means, and is refused, the same.

    Raises ConfigError naming the file and the option.
    """
    argv: list[str] = []
    for name, value in read_config(path).items():
        if name in ("config", "help", "help_all"):
            raise ConfigError(f"--config {path}: {name}: a file of options has no such option")
        if value is None and name in NO_NULL:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        if value != []:
            argv += [flag(name), *("none" if v is None else str(v) for v in values)]
    try:
        found = vars(parser.parse_args(argv))
    except LosiaError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    return {name: value for name, value in found.items() if name not in ("command", "run", "parser", "config")}


def check_out(settings: FinetuneSettings) -> None:
    """Raises ConfigError unless --out can be made, or is empty, or may be written over, or holds a run to resume."""
    out = settings.output_dir
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK) or (there != out.absolute() and not there.is_dir()):
        raise ConfigError(f"--out {out}: {there} cannot be written to: name another folder")
    resumable = (out / CONFIG_FILE).is_file()
    if settings.resume and not settings.overwrite and not resumable and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: holds no run with checkpoints, so there is nothing to --resume")
    others = sorted(path.name for path in out.glob("checkpoint-*")) if settings.keeps_checkpoints else []
    if others and settings.overwrite and not resumable:
        raise ConfigError(
            f"--out {out}: holds {others[0]} of another program, which this run would remove: name another"
        )
    check_output(out, settings.model_folder, settings.overwrite or settings.resume)
