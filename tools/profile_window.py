"""How many selections change when only the last steps of a slot measure importance (LosiaConfig.profile_steps).

    python -m losia_fx.tools.profile_window --steps 400 --period 50

Fine-tunes as losia-fx finetune does, with whole slots. Beside each slot it gathers what shorter ones would have
gathered from the same gradients, and at its end compares what each would have selected with what was selected.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import losia_fx
from losia_fx.config import COMPILERS, LosiaConfig
from losia_fx.errors import LosiaError
from losia_fx.finetune import DEFAULT_LR, FinetuneSettings
from losia_fx.kernels import update_importance
from losia_fx.localize import fit_gradient, score_of, select_rows, select_subnet, share_moved
from losia_fx.run_inputs import load, load_data, settle
from losia_fx.run_ranks import find_ranks
from losia_fx.state import SubnetState
from losia_fx.text import batches
from losia_fx.training import cosine_schedule

WINDOWS = (1, 2, 5, 10, 20, 30, 40)


@dataclass
class Shorter:
    """What windows shorter than the slot have gathered of it, by window and weight: I and U."""

    config: LosiaConfig
    windows: tuple[int, ...]
    gathered: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, state: SubnetState, step: int) -> None:
        """Before an optimizer step: its G, into each window that is open."""
        profile, seen = state.profile, state.values.grad
        if profile is None or profile.grad is None or seen is None:
            return
        fit = fit_gradient(seen, state.block_of(profile.grad))
        left = self.config.period - step % self.config.period
        for window in self.windows if fit is not None else ():
            if left <= window:
                assert fit is not None
                zeros = (torch.zeros_like(state.weight, dtype=torch.float32) for _ in range(2))
                averages = self.gathered.setdefault((window, state.name), (next(zeros), next(zeros)))
                betas = (self.config.beta1, self.config.beta2)
                update_importance(
                    *averages, state.weight, profile.grad, fit.factor, fit.limit, self.config.importance, betas, False
                )

    def compare(self, state: SubnetState) -> dict[int, float]:
        """After the slot's re-selection: by window, the share of its subnet that is not the one selected."""
        shares = {}
        for window in self.windows:
            averages = self.gathered.pop((window, state.name), None)
            if averages is not None:
                score = score_of(self.config.importance, *averages)
                whole = state.whole_cols
                mine = select_rows(score, state.size[0]) if whole else select_subnet(score, *state.size)
                shares[window] = float(share_moved((state.rows, state.cols), (mine.rows, mine.cols)))
        return shares


def measure(settings: FinetuneSettings, console: Console) -> dict[int, list[float]]:
    """By window: the shares of all selections of the run."""
    ranks = find_ranks()
    model, tokenizer = load(settings)
    settings = settle(settings, model, console, ranks)
    data = load_data(settings, tokenizer, console, ranks)
    nn.Module.to(model, torch.device(str(settings.device)))
    losia_fx.transform(model, period=settings.period, compiler=settings.compiler, seed=settings.seed)
    controller = losia_fx.controller(model)
    shorter = Shorter(controller.config, tuple(w for w in WINDOWS if w < controller.config.period))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=settings.lr or DEFAULT_LR)
    factor = cosine_schedule(settings.steps, warm_up=max(1, settings.steps // 10), floor=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    stream = batches(data.train, settings.batch_size, seed=settings.seed)
    found: dict[int, list[float]] = defaultdict(list)
    model.train()
    for step in track(range(settings.steps), "fine-tuning", console=console):
        ids = next(stream).to(model.device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        members = [state for state in controller.states if state.profile is not None]
        for state in members:
            shorter.take(state, step)
        done = len(controller.history)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if len(controller.history) > done:
            for state in members:
                for window, share in shorter.compare(state).items():
                    found[window].append(share)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    given: dict[str, Any] = {**vars(args), "data": tuple(args.data)}
    console = Console()
    try:
        found = measure(FinetuneSettings(**given), console)
    except LosiaError as error:
        print(f"profile_window: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"profile_window: --steps {args.steps}: no slot of more than one step has ended", file=sys.stderr)
        return 2
    table = Table("profile_steps", "selections", "of a subnet, other than with the whole slot: mean", "least", "most")
    for window, shares in sorted(found.items()):
        cells = (f"{share:.1%}" for share in (fmean(shares), min(shares), max(shares)))
        table.add_row(str(window), str(len(shares)), *cells)
    console.print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    default = FinetuneSettings()
    parser = argparse.ArgumentParser(prog="profile_window", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a transformers checkpoint (default: the embedded Llama)")
    parser.add_argument("--data", type=Path, nargs="+", default=(), metavar="PATH", help="text to train on")
    for option in ("steps", "batch_size", "seq_length", "seed"):
        flag = "--" + option.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(default, option), help="default: %(default)s")
    parser.add_argument("--period", type=int, help="steps in a time slot (default: as losia-fx finetune)")
    parser.add_argument("--lr", type=float, help="peak (default: as losia-fx finetune)")
    parser.add_argument("--compiler", choices=COMPILERS, help="default: inductor where it can run, else aot_eager")
    return parser


if __name__ == "__main__":
    sys.exit(main())
