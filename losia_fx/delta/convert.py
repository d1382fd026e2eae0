"""``losia-fx delta apply | undo | export``: from a checkpoint folder and a delta file to a new folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel

from losia_fx.console import make_table, say, wide_console
from losia_fx.errors import ConfigError
from losia_fx.storage.atomic import write_files
from losia_fx.storage.checkpoint_folder import load_model, load_tokenizer

from .load import check_weights, find_targets, load_delta
from .lora import Factors, NotHeld, factorize, write_adapter
from .read import DeltaFile


def change(path: Path, folder: Path, out: Path, undo: bool) -> None:
    """Writes the checkpoint in ``folder`` with the delta applied, or undone, to ``out``."""
    with DeltaFile(path) as delta:
        model = _load_base(folder, delta)
    load_delta(model, path, undo=undo)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else None

    def save(draft: Path) -> None:
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)

    write_files(out, save)
    done = "without" if undo else "with"
    say(Console(), f"written to {out}: the checkpoint {done} the changes of {path}")


def export(path: Path, folder: Path, out: Path, rank: int) -> None:
    """Writes the delta as a LoRA adapter of the base checkpoint in ``folder`` to ``out``; says what it loses."""
    console = wide_console()
    with DeltaFile(path) as delta:
        model = _load_base(folder, delta)
        targets = find_targets(model, delta)
        check_weights(delta, targets, undo=False)
        factors, left = factorize(model, delta, targets, rank)
    if not factors:
        raise ConfigError(f"{path}: changes no linear weight: there is nothing that a LoRA could hold")
    write_files(out, lambda draft: write_adapter(draft, folder, model, factors, rank))
    _print_losses(console, factors, left, rank)
    say(console, f"written to {out}: adapter_model.safetensors, adapter_config.json")


def _load_base(folder: Path, delta: DeltaFile) -> PreTrainedModel:
    """The checkpoint in the dtype of the delta: the base as it was trained from."""
    dtypes = {record.dtype for record in delta.records}
    return load_model(folder, dtype=dtypes.pop() if len(dtypes) == 1 else "auto")


def _print_losses(console: Console, factors: Sequence[Factors], left: Sequence[NotHeld], rank: int) -> None:
    table = make_table(f"What a LoRA of rank {rank} loses of the change", "weight", "shape", "energy lost")
    for part in factors:
        table.add_row(escape(part.name), f"{part.b.shape[0]} x {part.a.shape[1]}", _share(part.lost, part.energy))
    console.print(table)
    lost, energy = sum(part.lost for part in factors), sum(part.energy for part in factors)
    say(console, f"{_share(lost, energy)} of the energy of all {len(factors)} weights is lost")
    for other in left:
        say(console, f"not in the adapter: {other.name} ({other.why})", style="yellow")


def _share(lost: float, energy: float) -> str:
    return f"{lost / energy:.3%}" if energy else "0.000%"
