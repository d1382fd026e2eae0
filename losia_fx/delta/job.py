"""The work of ``losia-fx delta apply | undo | export``: from a checkpoint folder and a delta file to a new folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from losia_fx.errors import ConfigError

from .apply import check_weights, find_targets, load_delta
from .lora import Factors, NotHeld, factorize, write_adapter
from .read import DeltaFile
from .show import say, wide_console


def change(path: Path, folder: Path, out: Path, undo: bool) -> None:
    """Writes the checkpoint in ``folder`` with the delta applied, or undone, to ``out``."""
    with DeltaFile(path) as delta:
        model = load_model(folder, delta)
    load_delta(model, path, undo=undo)
    model.save_pretrained(out)
    if (folder / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(out)
    done = "without" if undo else "with"
    say(Console(), f"written to {out}: the checkpoint {done} the changes of {path}")


def export(path: Path, folder: Path, out: Path, rank: int) -> None:
    """Writes the delta as a LoRA adapter of the base checkpoint in ``folder`` to ``out``; says what it loses."""
    console = wide_console()
    with DeltaFile(path) as delta:
        model = load_model(folder, delta)
        targets = find_targets(model, delta)
        check_weights(delta, targets, undo=False)
        factors, left = factorize(model, delta, targets, rank)
    if not factors:
        raise ConfigError(f"{path}: changes no linear weight: there is nothing that a LoRA could hold")
    write_adapter(out, folder, model, factors, rank)
    _print_losses(console, factors, left, rank)
    say(console, f"written to {out}: adapter_model.safetensors, adapter_config.json")


def load_model(folder: Path, delta: DeltaFile) -> PreTrainedModel:
    """The checkpoint in the class that it names and in the dtype of the delta: the base as it was trained from.

    Nothing is ever fetched from a network. Raises ConfigError naming the folder.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {folder}: is no folder with a transformers checkpoint (it has no config.json)")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtypes = {record.dtype for record in delta.records}
    dtype: torch.dtype | str = dtypes.pop() if len(dtypes) == 1 else "auto"
    try:
        names = AutoConfig.from_pretrained(folder, local_files_only=True).architectures or ()
        kinds = [getattr(transformers, name, None) for name in names]
        known = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
        kind = known[0] if known else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_pretrained(folder, local_files_only=True, dtype=dtype)
    # whatever transformers finds wrong with a folder, from a missing file to a foreign architecture
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"--model {folder}: cannot be loaded: {error}") from error
    return model


def _print_losses(console: Console, factors: Sequence[Factors], left: Sequence[NotHeld], rank: int) -> None:
    table = Table(title=f"What a LoRA of rank {rank} loses of the change", title_justify="left")
    table.add_column("weight", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("energy lost", justify="right")
    for part in factors:
        table.add_row(escape(part.name), f"{part.b.shape[0]} x {part.a.shape[1]}", _share(part.lost, part.energy))
    console.print(table)
    lost, energy = sum(part.lost for part in factors), sum(part.energy for part in factors)
    say(console, f"{_share(lost, energy)} of the energy of all {len(factors)} weights is lost")
    for other in left:
        say(console, f"not in the adapter: {other.name} ({other.why})", style="yellow")


def _share(lost: float, energy: float) -> str:
    return f"{lost / energy:.3%}" if energy else "0.000%"
