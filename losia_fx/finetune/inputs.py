"""What a fine-tuning run starts from: model, tokenizer, text and a device, and the settings that depend on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from losia_fx.errors import ConfigError

from .command import (
    CHECKPOINTS_OF_A_RUN,
    DEFAULT_LR,
    EMBEDDED_LR,
    LONGEST_PERIOD,
    ROUNDS,
    FinetuneSettings,
    inductor_obstacle,
)
from .ranks import Ranks
from .report import Names
from .text import held_out_blocks, ignore, read_documents, split, standard_library, token_blocks

HELD_OUT_BLOCKS = 128  # enough that before and after differ by far more than the sample does


@dataclass(frozen=True)
class RunData:
    """Token blocks (n, seq_length): to train on, to judge by; and what to call their sources."""

    train: Tensor
    new: Tensor
    old: Tensor | None
    names: Names


def check_device(settings: FinetuneSettings) -> None:
    if settings.device is None:
        return
    try:
        torch.empty(1, device=settings.device)
    # torch has no common error for "no such device": a bad name, a build without CUDA, a GPU that is not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {settings.device}: {str(error).splitlines()[0]}") from None


def load(settings: FinetuneSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and tokenizer in the folder; nothing is ever fetched from a network."""
    folder = settings.model_folder
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {folder}: is no folder with a transformers checkpoint (it has no config.json)")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=getattr(torch, settings.dtype)
        )
    # whatever transformers finds wrong with a folder, from a missing file to a foreign architecture
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"--model {folder}: cannot be loaded as a causal language model: {error}") from error
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and settings.seq_length > limit:
        raise ConfigError(f"--seq-length {settings.seq_length}: this model has positions for {limit} tokens")
    return model, tokenizer


def settle(settings: FinetuneSettings, model: PreTrainedModel, console: Console, ranks: Ranks) -> FinetuneSettings:
    """The settings with every None filled in for this model, this machine and this process."""
    obstacle = inductor_obstacle() if settings.compiler is None else None
    if obstacle is not None:
        console.print(f"[yellow]{obstacle}: inductor cannot run here, so this run is slower (aot_eager)[/]")
    # transform has not found the groups yet; in a causal language model they are the layers and the head
    groups = model.config.get_text_config().num_hidden_layers + 1
    every = max(1, settings.steps // CHECKPOINTS_OF_A_RUN)
    default_lr = EMBEDDED_LR if settings.model is None else DEFAULT_LR
    return replace(
        settings,
        device=settings.device or (f"cuda:{ranks.local}" if torch.cuda.is_available() else "cpu"),
        checkpoint_every=settings.checkpoint_every or (every if settings.resume else None),
        compiler=settings.compiler or ("inductor" if obstacle is None else "aot_eager"),
        lr=settings.lr or default_lr,
        period=settings.period or min(LONGEST_PERIOD, max(1, settings.steps // (ROUNDS * groups))),
    )


def load_data(
    settings: FinetuneSettings, tokenizer: PreTrainedTokenizerBase, console: Console, ranks: Ranks
) -> RunData:
    """Says what each path of the user's is read as."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    documents = read_documents(settings.data, say) if settings.data else standard_library()
    learnt, held_out = split(documents)
    length = settings.seq_length
    needed = settings.steps * settings.accumulate * settings.batch_size * ranks.size
    old = read_documents(settings.old_texts, say if settings.old_data else ignore) if settings.old_texts else []
    return RunData(
        train=token_blocks(learnt, tokenizer, length, limit=needed, seed=settings.seed),
        new=held_out_blocks(held_out, tokenizer, length, limit=HELD_OUT_BLOCKS),
        old=held_out_blocks(old, tokenizer, length, limit=HELD_OUT_BLOCKS) if old else None,
        names=Names.of(settings),
    )
