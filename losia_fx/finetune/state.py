"""Checkpoints of a fine-tuning run, from which it goes on to the bit after a crash.

Each is a folder of three files, checked to the last bit when read: the model's weights; the LoSiA state; and the
optimizer with everything else. A folder is written under another name and renamed when it is on the disk, so the newest
is always whole. What is random in a step is drawn from the seed and the step's number, so no generator is in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from losia_fx.api.views import controller
from losia_fx.checkpoint.state import load_state, save_state
from losia_fx.delta.history import history_tensors, restore_history
from losia_fx.errors import StateError, listed
from losia_fx.storage.atomic import remove_folder, write_folder
from losia_fx.storage.tensors import read_tensors, write_tensors

from .command import CHECKPOINTS, FinetuneSettings
from .record import Evaluation, Move, RunRecord, Selection, StepRecord

WEIGHTS, LOSIA, RUN = "weights.safetensors", "losia.safetensors", "run.safetensors"
KEPT = 2  # checkpoints: the newest, and one more for whoever does not trust it
# what may be another when a run goes on; the text is compared by its tokens
FREE = ("out", "overwrite", "resume", "checkpoint_every", "data", "old_data")


def folders(out: Path) -> list[Path]:
    """The checkpoints of the run in ``out``, oldest first."""
    return sorted((out / CHECKPOINTS).glob("step-*"))


class RunState:
    """What a checkpoint holds, in the objects of the run.

    size: how many processes share a batch. data: the blocks trained on.
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        size: int,
        data: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        record: RunRecord,
    ) -> None:
        self.out, self.model, self.record = settings.out, model, record
        self.optimizer, self.scheduler = optimizer, scheduler
        fixed = {name: value for name, value in asdict(settings).items() if name not in FREE}
        fixed |= {"device": torch.device(str(settings.device)).type, "processes": size}
        tokens = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        self.identity = {"data": tokens, **{name: str(value) for name, value in fixed.items()}}

    def save(self) -> None:
        """Writes a checkpoint of the steps done so far, and removes those that are too old."""

        def write(draft: Path) -> None:
            weights = {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
            tied = _tied(weights)
            write_tensors(draft / WEIGHTS, {n: t for n, t in weights.items() if n not in tied}, {"tied": tied})
            save_state(self.model, draft / LOSIA)
            write_tensors(draft / RUN, *self._run())

        folder = self.out / CHECKPOINTS / f"step-{len(self.record.steps):08d}"
        if not folder.exists():
            write_folder(folder, write)
        for old in folders(self.out)[:-KEPT]:
            remove_folder(old)

    def load(self) -> int:
        """Goes on from the newest checkpoint; returns its number of steps, 0 where there is none.

        Raises StateError where the file is damaged, or is of a run with other settings or other data.
        """
        found = folders(self.out)
        if not found:
            return 0
        folder = found[-1]
        tensors, plain = read_tensors(folder / RUN)
        self._check_identity(folder, plain)
        loaded = read_tensors(folder / WEIGHTS)
        try:
            weights = _read_weights(self.model, *loaded)
            record = _read_record(self.record, plain["record"], tensors)
            optimizer = _read_optimizer(self.optimizer, plain["learning_rates"], tensors)
            schedule = _read_schedule(self.scheduler, plain["scheduler"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise StateError(f"{folder}: does not hold what a checkpoint of this model holds: {error!r}") from None
        load_state(self.model, folder / LOSIA)
        base = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
        restore_history(controller(self.model), base)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(schedule)
        self.record.__dict__.update(record)
        return len(self.record.steps)

    def _check_identity(self, folder: Path, plain: Mapping[str, Any]) -> None:
        before = plain.get("identity")
        if not isinstance(before, dict):
            raise StateError(f"{folder / RUN}: does not say what run it is of")
        if before.get("data") != self.identity["data"]:
            raise StateError(f"{folder}: that run was trained on other text, or on text that has changed since")
        differ = [name for name, value in self.identity.items() if before.get(name) != value]
        if differ:
            texts = [f"--{n.replace('_', '-')} was {before.get(n)} and is {self.identity[n]}" for n in differ]
            raise StateError(f"{folder}: a run goes on with the settings it began with: {listed(texts)}")

    def _run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values of everything that is neither a weight nor LoSiA's."""
        tensors, record = _record_parts(self.record)
        tensors |= {f"base.{name}": tensor for name, tensor in history_tensors(controller(self.model)).items()}
        state = self.optimizer.state_dict()
        for index, entries in state["state"].items():
            kept = {key: torch.as_tensor(value, device="cpu") for key, value in entries.items()}
            tensors |= {f"optimizer.{index}.{key}": value for key, value in kept.items()}
        schedule = {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}
        return tensors, {
            "identity": self.identity,
            "learning_rates": [group["lr"] for group in state["param_groups"]],
            "scheduler": schedule,
            "record": record,
        }


def _read_weights(model: nn.Module, tensors: dict[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = {**tensors, **{name: tensors[owner] for name, owner in plain["tied"].items()}}
    own = model.state_dict()
    wrong = [
        n for n in own.keys() | weights.keys() if n not in own or n not in weights or not _alike(own[n], weights[n])
    ]
    if wrong:
        raise ValueError(f"{listed(sorted(wrong))}: missing, unknown or of another shape or dtype")
    return weights


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _tied(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that share another's memory -> that other's name."""
    first: dict[tuple[int, torch.Size], str] = {}
    owners = {name: first.setdefault((tensor.data_ptr(), tensor.shape), name) for name, tensor in weights.items()}
    return {name: owner for name, owner in owners.items() if owner != name}


def _record_parts(record: RunRecord) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, steps = {}, {}
    for name, selections in record.selections.items():
        steps[name] = [selection.step for selection in selections]
        for number, selection in enumerate(selections):
            tensors[f"selection.{number}.rows.{name}"] = selection.rows
            tensors[f"selection.{number}.cols.{name}"] = selection.cols
    rows = {key: [list(asdict(r).values()) for r in getattr(record, key)] for key in ("steps", "evaluations", "moves")}
    return tensors, {**rows, "selections": steps}


def _read_record(own: RunRecord, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if plain["selections"].keys() != own.selections.keys():
        raise ValueError("its weights are not the model's")
    return {
        "steps": [StepRecord(*row) for row in plain["steps"]],
        "evaluations": [Evaluation(*row) for row in plain["evaluations"]],
        "moves": [Move(*row) for row in plain["moves"]],
        "selections": {
            name: [
                Selection(step, *(tensors[f"selection.{number}.{part}.{name}"] for part in ("rows", "cols")))
                for number, step in enumerate(steps)
            ]
            for name, steps in plain["selections"].items()
        },
    }


def _read_schedule(own: LambdaLR, plain: Mapping[str, Any]) -> dict[str, Any]:
    state = own.state_dict()
    if plain.keys() != state.keys() - {"lr_lambdas"}:
        raise ValueError("its learning rate schedule is another's")
    return {**state, **plain}


def _read_optimizer(optimizer: Optimizer, rates: list[float], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A state_dict for ``optimizer``: its own options, the saved learning rates and tensors."""
    state = optimizer.state_dict()
    for group, rate in zip(state["param_groups"], rates, strict=True):
        group["lr"] = float(rate)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            if tensor.dim() and tensor.shape != parameters[int(index)].shape:
                raise ValueError(f"{name} is of another shape than its parameter")
            entries.setdefault(int(index), {})[key] = tensor
    return {**state, "state": entries}
