"""The work of ``losia-fx finetune``: train in a plain loop, evaluate, write.

The loop is the one any user would write: ``transform``, an ordinary optimizer, backward, step. Everything else here is
about telling what happened and about leaving a usable checkpoint, also after Ctrl-C.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import losia_fx

from .finetune import DEFAULT_LR, FinetuneSettings
from .run_inputs import RunData, check_device, load, load_data, settle
from .run_plots import plot_losses, plot_subnets
from .run_record import Evaluation, Move, RunRecord, Selection, StepRecord, write_safely
from .run_report import print_table, progress_bar, write_json
from .text import batches
from .training import cosine_schedule, held_out_loss

EVALUATIONS = 4  # over the run, besides the one before it


@dataclass(frozen=True)
class Job:
    """A transformed model, what it is trained on, how, and what is written down about it."""

    model: PreTrainedModel
    data: RunData
    settings: FinetuneSettings
    record: RunRecord
    console: Console


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed: the loop ends after the step it is in."""

    requested: bool = False


def finetune(settings: FinetuneSettings) -> int:
    """Runs the job; returns 0, or 130 where Ctrl-C cut it short (what was learnt until then is written as well)."""
    console = Console()
    started = time.perf_counter()
    check_device(settings)
    model, tokenizer = load(settings)
    settings = settle(settings, model, console)
    data = load_data(settings, tokenizer)
    job = Job(model, data, settings, transform(model, settings), console)
    settings.out.mkdir(parents=True, exist_ok=True)
    announce(job)
    with finish_step_on_interrupt(console) as interruption:
        train(job, interruption)
    write(job, tokenizer)
    print_table(console, job.record, data.names, settings, time.perf_counter() - started)
    return 130 if job.record.interrupted else 0


def transform(model: PreTrainedModel, settings: FinetuneSettings) -> RunRecord:
    """Makes the model learn through subnets, on its device; the record of the run holds its first subnets."""
    nn.Module.to(model, torch.device(str(settings.device)))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dense = {name: p.shape for name, p in model.named_parameters()}
    losia_fx.transform(
        model,
        rank_factor=settings.rank_factor,
        period=settings.period,
        seed=settings.seed,
        compiler=settings.compiler,
    )
    record = RunRecord(
        groups=[list(names) for names in losia_fx.controller(model).groups],
        shapes={name: tuple(dense[name]) for name in losia_fx.subnets(model)},
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        all_parameters=sum(shape.numel() for shape in dense.values()),
    )
    _record_subnets(model, record, range(len(record.groups)), step=0)
    return record


def announce(job: Job) -> None:
    """Says what is about to be trained on, and warns where the run ends before every group has moved once."""
    settings, data, say = job.settings, job.data, job.console.print
    blocks = f"{len(data.train):,} blocks of {settings.seq_length} tokens"
    say(f"training on {blocks} of {data.names.new}, judging by {len(data.new):,} held out", soft_wrap=True)
    groups, period = len(job.record.groups), settings.period or 1
    if groups * period > settings.steps:
        fits = settings.steps // groups
        advice = f"--period {fits} would fit" if fits else f"give at least {groups} steps"
        say(
            f"[yellow]warning: {settings.steps} steps are less than one round ({groups} groups x period {period} = "
            f"{groups * period}), so some subnets never move: {advice}[/]",
            soft_wrap=True,
        )


def train(job: Job, interruption: Interruption) -> None:
    """The loop, with an evaluation before it, some within, and one at its end; Ctrl-C ends it early."""
    model, settings, record = job.model, job.settings, job.record
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr or DEFAULT_LR)
    factor = cosine_schedule(settings.steps, warm_up=max(1, settings.steps // 10), floor=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    stream = batches(job.data.train, settings.batch_size, seed=settings.seed)
    pauses = {round(settings.steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    model.train()
    try:
        record.evaluations.append(evaluate(job, step=0))
        with progress_bar(record, settings, job.console) as show:
            for step in range(1, settings.steps + 1):
                if interruption.requested:
                    raise KeyboardInterrupt
                group, started = losia_fx.controller(model).active, time.perf_counter()
                loss = backward(model, itertools.islice(stream, settings.accumulate), settings)
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                lr, seconds = float(scheduler.get_last_lr()[0]), time.perf_counter() - started
                scheduler.step()
                record.steps.append(StepRecord(step, loss, lr, seconds, settings.step_tokens / seconds, group))
                follow_subnets(model, record, step)
                show(record.steps[-1])
                if step in pauses:
                    record.evaluations.append(evaluate(job, step))
    except KeyboardInterrupt:
        record.interrupted = True


def backward(model: PreTrainedModel, micro_batches: Iterator[Tensor], settings: FinetuneSettings) -> float:
    """Gradients of the mean loss over the micro-batches (all of one size); returns that loss."""
    total = torch.zeros((), device=settings.device)
    for batch in micro_batches:
        ids = batch.to(torch.device(str(settings.device)))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss / settings.accumulate
        loss.backward()
        total += loss.detach()
    return total.item()


def evaluate(job: Job, step: int) -> Evaluation:
    size, data = job.settings.batch_size, job.data
    old = None if data.old is None else held_out_loss(job.model, data.old, size)
    return Evaluation(step, held_out_loss(job.model, data.new, size), old)


def follow_subnets(model: PreTrainedModel, record: RunRecord, step: int) -> None:
    """Records the re-selections that this step made, if any."""
    events = losia_fx.controller(model).history[len(record.moves) :]
    record.moves += [Move(event.step, event.group, event.moved, event.captured) for event in events]
    _record_subnets(model, record, [event.group for event in events], step)


def _record_subnets(model: PreTrainedModel, record: RunRecord, groups: Iterable[int], step: int) -> None:
    subnets = losia_fx.subnets(model)
    for name in itertools.chain.from_iterable(record.groups[group] for group in groups):
        # copies: a re-selection overwrites rows and cols in place
        rows, cols = subnets[name].rows.detach().cpu().clone(), subnets[name].cols.detach().cpu().clone()
        record.selections.setdefault(name, []).append(Selection(step, rows, cols))


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


def write(job: Job, tokenizer: PreTrainedTokenizerBase) -> None:
    """The dense checkpoint first: it is what must survive if the disk is full or patience is out."""
    out, record, names = job.settings.out, job.record, job.data.names
    job.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_safely(out / "run.json", lambda path: write_json(path, record, names, job.settings))
    write_safely(out / "losses.png", lambda path: plot_losses(path, record, names))
    write_safely(out / "subnets.png", lambda path: plot_subnets(path, record))
