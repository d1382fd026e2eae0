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
from losia_fx.errors import ConfigError, LosiaError, listed
from losia_fx.method.schedule import counted_steps
from losia_fx.model.blocks import find_blocks, group_names
from losia_fx.model.roles import plan_model
from losia_fx.model.weight_plan import WeightPlan
from losia_fx.storage.checkpoint_folder import load_causal_lm, load_tokenizer

from .reading import CHAT_COMPLETIONS, COMPLETIONS, TEXT, Examples, Say, counted
from .settings import RULES, FinetuneSettings, flag

EMBEDDED_STEPS, EMBEDDED_LENGTH = 400, 128
ROUNDS = 4  # re-selections of each group that a run should have room for
LONGEST_PERIOD = LosiaConfig().period
CHECKPOINTS_OF_A_RUN, EVALUATIONS = 10, 4
MACHINE = ("use_cpu", "bf16", "ddp_find_unused_parameters", "disable_tqdm", "log_level_replica")
"""Chosen for the machine that runs: what repeats a run does not say them, so that it may be another one."""
PLAIN_OPTIONS = ("max_steps", "max_length", "learning_rate", "per_device_train_batch_size", "num_train_epochs")
"""Numbers that are checked here."""
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template that marks the assistant's turns, for who has none."""
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
    except RuntimeError as error:
        raise ConfigError(f"--device {settings.device}: {str(error).splitlines()[0]}") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.type not in ("cpu", "cuda") and (accelerator is None or device.type != accelerator.type):
        there = "cpu" if accelerator is None else f"cpu and {accelerator.type}"  # a Trainer takes no other
        raise ConfigError(f"--device {settings.device}: there is no such device here, only {there}")
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
        raise ConfigError(
            "the data holds chats, and the tokenizer has no template for them: give --chat-template FILE (Jinja). One "
            f"that will do: {TEMPLATE}"
        )
    which = f"--chat-template {path}" if path is not None else "the tokenizer's chat template"
    first = data.rows[0]
    try:
        text = _templated(tokenizer, first)
    except Exception as error:  # a template raises what it likes
        raise ConfigError(f"{which}: does not fit {_place(data, 0)}: {error}") from None
    contents = [message.get("content") or "" for message in _messages(first)]
    if not any(content.strip() and content.strip() in text for content in contents):
        raise ConfigError(f"{which}: writes nothing of what the messages of {_place(data, 0)} say, but {text[:80]!r}")


def check_chats(tokenizer: PreTrainedTokenizerBase, data: Examples, assistant_only: bool) -> None:
    """Finds the chat that TRL could make nothing of: it does not say which. Raises LosiaError naming its place."""
    silent = []
    for number, row in enumerate(data.rows if data.chats else ()):
        try:
            _templated(tokenizer, row)
            found: Any = tokenizer.apply_chat_template(
                _messages(row), tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=assistant_only
            )
        except Exception as error:  # a template raises what it likes
            raise LosiaError(f"{_place(data, number)}: the chat template does not fit it: {error}") from None
        if assistant_only and 1 not in found["assistant_masks"]:
            silent.append(_place(data, number))
    if silent:
        raise LosiaError(
            f"{listed(silent, 8)}: no turn of the assistant, on which alone the loss is: add one, leave the chat out, "
            "or give --assistant-only-loss false"
        )


def _templated(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(_messages(row), tokenize=False, tools=row.get("tools")))


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    return found


def _place(data: Examples, number: int) -> str:
    return data.places[number] if data.places else f"example {number + 1}"


def training_options(
    settings: FinetuneSettings, model: PreTrainedModel, template: str | None, data: Examples, on_cpu: bool
) -> dict[str, Any]:
    """The fields of SFTConfig that are given, and those that this command chooses otherwise than TRL does.

    What depends on the number of steps comes in ``settle``.
    """
    embedded, given = settings.model is None, dict(settings.training)
    if given.get("completion_only_loss") and data.shape not in (COMPLETIONS, CHAT_COMPLETIONS):
        raise ConfigError(f"--completion-only-loss: the data holds {data.shape}, and no prompts with completions")
    length = EMBEDDED_LENGTH if embedded else min(1024, _positions(model) or 1024)
    chosen = {
        "max_length": length,
        "per_device_eval_batch_size": given.get("per_device_train_batch_size", 8),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0 if settings.roams else 0.01,  # every element of W has its turn, so all of it would shrink
        "bf16": not given.get("fp16") and not on_cpu and torch.cuda.is_bf16_supported(),
        "use_cpu": on_cpu,
        "gradient_checkpointing": False,
        "packing": data.shape == TEXT,
        "packing_strategy": "wrapped",
        "assistant_only_loss": data.chats and marks_turns(template),
        "eval_strategy": "steps",
        "save_strategy": "steps" if settings.keeps_checkpoints else "no",
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "log_level_replica": "error",  # else every process but the first says what transformers thinks of
    }
    if embedded and not settings.data and "max_steps" not in given and "num_train_epochs" not in given:
        chosen["max_steps"] = EMBEDDED_STEPS
    return {**chosen, **given}


