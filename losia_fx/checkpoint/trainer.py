"""LosiaCallback: a transformers Trainer saves, resumes and reports what LoSiA does.

Imported by ``losia_fx.LosiaCallback`` only: transformers takes seconds to import and is no dependency of the library.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from losia_fx.api.views import controller
from losia_fx.errors import LosiaWarning, StateError

from .state import load_state, save_state

FILE = "losia_state.safetensors"
"""In checkpoint-N, beside the Trainer's own files."""


class LosiaCallback(TrainerCallback):
    """Writes the LoSiA state into every checkpoint-N, goes on from it, and logs the subnets' moves.

    checkpoint: the folder that train(resume_from_checkpoint=...) is given, where that is not a checkpoint in
    args.output_dir (a Trainer does not tell its callbacks).
    Logs, to whatever the Trainer reports to: losia/active_group (-1 where none or all are profiled) with every log, and
    at a re-selection losia/group, losia/moved and losia/captured (see losia_fx.Event).

    Raises StateError where a checkpoint is resumed whose LoSiA state is missing, damaged or not of its weights.

    >>> trainer = Trainer(model=losia_fx.transform(model), args=args, train_dataset=data)
    >>> trainer.add_callback(losia_fx.LosiaCallback(trainer))
    """

    def __init__(self, trainer: Trainer, checkpoint: str | Path | None = None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint
        self._logged = 0
        """How many of the controller's events have been logged."""
        self._saved = -1
        """The step of the last checkpoint."""
        self._told = False
        """It was said that a checkpoint lacks the weights."""

    @property
    def _model(self) -> nn.Module:
        model = self.trainer.model
        assert isinstance(model, nn.Module)
        return model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            self._resume(_folder(args, state) if self.checkpoint is None else Path(self.checkpoint))
        self._logged = len(controller(self._model).history)

    def _resume(self, folder: Path) -> None:
        if not (folder / FILE).is_file():
            raise StateError(
                f"{folder / FILE}: no such file, so training cannot go on from there. A checkpoint in another folder "
                "is named in LosiaCallback(trainer, checkpoint=...); one that was cut short, or was saved without "
                "this callback, cannot be resumed"
            )
        load_state(self._model, folder / FILE)
        controller(self._model).check_weights()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._complete(args, state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._complete(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._complete(args, state, control)

    def _complete(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """With enable_jit_checkpoint a Trainer that is told to end saves at once, and says so to nobody."""
        stopped = control.should_training_stop and getattr(args, "enable_jit_checkpoint", False)
        if stopped and self._saved != state.global_step:
            self._save(args, state, (_folder(args, state) / FILE).exists())  # that of an earlier run, not of this one

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save(args, state)

    def _save(self, args: TrainingArguments, state: TrainerState, there: bool = False) -> None:
        """All ranks together. there: the folder has a state, which stays."""
        folder, self._saved = _folder(args, state), state.global_step
        # Trials of a hyperparameter search save elsewhere, and never resume.
        writes = args.should_save and folder.is_dir() and not there
        if writes or controller(self._model).sharded:
            save_state(self._model, folder / FILE, writes)
        if writes and not self._told and _holds_adapters_alone(folder):
            self._told = True
            warnings.warn(
                f"losia_fx: {folder} holds PEFT's adapters alone, and nothing of what the subnets have learnt in the "
                "weights beneath: training cannot go on from it. model.state_dict() has all of it; of a model "
                "transformed with track_delta=True, losia_fx.save_delta(model, path) saves what was learnt there",
                LosiaWarning,
                stacklevel=2,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._complete(args, state, control)
        followed, due = controller(self._model), control.should_log
        at_once = followed.config.schedule == "all"
        if at_once and not due:  # what may move with every step is told as often as the Trainer logs, the last of each
            return
        fresh, self._logged = followed.history[self._logged :], len(followed.history)
        for event in {event.group: event for event in fresh}.values() if at_once else fresh:
            logs = {"losia/group": -1 if event.group is None else event.group, "losia/moved": event.moved}
            self.trainer.log(logs if event.captured is None else {**logs, "losia/captured": event.captured})
        if due:
            self.trainer.log({"losia/active_group": -1 if followed.active is None else followed.active})
        control.should_log = due  # any log takes it back, and the Trainer's own, of the loss, is still to come


def _holds_adapters_alone(folder: Path) -> bool:
    names = {file.name.partition(".")[0].partition("-")[0] for file in folder.iterdir()}
    return "adapter_model" in names and not names & {"model", "pytorch_model"}


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")
