"""What a MODEL argument names: a checkpoint folder, a config.json, or ``module:function``; and inputs for a step of it.

>>> loaded = load_model("my_package.models:make")
>>> loaded.model(*loaded.example.args, **loaded.example.kwargs)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from losia_fx.errors import ConfigError
from losia_fx.finetune.settings import EMBEDDED_MODEL
from losia_fx.storage import checkpoint_folder
from losia_fx.storage.checkpoint_folder import load_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARGUMENT = "MODEL"
SEED = 0
MOST_BATCHES = 60  # that are tried until one fits a model
HELP = "folder of a transformers checkpoint, a config.json, or module:function (default: the embedded Llama)"


@dataclass(frozen=True)
class Example:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, value: Any) -> Example:
        """A mapping stands for keyword arguments, a tuple or list for positional ones, anything else for the only one.

        Raises ConfigError where there is no argument at all.
        """
        if isinstance(value, Example):
            return value
        if isinstance(value, Mapping):
            example = cls((), dict(value))
        else:
            example = cls(tuple(value) if isinstance(value, (tuple, list)) else (value,), {})
        if not example.args and not example.kwargs:
            raise ConfigError("example inputs are empty: give a tensor, a tuple of arguments or a dict of keywords")
        return example


@dataclass(frozen=True)
class Loaded:
    name: str
    model: nn.Module
    """A checkpoint's or a configuration's is in training mode; a function's as it was handed over."""
    example: Example


def load_model(text: str | None) -> Loaded:
    """The model that ``text`` names (None: the embedded one) and inputs for it; nothing is fetched from a network.

    A configuration alone gets random weights, the same every time. Raises ConfigError, in one line, for what cannot be
    found or loaded, is no model, or takes no input that we can make.
    """
    if text is None:
        return _from_checkpoint(EMBEDDED_MODEL)
    path = Path(text)
    if path.is_dir():
        return _from_checkpoint(path)
    if path.is_file():
        return _from_config(path)
    if ":" in text:
        return _from_function(text)
    raise ConfigError(
        f"MODEL {text}: no such file or folder; give a checkpoint folder, a config.json or module:function"
    )


# -- a function ------------------------------------------------------------------------------------------------------


def _from_function(text: str) -> Loaded:
    module_name, _, name = text.rpartition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own modules lie in the folder that the command runs in
    try:
        module = importlib.import_module(module_name)
    # whatever the user's module does wrong on its way; ValueError: a name such as ""
    except Exception as error:
        raise ConfigError(f"MODEL {text}: module {module_name!r} cannot be imported: {_said(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"MODEL {text}: module {module_name!r} has no function {name!r}")
    try:
        result = function()
    except Exception as error:
        raise ConfigError(f"MODEL {text}: {name}() raised {_said(error)}") from error
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module) or inputs is None:
        raise ConfigError(
            f"MODEL {text}: {name}() returned {_kind(result)}; return a torch.nn.Module and inputs for it"
        )
    return Loaded(text, model, Example.of(inputs))


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(entry).__name__ for entry in value)})"
    return type(value).__name__


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# -- transformers ----------------------------------------------------------------------------------------------------


def _from_checkpoint(folder: Path) -> Loaded:
    config = load_config(folder, ARGUMENT)
    _turn_cache_off(config)
    name = _class_name(config, folder)
    model = checkpoint_folder.load_model(folder, class_name=name, config=config, argument=ARGUMENT)
    return _with_inputs(str(folder), model, name)


def _from_config(path: Path) -> Loaded:
    config = load_config(path, ARGUMENT)
    _turn_cache_off(config)
    name = _class_name(config, path)
    import transformers

    torch.manual_seed(SEED)
    try:
        model = getattr(transformers, name)(config)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        raise ConfigError(f"MODEL {path}: {name} cannot be made from it: {_said(error)}") from error
    return _with_inputs(str(path), model, name)


def _turn_cache_off(config: PretrainedConfig) -> None:
    """Training has no use for it, and it would be an output of the graph."""
    parts: list[Any] = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        if getattr(part, "use_cache", None):
            part.use_cache = False


def _class_name(config: PretrainedConfig, path: Path) -> str:
    """The class that the configuration names; else the first that its model type has for any purpose."""
    import transformers

    classes = _classes(config.model_type)
    names: list[str] = [*(config.architectures or ()), *classes]
    for name in names:
        if hasattr(transformers, name):
            return name
    raise ConfigError(f"MODEL {path}: transformers has no model class for model type {config.model_type!r}")


def _classes(model_type: str) -> dict[str, str]:
    """Names of the model type's classes -> what each is for, in transformers' words; the most telling first."""
    from .tiny.architectures import HEADS, class_names

    found: dict[str, str] = {}
    for head in HEADS:
        names = class_names(head).get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            found.setdefault(name, head)
    return found


def _with_inputs(source: str, model: Any, class_name: str) -> Loaded:
    from .tiny.batch import candidates

    model.train()
    head = _classes(model.config.model_type).get(class_name, "BASE")
    why = "none was found"
    for _, batch in zip(range(MOST_BATCHES), candidates(model, head), strict=False):
        batch = {name: _cast(value, model.dtype) for name, value in batch.items()}
        try:
            torch.manual_seed(SEED)
            model(**batch)
        except Exception as error:  # that is how one finds out what a model takes
            why = f"the last one failed with {_said(error)}"
            continue
        return Loaded(source, model, Example((), batch))
    raise ConfigError(f"MODEL {source}: {class_name} took none of the inputs that were tried; {why}")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
