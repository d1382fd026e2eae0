"""TRL's SFTTrainer with a compiled head, and what follows its run: the record, the progress, Ctrl-C."""

from __future__ import annotations

import copy
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

import losia_fx
from losia_fx.console import say
from losia_fx.method.schedule import checked_steps, chosen_apart, reselecting_groups
from losia_fx.method.transfers import copies
from losia_fx.optim import SubnetRMS

from .checkpoints import seal, take_up
from .record import Evaluation, Move, RunRecord, SelectionRecord, StepRecord
from .report import step_line

LINES_WITHOUT_TERMINAL = 10


class RunTrainer(SFTTrainer):  # type: ignore[misc]  # trl has no types for it
    """SFTTrainer whose loss is the model's own, and which keeps what a step came to.

    TRL takes the head's weight by hand, in pieces: exact, but outside of the compiled graph.
    """

    step_loss: Tensor | float = 0.0
    step_tokens = 0
    """Of the micro-batches since the last optimizer step, in this process."""
    optimizer: Optimizer | None
    roams = False
    """Whether the optimizer is SubnetRMS, which roaming subnets are made for."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.roams and self.optimizer is None:
            self.optimizer = self._subnet_rms()
        found: Optimizer = super().create_optimizer(model)
        return found

    def _subnet_rms(self) -> SubnetRMS:
        """With norms and biases, where they learn, not decaying, as a Trainer has it."""
        model, args = self.model, self.args
        optimizer = SubnetRMS(model, args.learning_rate, weight_decay=args.weight_decay)
        decays = set(self.get_decay_parameter_names(model))
        still = {id(parameter) for name, parameter in model.named_parameters() if name not in decays}
        (group,) = optimizer.param_groups
        if others := [parameter for parameter in group["params"] if id(parameter) in still]:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in still]
            optimizer.add_param_group({"params": others, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.args.loss_type != "nll" or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        whole = {**inputs, "use_cache": False}
        return Trainer.compute_loss(self, model, whole, return_outputs, num_items_in_batch)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Text of the old domain is always packed: of a long one that is cut off, next to nothing would be judged."""
        if dataset_name == "old":
            args, packing = copy.copy(args), True
            args.packing_strategy = "wrapped"
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        tokens = inputs["input_ids"].numel()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss, self.step_tokens = self.step_loss + loss, self.step_tokens + tokens
        return loss

    def _run_epoch(self, **kwargs: Any) -> None:
        """A Trainer that resumes from the checkpoint of its last step makes another step before it looks."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a README.md beside every checkpoint; here only what is asked for is written."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)

    def take_step(self) -> tuple[float, int]:
        """(mean loss, tokens) of the step that was made, over all processes."""
        loss = self._mean(self.step_loss)
        tokens, self.step_loss, self.step_tokens = self.step_tokens * self.args.world_size, 0.0, 0
        return loss, tokens

    def any_process(self, flag: bool) -> bool:
        """Whether any process has set ``flag``: all of them hear the same, so all stop at the same step."""
        return flag if self.args.world_size == 1 else self._mean(float(flag)) > 0

    def _mean(self, value: Tensor | float) -> float:
        here = torch.as_tensor(value, dtype=torch.float32, device=self.args.device)
        return float(self.accelerator.reduce(here, "mean"))


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed: training ends after the step it is in."""

    requested: bool = False


