"""transformers' Trainer as people use it: low-rank optimizers, a learning-rate finder first, the best weights last."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn, optim
from transformers import TrainerCallback

import losia_fx
from tests.loop.test_trainer import LossToy, trainer_of
from tests.support.toy_runs import assert_same
from tests.support.twin import STILL, Twin, assert_subnets, subnets_of, warned

MOVING: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2}
MOVING |= {"importance": "random", "rewarm": False}
PLAIN_RUN: dict[str, Any] = {
    "max_steps": 7,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Of ours, nothing is said."""
    with warned() as said:
        yield
    assert not said


def model_of(seed: int = 1, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A transformed model, and what it was."""
    torch.manual_seed(seed)
    plain = LossToy(layers=1).double()
    return losia_fx.transform(copy.deepcopy(plain), **{**MOVING, **options}), plain


# -- optimizers that the Trainer makes -------------------------------------------------------------------------------


class Beside(TrainerCallback):
    """Trains a twin on the batches that the model has seen, and holds the two against each other after each step."""

    def __init__(self, model: nn.Module, plain: nn.Module, make: Any) -> None:
        self.model, self.twin = model, Twin(plain, subnets_of(model))
        self.optimizer = make(self.twin.parameters())
        self.seen: list[dict[str, Tensor]] = []
        self.moved: list[str] = []
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        if torch.is_grad_enabled():
            self.seen.append({key: kwargs[key] for key in ("input_ids", "labels")})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (inputs,) = self.seen
        self.seen.clear()
        self.twin(**inputs)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        kept = {name: self.optimizer.state[value].get("seed") for name, value in self.twin.values.items()}
        for name in self.twin.follow(subnets_of(self.model), self.optimizer):
            self.moved.append(name)
            self.optimizer.state[self.twin.values[name]] = {"seed": kept[name]}
        assert losia_fx.controller(self.model).step == state.global_step
        assert_subnets(self.model, self.twin)


@pytest.mark.parametrize("name", ["apollo_adamw", "apollo_adamw_layerwise"])
def test_a_low_rank_optimizer_trains_the_subnets(name: str, tmp_path: Path) -> None:
    """They are in its group of other parameters; its group of linear weights is frozen, and has no gradient."""
    package = pytest.importorskip("apollo_torch")
    model, plain = model_of()
    beside = Beside(model, plain, lambda p: package.APOLLOAdamW(p, lr=5e-3))
    trainer = trainer_of(model, tmp_path, optim=name, optim_target_modules="all-linear", **PLAIN_RUN)
    trainer.add_callback(beside)
    trainer.train()
    assert losia_fx.controller(model).step == 7
    assert beside.moved


# -- before the training ---------------------------------------------------------------------------------------------


def steps(model: nn.Module, optimizer: optim.Optimizer, batches: list[Tensor], rate: float | None = None) -> None:
    for number, ids in enumerate(batches):
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate * 2**number
        model(ids, ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> optim.Optimizer:
    return optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


@pytest.mark.parametrize("trained", [0, 3])
def test_a_learning_rate_finder_that_puts_everything_back(trained: int, tmp_path: Path) -> None:
    """As Lightning's does: all to a file, steps of growing rate, all from the file. Training goes on to the bit."""
    batches = [torch.randint(1, 40, (2, 6)) for _ in range(8)]
    runs = []
    for finds in (False, True):
        model, _ = model_of(importance="mixed", period=3, rewarm=True)
        optimizer = adamw(model)
        steps(model, optimizer, batches[:trained])
        if finds:
            parts = (model.state_dict(), optimizer.state_dict(), losia_fx.state_dict(model))
            torch.save(parts, tmp_path / "before.pt")
            steps(model, optimizer, batches, rate=1e-3)
            weights, moments, state = torch.load(tmp_path / "before.pt", weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            losia_fx.load_state_dict(model, state)
            assert losia_fx.controller(model).step == trained
        steps(model, optimizer, batches[trained:])
        runs.append(model)
    assert_same(*runs)


# -- after the training ----------------------------------------------------------------------------------------------


def test_the_best_model_at_the_end(tmp_path: Path) -> None:
    """The weights are those of the checkpoint, the subnets what these hold where they are now; and both learn on."""
    model, plain = model_of()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    options = {
        **PLAIN_RUN,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        **best,
    }
    trainer = trainer_of(model, tmp_path, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert len(losia_fx.controller(model).history) == 3
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    plain.load_state_dict(saved)
    twin = Twin(plain, subnets_of(model))
    assert_subnets(model, twin, 0)
    ids = torch.randint(1, 40, (2, 6))
    torch.testing.assert_close(model(ids, ids)["logits"], twin(ids, ids)["logits"])
    mine, expected = adamw(model), optim.AdamW(twin.parameters(), lr=5e-3)
    for _ in range(3):
        steps(model, mine, [ids])
        steps(twin, expected, [ids])  # type: ignore[arg-type]
        twin.follow(subnets_of(model), expected)
        assert_subnets(model, twin)


def test_an_evaluation_between_the_steps_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for evaluates in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        model, _ = model_of(**STILL)
        trainer_of(model, tmp_path, **{**PLAIN_RUN, **evaluates}).train()
        runs.append(model)
    assert_same(*runs)
