"""What a fine-tuning run starts from: device, model, tokenizer, and every option that nobody gave."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from losia_fx.config import LosiaConfig
from losia_fx.errors import ConfigError
from losia_fx.model.blocks import find_blocks, group_names
from losia_fx.model.roles import plan_model
from losia_fx.storage.checkpoint_folder import load_causal_lm, load_tokenizer

from .reading import COMPLETIONS, TEXT, Examples, Say
from .settings import FinetuneSettings, flag

EMBEDDED_STEPS, EMBEDDED_LENGTH = 400, 128
ROUNDS = 4  # re-selections of each group that a run should have room for
LONGEST_PERIOD = LosiaConfig().period
CHECKPOINTS_OF_A_RUN, EVALUATIONS = 10, 4
MACHINE = ("use_cpu", "bf16", "ddp_find_unused_parameters", "disable_tqdm", "log_level_replica")
"""Chosen for the machine that runs: what repeats a run does not say them, so that it may be another one."""
# The rates that were good for the embedded model and, by the method's authors, for one of seven billion parameters
# (arXiv 2507.04487); in between and beyond it is the line through both on a scale of logarithms.
SMALL_RATE, SMALL_SIZE, LARGE_RATE, LARGE_SIZE = 1e-2, 1.3e6, 5e-5, 7e9


def choose_device(settings: FinetuneSettings) -> bool:
    """Whether to run on the CPU; a GPU that is named is the only one this process sees, as a Trainer takes all it sees.

    Raises ConfigError for a device that is not there.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if settings.device is None and (several or not torch.cuda.is_available()):
        return not torch.cuda.is_available()
    try:
        device = torch.device(settings.device or "cuda")
        if device.type != "cuda":
            torch.empty(1, device=device)
    # torch has no common error for "no such device": a bad name, a build without it, a device that is not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {settings.device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        index, count = device.index or 0, torch.cuda.device_count()
        if index >= count:
            raise ConfigError(f"--device {settings.device}: there are {count} CUDA devices here")
        if not several:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if visible[0] else str(index)
    return device.type == "cpu"


