"""TRL's trainers around a transformed model: exact, or refused by name, and no warning that a user cannot act on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import losia_fx
from losia_fx import TransformError
from tests.support.twin import refused
from tests.truth.trl_runs import (
    ARGUMENTS,
    OPTIONS,
    PERIOD,
    Restricted,
    Seen,
    assert_learned,
    plain_model,
    tokenizer,
    weights_of,
)

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """Warnings of ours fail a test; others' are not looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", losia_fx.LosiaWarning)
        yield


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    mine = model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


TEXTS = [f"my $x{n} = {n} * shift; print join(', ', @list), $x{n};" for n in range(16)]


def sft(model: nn.Module, out: Path, *callbacks: Any, **more: Any) -> Any:
    args = trl.SFTConfig(output_dir=str(out), **{**ARGUMENTS, "max_steps": 3 * PERIOD, "max_length": 32, **more})
    data = datasets.Dataset.from_dict({"text": TEXTS})
    made = trl.SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=list(callbacks)
    )
    made.train()
    return made


@pytest.mark.parametrize("loss", ["default", pytest.param("dft", marks=pytest.mark.slow)])
def test_sft_is_that_of_a_plain_model_at_the_same_places(loss: str, tmp_path: Path) -> None:
    more = {} if loss == "default" else {"loss_type": loss}
    plain = plain_model()
    model = losia_fx.transform(copy.deepcopy(plain), **OPTIONS)
    before, seen = weights_of(model), Seen(model)
    sft(model, tmp_path, seen, **more)
    assert losia_fx.controller(model).step == 3 * PERIOD
    assert len(losia_fx.controller(model).history) == 3
    assert_learned(model, before)
    sft(plain, tmp_path, Restricted(plain, seen.places), **more)
    assert_same(model, plain)


# -- a reference beside the model ------------------------------------------------------------------------------------

PREFERENCES = {
    "prompt": [f"my $x{n} =" for n in range(16)],
    "chosen": [f" {n} * shift;" for n in range(16)],
    "rejected": [" print print ;" for _ in range(16)],
}


def dpo(model: nn.Module, reference: Any, out: Path, *callbacks: Any, **more: Any) -> Any:
    args = trl.DPOConfig(
        output_dir=str(out), **{**ARGUMENTS, "max_steps": 3 * PERIOD, "max_length": 32, "beta": 1.0, **more}
    )
    made = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=datasets.Dataset.from_dict(PREFERENCES),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )
    made.train()
    return made


SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}


@pytest.mark.parametrize("synchronised", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dpo_is_that_of_a_plain_model_at_the_same_places(synchronised: bool, tmp_path: Path) -> None:
    """The reference a copy of the transformed model where it is kept in step with it, else a plain one."""
    more = SYNC if synchronised else {}
    plain = plain_model()
    model = losia_fx.transform(copy.deepcopy(plain), **OPTIONS)
    reference = copy.deepcopy(model if synchronised else plain)
    before, seen = weights_of(model), Seen(model)
    dpo(model, reference, tmp_path, seen, **more)
    assert losia_fx.controller(model).step == 3 * PERIOD
    assert_learned(model, before)
    expected = copy.deepcopy(plain)
    dpo(plain, expected, tmp_path, Restricted(plain, seen.places), **more)
    assert_same(model, plain)
    assert_same(reference, expected)
    assert synchronised != all(torch.equal(value, before[name]) for name, value in expected.state_dict().items())


def test_a_plain_reference_in_step_with_the_model_is_refused(tmp_path: Path) -> None:
    plain = plain_model()
    model = losia_fx.transform(copy.deepcopy(plain), **OPTIONS)
    texts = ("sync_ref_model", "copy.deepcopy(model)")
    refused(lambda: dpo(model, plain, tmp_path, **SYNC), model, *texts, error=TransformError)
    assert losia_fx.controller(model).step == 0


# -- completions of its own ------------------------------------------------------------------------------------------


def grpo(model: nn.Module, out: Path, *callbacks: Any, **more: Any) -> Any:
    sizes = {"num_generations": 2, "max_completion_length": 6, "max_steps": 2 * PERIOD}
    made = trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(output_dir=str(out), **{**ARGUMENTS, **sizes, **more}),
        train_dataset=datasets.Dataset.from_dict({"prompt": PREFERENCES["prompt"]}),
        processing_class=tokenizer(),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
        callbacks=list(callbacks),
    )
    made.train()
    return made


@pytest.mark.slow
def test_grpo_is_that_of_a_plain_model_at_the_same_places(tmp_path: Path) -> None:
    plain = plain_model()
    model = losia_fx.transform(copy.deepcopy(plain), **OPTIONS)
    before, seen = weights_of(model), Seen(model)
    grpo(model, tmp_path, seen)
    assert losia_fx.controller(model).step == 2 * PERIOD
    assert_learned(model, before)
    grpo(plain, tmp_path, Restricted(plain, seen.places))
    assert_same(model, plain)
