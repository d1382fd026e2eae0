"""Folders with a transformers checkpoint: how every command reads one, and what it may write beside it.

Nothing is ever fetched from a network. What is wrong with a folder is a ConfigError that names the argument, the folder
and what to do; without transformers it is a LosiaError. transformers is imported when something is read: it takes
seconds that --help should not cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from losia_fx.errors import ConfigError, LosiaError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CAUSAL_LM = "AutoModelForCausalLM"


def load_config(path: Path, argument: str = "--model") -> PretrainedConfig:
    """The configuration in a folder, or in a file such as config.json."""
    if not path.is_file():
        _check_checkpoint(path, argument)
    transformers = _transformers(path, argument)
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # no JSON, no model_type, an unknown one, a field of a wrong kind
        raise ConfigError(f"{argument} {path}: is no transformers configuration: {_said(error)}") from error
    return config


def load_model(
    folder: Path,
    *,
    class_name: str | None = None,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype | str = "auto",
    argument: str = "--model",
) -> PreTrainedModel:
    """The model in a folder, in evaluation mode on the CPU.

    class_name: of transformers; None: what the checkpoint names, else a causal language model. config: instead of the
    folder's. dtype: "auto" is the checkpoint's own.
    """
    config = load_config(folder, argument) if config is None else config
    transformers = _transformers(folder, argument)
    known = (name for name in config.architectures or () if hasattr(transformers, name))
    class_name = class_name or next(known, CAUSAL_LM)
    try:
        model: PreTrainedModel = getattr(transformers, class_name).from_pretrained(
            folder, config=config, local_files_only=True, dtype=dtype
        )
    # whatever transformers and safetensors find wrong with a folder, from a missing file to a foreign architecture
    except Exception as error:
        kind = "a causal language model" if class_name == CAUSAL_LM else class_name
        raise ConfigError(
            f"{argument} {folder}: cannot be loaded as {kind}: {_said(error)}; name a folder that save_pretrained wrote"
        ) from error
    return model


def load_causal_lm(folder: Path, dtype: torch.dtype | str = "auto", argument: str = "--model") -> PreTrainedModel:
    """The causal language model in a folder, as load_model gives it."""
    return load_model(folder, class_name=CAUSAL_LM, dtype=dtype, argument=argument)


def load_tokenizer(folder: Path, argument: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a checkpoint."""
    _check_checkpoint(folder, argument)
    transformers = _transformers(folder, argument)
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as many ways as there are tokenizers
        raise ConfigError(
            f"{argument} {folder}: has no tokenizer that can be loaded: {_said(error)}; "
            "write one there with tokenizer.save_pretrained"
        ) from error
    return tokenizer


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """Raises ConfigError unless ``out`` can be made, is an empty folder, or may be written over.

    source: the folder of the checkpoint that is read, which is never written over.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; name a folder")
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError(f"--out {out}: is the folder of the model itself; name another")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"--out {out}: is not empty; name another folder, or add --overwrite")


def _check_checkpoint(folder: Path, argument: str) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{argument} {folder}: is no folder with a transformers checkpoint (it has no config.json); "
            "name one that save_pretrained wrote"
        )


def _transformers(path: Path, argument: str) -> Any:
    """transformers, which from now on prints neither warnings nor bars."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise LosiaError(f"{argument} {path}: needs {error.name}: install losia-fx[cli]") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
