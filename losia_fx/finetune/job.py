"""The work of ``losia-fx finetune``: train in a plain loop, evaluate, write.

The loop is the one any user would write: ``transform``, an ordinary optimizer, backward, step. Everything else here is
about telling what happened and about leaving a usable checkpoint, also after Ctrl-C or a crash. Under torchrun every
process runs this, on its share of each batch; the first alone judges, prints and writes.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import losia_fx
from losia_fx.method.schedule import checked_steps
from losia_fx.method.transfers import copies
from losia_fx.storage.atomic import remove_folder, write_file, write_files

from .command import CHECKPOINTS, DEFAULT_LR, RUN_FILE, FinetuneSettings, is_finished
from .inputs import RunData, check_device, load, load_data, settle
from .loss import cosine_schedule, held_out_loss, on_device
from .plots import plot_losses, plot_subnets
from .ranks import Ranks, find_ranks, joined
from .record import Evaluation, Move, RunRecord, Selection, StepRecord
from .report import print_table, progress_bar, write_json
from .state import RunState
from .text import batches

EVALUATIONS = 4  # over the run, besides the one before it


@dataclass(frozen=True)
class Job:
    """A transformed model, what it is trained on, how, by which process, and what is written down about it."""

    model: PreTrainedModel
    data: RunData
    settings: FinetuneSettings
    record: RunRecord
    console: Console
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return torch.device(str(self.settings.device))


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed: the loop ends after the step it is in."""

    requested: bool = False


def finetune(settings: FinetuneSettings) -> int:
    """Runs the job; returns 0, or 130 where Ctrl-C cut it short (what was learnt until then is written as well)."""
    ranks = find_ranks()
    console = Console(quiet=not ranks.first)
    if settings.resume and is_finished(settings.out):
        console.print(f"{settings.out} holds a finished run: there is nothing to resume", soft_wrap=True)
        return 0
    started = time.perf_counter()
    check_device(settings)
    model, tokenizer = load(settings)
    settings = settle(settings, model, console, ranks)
    data = load_data(settings, tokenizer, console, ranks)
    job = Job(model, data, settings, transform(model, settings), console, ranks)
    with joined(ranks, job.device):
        prepare_out(job)
        announce(job)
        with finish_step_on_interrupt(console) as interruption:
            train(job, interruption)
        if ranks.first:
            write(job, tokenizer)
            print_table(console, job.record, data.names, settings, time.perf_counter() - started)
    return 130 if job.record.interrupted else 0


