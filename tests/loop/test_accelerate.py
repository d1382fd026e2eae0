"""accelerate: prepare, accumulate, clip, save_state and load_state; and PyTorch Lightning, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR

import losia_fx
from tests.support.pair import Pair
from tests.support.toy_runs import OPTIONS, PERIOD, adamw, assert_same, batches, learning, toy
from tests.support.toys import Toy, loss_of

STEPS = 3 * PERIOD
SLOW = pytest.mark.slow  # many such variants only add up
FUSED: Any = lambda parameters: optim.AdamW(parameters, lr=5e-3, fused=True)  # noqa: E731
ADAGRAD: Any = lambda parameters: optim.Adagrad(parameters, lr=0.05)  # noqa: E731
FUSED_SGD: Any = lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)  # noqa: E731


def prepared(dtype: torch.dtype, make: Any, seed: int) -> tuple[Accelerator, nn.Module, Any, Any]:
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = toy(dtype, seed)
    optimizer = make(learning(model))
    scheduler = LambdaLR(optimizer, lambda step: 0.98**step)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.register_for_checkpointing(losia_fx.controller(model))
    return accelerator, model, optimizer, scheduler


def run(
    parts: tuple[Accelerator, nn.Module, Any, Any], steps: list[torch.Tensor], saves: Callable[[int], Any], first: int
) -> None:
    """Two micro-batches a step; calls ``saves`` with the number of steps before each."""
    accelerator, model, optimizer, scheduler = parts
    for number, ids in enumerate(steps, first):
        saves(number)
        for part in ids.split(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, part))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (adamw, torch.float32),
        (FUSED, torch.bfloat16),
        pytest.param(ADAGRAD, torch.float32, marks=SLOW),
        pytest.param(FUSED_SGD, torch.float32, marks=SLOW),
    ],
    ids=["adamw", "fused-bfloat16", "adagrad", "fused-sgd"],
)
def test_save_state_and_load_state(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Cut in a slot, at its edge, in rewarming: to the bit."""
    steps, cuts = batches(STEPS), (2, PERIOD, PERIOD + 1)
    whole = prepared(dtype, make, seed=1)
    run(whole, steps, lambda n: n in cuts and whole[0].save_state(str(tmp_path / str(n))), 0)
    assert losia_fx.controller(whole[1]).step == STEPS
    assert len(losia_fx.controller(whole[1]).history) == STEPS // PERIOD
    resumed = prepared(dtype, make, seed=2)
    for cut in cuts:
        resumed[0].load_state(str(tmp_path / str(cut)))
        run(resumed, steps[cut:], lambda n: None, cut)
        assert_same(whole[1], resumed[1])


@pytest.mark.parametrize("make", [ADAGRAD, pytest.param(adamw, marks=SLOW)], ids=["adagrad", "adamw"])
def test_accelerate_takes_the_path_of_the_reference(make: Any) -> None:
    pair = Pair(make)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(pair.optimizer)
    for _ in pair.steps():
        mine, expected = pair.losses(batches(1)[0])
        accelerator.backward(mine)
        expected.backward()
        accelerator.clip_grad_norm_(pair.model.parameters(), 0.3)
        pair.finish(optimizer.step, clip_norm=0.3)


class Resumable:
    """Batches that know how many have been taken: Lightning otherwise begins its epoch again."""

    def __init__(self, steps: list[torch.Tensor]) -> None:
        self.steps, self.taken = steps, 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for ids in self.steps[self.taken :]:
            self.taken += 1
            yield ids

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning")
def test_lightning(tmp_path: Path) -> None:
    """A LightningModule with two hooks of one line each: trains like a plain loop and resumes to the bit."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.model = losia_fx.transform(Toy(), **OPTIONS)

        def training_step(self, ids: torch.Tensor) -> torch.Tensor:
            return loss_of(self.model, ids)

        def configure_optimizers(self) -> Any:
            return adamw(learning(self))

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["losia_fx"] = losia_fx.state_dict(self)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            losia_fx.load_state_dict(self, checkpoint["losia_fx"])

    def trainer(steps: int) -> Any:
        return lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, gradient_clip_val=0.5, default_root_dir=str(tmp_path),
        )  # fmt: skip

    whole, cut = Module(1), PERIOD + 1
    first = trainer(cut)
    first.fit(whole, Resumable(batches(STEPS)))
    first.save_checkpoint(tmp_path / "cut.ckpt")
    resumed = Module(2)
    trainer(STEPS).fit(resumed, Resumable(batches(STEPS)), ckpt_path=tmp_path / "cut.ckpt")

    plain = toy()
    optimizer = adamw(learning(plain))
    for ids in batches(STEPS):
        loss_of(plain, ids).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert losia_fx.controller(resumed).step == STEPS
    assert_same(plain, resumed.model)
