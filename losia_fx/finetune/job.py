"""The work of ``losia-fx finetune``: TRL's SFTTrainer around a transformed model.

The order is the one any user would write: data, trainer, ``transform``, callbacks, ``train``. (The trainer comes first
as it makes tokens of the data: only then is it known how many steps there are, and so how long a slot is. Its optimizer
comes in ``train``.) Under torchrun every process runs this; the first alone prints and writes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig

import losia_fx
from losia_fx.console import progress, say
from losia_fx.errors import ConfigError, LosiaError
from losia_fx.method.schedule import recorded_moves, round_length
from losia_fx.storage.atomic import remove_folder, write_file, write_files

from .checkpoints import check_finished, check_identity, folders, newest_whole
from .data import RunData, as_dataset, fingerprint, lengths, load_data, spread, whole_blocks
from .inputs import (
    check_chats,
    choose_device,
    count_groups,
    load,
    marks_turns,
    put_chat_template,
    refused,
    settle,
    sft_config,
    training_options,
)
from .plots import plot_losses, plot_subnets
from .reading import CHAT_COMPLETIONS, CHATS, COMPLETIONS, TEXT, Examples
from .record import RunRecord
from .report import print_table, write_json
from .settings import CONFIG_FILE, RUN_FILE, SHORT, FinetuneSettings, is_finished, write_config
from .trainer import RunCallback, RunTrainer, finish_step_on_interrupt, record_subnets


@dataclass(frozen=True)
class Job:
    """A trainer of a transformed model, what was asked for and chosen, and what is written down about the run."""

    trainer: RunTrainer
    data: RunData
    settings: FinetuneSettings
    steps: int
    record: RunRecord
    console: Console

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return bool(self.trainer.is_world_process_zero())

    def describe(self) -> dict[str, Any]:
        """What the run does, under short names, for its record."""
        config = asdict(losia_fx.controller(self.trainer.model).config)
        short = {SHORT.get(name, name): value for name, value in self.settings.flat().items()}
        size = {"batch_size": self.trainer.args.per_device_train_batch_size}
        return {**config, **size, **short, "steps": self.steps, "device": str(self.trainer.args.device)}


def finetune(settings: FinetuneSettings) -> int:
    """Runs the job; returns 0, or 130 where Ctrl-C cut it short (what was learnt until then is written as well)."""
    console = Console(quiet=int(os.environ.get("RANK", 0)) != 0)
    if settings.resume and is_finished(settings.output_dir):
        check_finished(settings)
        say(console, f"{settings.output_dir} holds a finished run: there is nothing to resume")
        return 0
    started = time.perf_counter()
    on_cpu = choose_device(settings)
    model, tokenizer = load(settings, on_cpu)
    groups = count_groups(model, settings)
    data = load_data(settings, partial(say, console))
    put_chat_template(settings, tokenizer, data.train)
    options = training_options(settings, model, tokenizer.chat_template, data.train, on_cpu)
    trainer = make_trainer(model, tokenizer, data, sft_config(options, settings), settings)
    steps = total_steps(trainer)
    settled = settle(settings, options, model, steps, groups, partial(say, console))
    job = Job(trainer, data, settled, steps, transform(trainer, settled), console)
    make_optimizer(trainer, steps, settings)
    announce(job)
    train(job)
    if job.first:
        write(job, tokenizer)
        print_table(console, job.record, data.names, job.describe(), settings.output_dir, time.perf_counter() - started)
    trainer.accelerator.end_training()
    return 130 if job.record.interrupted else 0


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    args: SFTConfig,
    settings: FinetuneSettings,
) -> RunTrainer:
    """The trainer of the untransformed model, with the tokens of all data.

    Raises LosiaError where none are left, and for options that TRL or what they ask for refuses.
    """
    datasets.disable_progress_bars()
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    tokens = args.max_steps * batch * args.max_length if args.max_steps > 0 and args.max_length else None
    domains = {"new": data.new, "old": data.old} if args.eval_strategy != "no" else {}
    judged = {name: as_dataset(examples) for name, examples in domains.items() if examples is not None}
    if "new" not in judged:  # nothing to hold the old domain against
        args.eval_strategy, judged = "no", {}
    train = as_dataset(data.train, tokens, args.seed)
    try:
        trainer = RunTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=judged if "old" in judged else judged.get("new"),
            processing_class=tokenizer,
        )
    except Exception as error:  # whatever TRL finds wrong with options or data: there is no common base
        for examples in (data.train, data.new):
            if examples is not None:
                check_chats(tokenizer, examples, args.assistant_only_loss and marks_turns(tokenizer.chat_template))
        raise refused("trl.SFTTrainer", error, settings) from error
    keep_what_counts(trainer, data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def keep_what_counts(trainer: RunTrainer, data: RunData) -> None:
    """Full blocks to train on, a part of them to judge by. Raises LosiaError where none are left of either."""
    args = trainer.args
    trainer.train_dataset = whole_blocks(trainer.train_dataset, args)
    if not len(trainer.train_dataset):
        raise LosiaError(f"{data.names.new}: nothing is left to learn within --seq-length {args.max_length}: raise it")
    judged = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"new": trainer.eval_dataset}
    judged = {
        name: whole_blocks(prepared, args, name == "old") for name, prepared in judged.items() if prepared is not None
    }
    judged = {n: d if n == "new" and data.judged_whole else spread(d) for n, d in judged.items()}
    trainer.eval_dataset = judged if "old" in judged else judged.get("new")
    if empty := [name for name, prepared in judged.items() if not len(prepared)]:
        source = {"new": "--eval-data" if data.judged_whole else "what is held out", "old": "--old-data"}[empty[0]]
        raise LosiaError(f"{source}: nothing is left to judge by within --seq-length {args.max_length}: raise it")
    if "old" in judged and args.metric_for_best_model == "loss":
        args.metric_for_best_model = "eval_new_loss"
    losses = ("eval_new_loss", "eval_old_loss") if "old" in judged else ("loss", "eval_loss")
    if args.metric_for_best_model not in (None, *losses):
        raise ConfigError(f"--metric-for-best-model {args.metric_for_best_model}: there are {' and '.join(losses)}")


def total_steps(trainer: RunTrainer) -> int:
    """The optimizer steps of the run, as a Trainer counts them."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = len(trainer.get_train_dataloader())
    updates: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(float(args.num_train_epochs) * updates)