def load(settings: FinetuneSettings, on_cpu: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and tokenizer in the folder; nothing is ever fetched from a network."""
    folder = settings.model_folder
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, getattr(torch, settings.dtype or default_dtype(settings, on_cpu)))
    if tokenizer.eos_token is None:
        raise ConfigError(f"--model {folder}: its tokenizer has no eos_token, so no example could end")
    limit, length = _positions(model), settings.training.get("max_length")
    if limit is not None and length is not None and length > limit:
        raise ConfigError(f"{flag('max_length')} {length}: this model has positions for {limit} tokens")
    return model, tokenizer


def default_dtype(settings: FinetuneSettings, on_cpu: bool) -> str:
    """bfloat16 where the device has it; float32 on a CPU, and where fp16 or no bf16 is asked for."""
    wanted = settings.training.get("bf16", not settings.training.get("fp16", False))
    return "bfloat16" if wanted and not on_cpu and torch.cuda.is_bf16_supported() else "float32"


def put_chat_template(settings: FinetuneSettings, tokenizer: PreTrainedTokenizerBase, data: Examples) -> None:
    """Gives the tokenizer the template that is named. Raises ConfigError where chats have none, or it does not fit."""
    path = settings.training.get("chat_template_path")
    if path is not None:
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {path}: cannot be read: {error}") from None
    if not data.chats:
        return
    if tokenizer.chat_template is None:
        raise ConfigError("the data holds chats, and the tokenizer has no template for them: give --chat-template FILE")
    first = data.rows[0]
    messages = first["prompt"] + first["completion"] if data.shape == COMPLETIONS else first["messages"]
    try:
        tokenizer.apply_chat_template(messages, tokenize=False, tools=first.get("tools"))
    except Exception as error:  # a template raises what it likes
        which = f"--chat-template {path}" if path is not None else "the tokenizer's chat template"
        raise ConfigError(f"{which}: does not fit the first example: {error}") from None


def training_options(
    settings: FinetuneSettings, model: PreTrainedModel, template: str | None, data: Examples, on_cpu: bool
) -> dict[str, Any]:
    """The fields of SFTConfig that are given, and those that this command chooses otherwise than TRL does.

    What depends on the number of steps comes in ``settle``.
    """
    embedded, given = settings.model is None, dict(settings.training)
    length = EMBEDDED_LENGTH if embedded else min(1024, _positions(model) or 1024)
    chosen = {
        "max_length": length,
        "per_device_eval_batch_size": given.get("per_device_train_batch_size", 8),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "bf16": not given.get("fp16") and not on_cpu and torch.cuda.is_bf16_supported(),
        "use_cpu": on_cpu,
        "gradient_checkpointing": False,
        "packing": data.shape == TEXT,
        "packing_strategy": "wrapped",
        "assistant_only_loss": data.chats and re.search(r"{%-?\s*generation", template or "") is not None,
        "eval_strategy": "steps",
        "save_strategy": "steps" if settings.keeps_checkpoints else "no",
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "log_level_replica": "error",  # else every process but the first says what transformers thinks of
    }
    if embedded and "max_steps" not in given and "num_train_epochs" not in given:
        chosen["max_steps"] = EMBEDDED_STEPS
    return {**chosen, **given}


def settle(
    settings: FinetuneSettings, options: Mapping[str, Any], model: PreTrainedModel, steps: int, groups: int, say: Say
) -> FinetuneSettings:
    """The settings with every option filled in that depends on the model and on how many steps the run has.

    Says which rate and period were chosen, where the compiler is not the fastest, and where the head stays frozen.
    """
    kept = {name: value for name, value in options.items() if name not in MACHINE or name in settings.training}
    training, losia = kept, dict(settings.losia)
    parameters = sum(p.numel() for p in model.parameters())
    training.setdefault("learning_rate", SMALL_RATE if settings.model is None else default_rate(parameters))
    losia.setdefault("period", min(LONGEST_PERIOD, max(1, steps // (ROUNDS * groups))))
    training.setdefault("eval_steps", max(1, steps // EVALUATIONS))
    best = training["eval_steps"] if training.get("load_best_model_at_end") else max(1, steps // CHECKPOINTS_OF_A_RUN)
    training.setdefault("save_steps", best)  # what is to be the best one has to be judged and saved at once
    if "compiler" not in losia:
        obstacle = inductor_obstacle()
        losia["compiler"] = "inductor" if obstacle is None else "aot_eager"
        if obstacle is not None:
            say(f"{obstacle}: inductor cannot run here, so this run is slower (aot_eager)")
    say(
        f"learning rate {training['learning_rate']:g}, period {losia['period']}: for {parameters / 1e6:,.1f} million "
        f"parameters, {steps:,} steps and {groups} groups"
    )
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    if tied and not losia.get("train_tied_head"):
        say("the output head shares its weight with the embedding, so it stays as it is: --train-tied-head trains it")
    return replace(settings, losia=losia, training=training)


def count_groups(model: PreTrainedModel, settings: FinetuneSettings) -> int:
    """Of subnets that re-select together, as transform finds them. Raises ConfigError for a pattern that fits none."""
    plans = [p for p in plan_model(model, LosiaConfig(**settings.losia)) if p.trained == "subnet"]
    heads = [plan.name for plan in plans if plan.whole_cols]
    return max(1, len(group_names([plan.name for plan in plans], heads, find_blocks(model))))


def default_rate(parameters: int) -> float:
    """By the size of the model, to one digit; nothing beyond the two ends."""
    slope = math.log(LARGE_RATE / SMALL_RATE) / math.log(LARGE_SIZE / SMALL_SIZE)
    rate: float = SMALL_RATE * (max(parameters, SMALL_SIZE) / SMALL_SIZE) ** slope
    return round(rate, -math.floor(math.log10(rate)))


def inductor_obstacle() -> str | None:
    """What inductor would miss on this machine (it builds C++ against Python's headers even for a GPU), or None."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h (the package python3-dev or the like)"
    return None


def sft_config(options: Mapping[str, Any], settings: FinetuneSettings) -> SFTConfig:
    """trl.SFTConfig. Raises ConfigError with what it says of a wrong value."""
    known = {option.name for option in fields(SFTConfig)}
    fixed = {**options, "output_dir": str(settings.output_dir), "seed": settings.seed, "dataset_text_field": "text"}
    fixed.pop("chat_template_path", None)  # the tokenizer has it already
    if "activation_checkpointing" in known:  # its name since transformers 5.2x, which warns of the older one
        for name in ("", "_kwargs"):
            old, new = "gradient_checkpointing" + name, "activation_checkpointing" + name
            if fixed.get(new) is None:
                fixed[new] = fixed.get(old)
            fixed[old] = None
    try:
        return SFTConfig(**fixed)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(f"trl.SFTConfig: {error}") from None


def _positions(model: PreTrainedModel) -> int | None:
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found