def marks_turns(template: str | None) -> bool:
    """Whether a chat template says which of its text is the assistant's."""
    return re.search(r"{%-?\s*generation", template or "") is not None


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
    _choose_pace(losia, settings, steps, groups)
    training.setdefault("eval_steps", max(1, steps // EVALUATIONS))
    best = training["eval_steps"] if training.get("load_best_model_at_end") else max(1, steps // CHECKPOINTS_OF_A_RUN)
    training.setdefault("save_steps", best)  # what is to be the best one has to be judged and saved at once
    if "compiler" not in losia:
        obstacle = inductor_obstacle()
        losia["compiler"] = "inductor" if obstacle is None else "aot_eager"
        if obstacle is not None:
            say(f"{obstacle}: inductor cannot run here, so this run is slower (aot_eager)")
    settled = replace(settings, rule=RULES[not settings.roams], losia=losia, training=training)
    config = settled.config()
    head_moves = config.head_rows != "fixed" and any(plan.whole_cols for plan in subnet_plans(model, config))
    say(
        f"learning rate {training['learning_rate']:g}, {_pace(config, head_moves)}: for {parameters / 1e6:,.1f} "
        f"million parameters, {counted(steps, 'step')} and {counted(groups, 'group')}"
    )
    if "max_steps" in settings.training and "num_train_epochs" in settings.training:
        say(f"--steps {steps} goes before --epochs {training['num_train_epochs']:g}")
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    if tied and not losia.get("train_tied_head"):
        say("the output head shares its weight with the embedding, so it stays as it is: --train-tied-head trains it")
    return settled


def _choose_pace(losia: dict[str, Any], settings: FinetuneSettings, steps: int, groups: int) -> None:
    """Such that everything moves some times in the run, in slots that hold the steps that are to be profiled."""
    asked, least = settings.config(), losia.get("profile_steps") or 1
    if not settings.roams:
        turns = 1 if asked.schedule == "all" else groups
        losia.setdefault("period", min(LONGEST_PERIOD, max(least, steps // (ROUNDS * turns))))
    elif asked.head_period is not None:
        losia.setdefault("head_period", min(asked.head_period, max(least, steps // ROUNDS)))
        if asked.profile_steps is not None:
            losia.setdefault("profile_steps", min(asked.profile_steps, max(asked.period, losia["head_period"])))


def _pace(config: LosiaConfig, with_head: bool) -> str:
    counted = counted_steps(config) if config.head_rows == "frequent" else config.head_period
    head = f" (the head's rows chosen after {counted})" if with_head and config.head_period else ""
    if config.schedule != "all" or config.importance != "random":
        return f"period {config.period}{head}"
    every = "every step" if config.period == 1 else f"{config.period} steps"
    return f"subnets drawn anew after {every}{head}"


def subnet_plans(model: PreTrainedModel, config: LosiaConfig) -> list[WeightPlan]:
    return [plan for plan in plan_model(model, config) if plan.trained == "subnet"]


def count_groups(model: PreTrainedModel, settings: FinetuneSettings) -> int:
    """Of subnets that re-select together, as transform finds them. Raises ConfigError for a pattern that fits none."""
    plans = subnet_plans(model, settings.config())
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
    except Exception as error:  # whatever the libraries find wrong with a value: there is no common base
        raise refused("trl.SFTConfig", error, settings) from error


def refused(who: str, error: Exception, settings: FinetuneSettings) -> ConfigError:
    """What a library says of options that it cannot use, and which were given: not every library names its own."""
    said = (
        str(error) if isinstance(error, (ValueError, RuntimeError, ImportError)) else f"{type(error).__name__}: {error}"
    )
    given = {name: value for name, value in settings.training.items() if name not in PLAIN_OPTIONS}
    named = {n: v for n, v in given.items() if n in said or (isinstance(v, str) and v in said)} or given
    options = listed([f"{flag(name)} {value}" for name, value in named.items()], 8)
    return ConfigError(f"{who}: {said}" + (f" (given: {options})" if options else ""))


def _positions(model: PreTrainedModel) -> int | None:
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found