def transform(trainer: RunTrainer, settings: FinetuneSettings) -> RunRecord:
    """Makes the model learn through subnets; the record of the run holds its first ones."""
    model, args = trainer.model, trainer.args
    args.learning_rate = settings.training["learning_rate"]
    args.eval_steps, args.save_steps = settings.training["eval_steps"], settings.training["save_steps"]
    dense = {name: p.shape for name, p in model.named_parameters()}
    losia_fx.transform(model, settings.config())
    trainer.roams = settings.roams and not settings.names_optimizer
    record = RunRecord(
        groups=[list(names) for names in losia_fx.controller(model).groups],
        shapes={name: tuple(dense[name]) for name in losia_fx.subnets(model)},
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        all_parameters=sum(shape.numel() for shape in dense.values()),
        one_of=recorded_moves(losia_fx.controller(model).config),
    )
    record_subnets(model, record, range(len(record.groups)), step=0)
    return record


def make_optimizer(trainer: RunTrainer, steps: int, settings: FinetuneSettings) -> None:
    """Before anything is written or said to begin, so that one that cannot be made is refused like any other option."""
    try:
        trainer.create_optimizer_and_scheduler(steps)
    except Exception as error:  # whatever an optimizer's package finds wrong with its options: there is no common base
        raise refused("the optimizer or its schedule", error, settings) from error


def announce(job: Job) -> None:
    """Says what is about to be trained on, and warns of what the user may not have meant."""
    args, data, prepared = job.trainer.args, job.data, job.trainer.train_dataset
    what = f"{'block' if args.packing else 'example'}{'' if len(prepared) == 1 else 's'}"
    what += f" of {args.max_length} tokens" if args.packing else ""
    judged = job.trainer.eval_dataset
    judged = judged["new"] if isinstance(judged, dict) else judged
    by = f", judging by {len(judged):,} held out" if judged is not None else ""
    batches = len(job.trainer.get_train_dataloader())
    passes = job.steps / max(1, math.ceil(batches / args.gradient_accumulation_steps))
    times = f", {passes:,.0f} times over" if passes >= 2 else ""
    say(job.console, f"training on {len(prepared):,} {what} of {data.names.new}{times}, {_loss_of(job)}{by}")
    if not args.packing and args.max_length is not None:
        _say_cut(job, data.train, prepared)
    if job.settings.show_example:
        show_example(job)
    for warning in _warnings(job):
        say(job.console, f"warning: {warning}", style="yellow")


def _warnings(job: Job) -> Iterator[str]:
    args, steps, example = job.trainer.args, job.steps, job.trainer.train_dataset[0]["input_ids"]
    controller = losia_fx.controller(job.trainer.model)
    config = controller.config
    period, groups = config.period, round_length(config, len(job.record.groups)) // config.period  # that take turns
    if groups * period > steps and config.schedule != "static":
        fits = steps // groups
        advice = f"--period {fits} would fit" if fits else f"give at least {groups} steps"
        yield (
            f"{steps} steps are less than one round ({groups} group{'s' * (groups > 1)} x period {period} = "
            f"{groups * period}), "
            f"so some subnets never move: {advice}"
        )
    head_moves = config.head_rows != "fixed" and any(state.whole_cols for state in controller.states)
    if head_moves and config.count_steps is None and config.head_period is not None and config.head_period > steps:
        yield (
            f"{steps} steps are less than the head's period of {config.head_period}, so it never moves: --head-period "
            f"{steps} would fit"
        )
    if args.warmup_steps >= max(1, steps):
        yield f"--warmup-steps {args.warmup_steps:g}: the learning rate never comes to its peak in {steps:,} steps"
    tokenizer, cut = job.trainer.processing_class, args.max_length is not None and len(example) >= args.max_length
    if job.data.train.chats and not cut and tokenizer.eos_token_id not in example:
        yield (
            f"the chat template never writes {tokenizer.eos_token!r}, so the model does not learn where to end: have "
            "it write {{ eos_token }}, or name the token that ends a turn with --eos-token"
        )