class RunCallback(TrainerCallback):
    """Records every step, evaluation and re-selection, shows them, and completes the checkpoints.

    It comes after LosiaCallback, whose file it seals. resumed: the checkpoint that the run goes on from. advance: what
    moves the bar.
    """

    def __init__(
        self,
        trainer: RunTrainer,
        record: RunRecord,
        identity: Mapping[str, Any],
        interruption: Interruption,
        console: Console,
        resumed: Path | None,
        advance: Callable[[str], None],
    ) -> None:
        self.trainer, self.record, self.identity, self.interruption = trainer, record, identity, interruption
        self.console, self.resumed, self.advance = console, resumed, advance
        self._began, self._rate = 0.0, 0.0
        self._group: int | None = None
        self._losses: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resumed is not None:
            take_up(self.resumed, self.trainer.model, self.record)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began, self._group = time.perf_counter(), losia_fx.controller(self.trainer.model).active
        self._rate = float(self.trainer.lr_scheduler.get_last_lr()[0])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        loss, tokens = self.trainer.take_step()
        seconds = time.perf_counter() - self._began
        self.record.steps.append(StepRecord(step, loss, self._rate, seconds, tokens / seconds, self._group))
        follow_subnets(self.trainer.model, self.record, step)
        self._show(step, state.max_steps)
        if last and args.eval_strategy != "no":
            control.should_evaluate = True
        if self.trainer.any_process(self.interruption.requested) and not last:
            self.record.interrupted = control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def _show(self, step: int, steps: int) -> None:
        line = step_line(self.record, self.record.steps[-1])
        self.advance(line)
        if not self.console.is_terminal and step % max(1, steps // LINES_WITHOUT_TERMINAL) == 0:
            say(self.console, f"step {step}/{steps}  {line}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Of two domains a Trainer evaluates one after the other, the new one first."""
        self._losses |= kwargs["metrics"]
        pair = isinstance(self.trainer.eval_dataset, dict)
        new, old = self._losses.get("eval_new_loss" if pair else "eval_loss"), self._losses.get("eval_old_loss")
        if new is not None and (old is not None or not pair):
            self.record.evaluations.append(Evaluation(state.global_step, new, old))
            self._losses = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        record_moves(self.trainer.model, self.record, state.global_step)  # those that waited for their turn

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # every process writes its generator's state there
        if args.should_save:
            seal(
                Path(str(args.output_dir), f"checkpoint-{state.global_step}"),
                self.trainer.model,
                self.record,
                self.identity,
            )


def follow_subnets(model: nn.Module, record: RunRecord, step: int) -> None:
    """Records the re-selections that this step made, if any; of groups that all move at once, one round in a while."""
    config = losia_fx.controller(model).config
    if config.schedule != "all" or step % checked_steps(config) == 0:
        record_moves(model, record, step)


def record_moves(model: nn.Module, record: RunRecord, step: int) -> None:
    """Of each group the last since the last that is recorded, if any."""
    controller = losia_fx.controller(model)
    last = record.moves[-1].step if record.moves else -1
    events = list(itertools.takewhile(lambda event: event.step > last, reversed(controller.history)))[::-1]
    last_of = {group: event for event in events for group in _groups_of(event, controller)}
    moves = [Move(event.step, group, event.moved, event.captured) for group, event in last_of.items()]
    record.moves += (moves := sorted(moves, key=lambda move: (move.step, move.group)))
    for since, some in itertools.groupby(moves, lambda move: move.step):
        record_subnets(model, record, [move.group for move in some], since)


def _groups_of(event: losia_fx.Event, controller: losia_fx.Controller) -> list[int]:
    if event.group is not None:
        return [event.group]
    head = next((state.group for state in controller.states if state.whole_cols), None)
    due = reselecting_groups(controller.config, len(controller.groups), event.step - 1, head)
    return [group for group in due if group != head or not chosen_apart(controller.config)]


def record_subnets(model: nn.Module, record: RunRecord, groups: Iterable[int], step: int) -> None:
    names, subnets = list(itertools.chain.from_iterable(record.groups[g] for g in groups)), losia_fx.subnets(model)
    # copies: a re-selection overwrites rows and cols in place
    found = iter(copies([index for name in names for index in (subnets[name].rows, subnets[name].cols)]))
    for name in names:
        record.selections.setdefault(name, []).append(SelectionRecord(step, next(found), next(found)))


@contextmanager
def finish_step_on_interrupt(console: Console) -> Iterator[Interruption]:
    """The first Ctrl-C only asks, so that no weight is left half written; the second raises at once."""
    interruption = Interruption()

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True
        console.print("[yellow]finishing this step, then saving (Ctrl-C again: at once)[/]")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may hold handlers
        yield interruption
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