def prepare_out(job: Job) -> None:
    """Makes the folder, and room for checkpoints; those of an earlier run go unless it is to be resumed."""
    out = job.settings.out
    if job.ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        if not job.settings.resume:
            remove_folder(out / CHECKPOINTS)
        if job.settings.checkpoint_every is not None:
            (out / CHECKPOINTS).mkdir(exist_ok=True)
    job.ranks.wait()


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
        track_delta=True,
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
    state = RunState(settings, job.ranks.size, job.data.train, model, optimizer, scheduler, record)
    done = state.load() if settings.resume else 0
    if done:
        job.console.print(f"going on after step {done}", soft_wrap=True)
    stream = micro_batches(job, done)
    pauses = {round(settings.steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    call = job.ranks.wrap(model, job.device)
    model.train()
    try:
        if not done:
            evaluate(job, step=0)
        with progress_bar(record, settings, job.console) as show:
            for step in range(done + 1, settings.steps + 1):
                if job.ranks.any(interruption.requested, job.device):
                    keep(job, state)
                    raise KeyboardInterrupt
                group, started = losia_fx.controller(model).active, time.perf_counter()
                loss = backward(job, call, itertools.islice(stream, settings.accumulate), step)
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                mean = job.ranks.mean(loss)  # waits for the device, which has all of the step's work by now
                lr, seconds = float(scheduler.get_last_lr()[0]), time.perf_counter() - started
                scheduler.step()
                tokens = settings.step_tokens * job.ranks.size / seconds
                record.steps.append(StepRecord(step, mean, lr, seconds, tokens, group))
                follow_subnets(model, record, step)
                show(record.steps[-1])
                if step in pauses:
                    evaluate(job, step)
                if step % (settings.checkpoint_every or settings.steps) == 0:
                    keep(job, state)
    except KeyboardInterrupt:
        record.interrupted = True


def keep(job: Job, state: RunState) -> None:
    """Writes a checkpoint, if the run keeps any and this process is the one that writes."""
    if job.settings.checkpoint_every is not None and job.ranks.first:
        state.save()


def micro_batches(job: Job, done: int) -> Iterator[Tensor]:
    """This process's share of the batches, from those on that ``done`` steps have not used."""
    settings, ranks = job.settings, job.ranks
    stream = batches(job.data.train, settings.batch_size * ranks.size, seed=settings.seed)
    return (ranks.share(batch) for batch in itertools.islice(stream, done * settings.accumulate, None))


def backward(job: Job, call: nn.Module, parts: Iterator[Tensor], step: int) -> Tensor:
    """Gradients of the mean loss over the micro-batches (all of one size) of all processes.

    Returns this process's loss, 0-dim on its device.

    What is random in the model is drawn by the seed, the step and the process, so a run goes on as it would have.
    """
    settings, ranks = job.settings, job.ranks
    torch.manual_seed((settings.seed * 1_000_003 + step) * ranks.size + ranks.rank)
    total = torch.zeros((), device=job.device)
    for number, batch in enumerate(parts, 1):
        ids = on_device(batch, job.device)
        with ranks.quiet(call, last=number == settings.accumulate):
            loss = call(input_ids=ids, labels=ids, use_cache=False).loss / settings.accumulate
            loss.backward()
        total += loss.detach()
    return total


def evaluate(job: Job, step: int) -> None:
    """Records the held-out losses; the first process does it while the others wait at their next gradient."""
    if not job.ranks.first:
        return
    size, data = job.settings.batch_size, job.data
    old = None if data.old is None else held_out_loss(job.model, data.old, size)
    job.record.evaluations.append(Evaluation(step, held_out_loss(job.model, data.new, size), old))


def follow_subnets(model: PreTrainedModel, record: RunRecord, step: int) -> None:
    """Records the re-selections that this step made, if any; of groups that all move at once, one round in a while."""
    controller = losia_fx.controller(model)
    at_once = controller.config.schedule == "all"
    if at_once and step % checked_steps(controller.config):
        return
    last = record.moves[-1].step if record.moves else -1
    events = list(itertools.takewhile(lambda event: event.step > last, reversed(controller.history)))[::-1]
    moves = [
        Move(event.step, group, event.moved, event.captured)
        for event in (events[-1:] if at_once else events)
        for group in (range(len(controller.groups)) if event.group is None else (event.group,))
    ]
    record.moves += moves
    _record_subnets(model, record, [move.group for move in moves], step)


def _record_subnets(model: PreTrainedModel, record: RunRecord, groups: Iterable[int], step: int) -> None:
    names, subnets = list(itertools.chain.from_iterable(record.groups[g] for g in groups)), losia_fx.subnets(model)
    # copies: a re-selection overwrites rows and cols in place
    found = iter(copies([index for name in names for index in (subnets[name].rows, subnets[name].cols)]))
    for name in names:
        record.selections.setdefault(name, []).append(Selection(step, next(found), next(found)))


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

    def save(folder: Path) -> None:
        job.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_files(out, save)
    if record.steps:
        # in a folder of its own: servers load every .safetensors file that lies beside a checkpoint
        (out / "delta").mkdir(exist_ok=True)
        losia_fx.save_delta(job.model, out / "delta" / "delta.safetensors")
    write_file(out / "losses.png", lambda path: plot_losses(path, record, names))
    write_file(out / "subnets.png", lambda path: plot_subnets(path, record))
    write_file(out / RUN_FILE, lambda path: write_json(path, record, names, job.settings))
    if not record.interrupted:
        remove_folder(out / CHECKPOINTS)