def _loss_of(job: Job) -> str:
    on_turns, shape = job.trainer.args.assistant_only_loss, job.data.train.shape
    if job.trainer.completion_only_loss and shape in (COMPLETIONS, CHAT_COMPLETIONS):
        return "loss on completions"
    if on_turns:
        return "loss on the assistant's turns"
    unmarked = shape == CHATS and not marks_turns(job.trainer.processing_class.chat_template)
    why = " (the chat template marks no turns of the assistant: {% generation %})" if unmarked else ""
    return f"loss on every token{why}"


def _say_cut(job: Job, examples: Examples, prepared: datasets.Dataset) -> None:
    length = job.trainer.args.max_length
    cut = sum(found >= length for found in lengths(prepared))
    left = len(examples.rows) - len(prepared) if examples.shape != TEXT else 0
    if cut:
        say(job.console, f"{cut:,} of them reach --seq-length {length} and end there", style="yellow")
    if left:
        say(job.console, f"{left:,} more have no token with loss within it, and are left out", style="yellow")


def show_example(job: Job) -> None:
    """Prints an example as the model sees it: its tokens as text, and which of them carry loss."""
    example = job.trainer.train_dataset[0]
    ids, labels = example["input_ids"], example["labels"]
    with_loss = [label != -100 for label in labels]
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or with_loss[end] != with_loss[start]:
            part = job.trainer.processing_class.decode(ids[start:end])
            text, start = text + (f">>{part}<<" if with_loss[start] else part), end
    say(job.console, f"an example of {len(ids)} tokens; {sum(with_loss)} carry loss, those between >> and <<:\n{text}")


def train(job: Job) -> None:
    """Prepares the folder, and trains from its beginning or from the newest whole checkpoint; Ctrl-C ends it early."""
    out, trainer = job.settings.output_dir, job.trainer
    options = job.settings.flat()
    data = fingerprint(trainer.train_dataset)
    machine = {"processes": trainer.args.world_size, "device": trainer.args.device.type}
    identity = {"options": options, "data": data, **machine}
    resumed = newest_whole(out, partial(say, job.console)) if job.settings.resume else None
    if resumed is not None:
        check_identity(resumed, identity)
        say(job.console, f"going on after step {resumed.name.partition('-')[2]}")
    trainer.accelerator.wait_for_everyone()
    if job.first:
        prepare_out(out, resumed, options)
    trainer.accelerator.wait_for_everyone()
    trainer.args.eval_on_start = trainer.args.eval_strategy != "no" and resumed is None
    trainer.add_callback(losia_fx.LosiaCallback(trainer))
    done = 0 if resumed is None else int(resumed.name.partition("-")[2])
    with (
        finish_step_on_interrupt(job.console) as interruption,
        progress(job.console, job.steps, done=done, text="compiling", every=0, transient=False) as advance,
    ):
        follower = RunCallback(trainer, job.record, identity, interruption, job.console, resumed, advance)
        trainer.add_callback(follower)
        try:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        except KeyboardInterrupt:
            job.record.interrupted = True
        except ImportError as error:  # of what a Trainer looks for only now
            raise refused("transformers.Trainer", error, job.settings) from error
    best = trainer.state.best_global_step
    if trainer.args.load_best_model_at_end and best not in (None, trainer.state.global_step):
        say(job.console, f"the model is taken back to step {best}, the best by {trainer.args.metric_for_best_model}")


def prepare_out(out: Path, resumed: Path | None, options: Mapping[str, Any]) -> None:
    """Makes the folder; what an earlier run left goes, and so does what was cut short after the one to go on from."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}") from None
    (out / RUN_FILE).unlink(missing_ok=True)
    found = folders(out) if (out / CONFIG_FILE).is_file() else []  # else they are another program's
    for folder in found if resumed is None else found[found.index(resumed) + 1 :]:
        remove_folder(folder)
    write_config(out / CONFIG_FILE, options)


def write(job: Job, tokenizer: PreTrainedTokenizerBase) -> None:
    """The dense checkpoint first: it is what must survive if the disk is full or patience is out."""
    out, record, names, model = job.settings.output_dir, job.record, job.data.names, job.trainer.model

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_files(out, save)
    if record.steps and losia_fx.controller(model).bases is not None:
        # in a folder of its own: servers load every .safetensors file that lies beside a checkpoint
        (out / "delta").mkdir(exist_ok=True)
        losia_fx.save_delta(model, out / "delta" / "delta.safetensors")
    write_file(out / "losses.png", lambda path: plot_losses(path, record, names))
    write_file(out / "subnets.png", lambda path: plot_subnets(path, record))
    write_file(out / RUN_FILE, lambda path: write_json(path, record, names, job.describe()))
    if not record.interrupted and job.settings.resume:  # they were there to go on from; others were asked for
        for folder in folders(out):
            remove_folder(folder)
