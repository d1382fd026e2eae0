"""An output head that shares its weight with the embedding: frozen and said, or trained by rows from both uses."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import losia_fx
from losia_fx.runtime.state import states_of
from tests.runtime.test_trajectory import Run
from tests.support import toys
from tests.support.table import Case, ToyWithLoss, toy_tokens

TIED = "embed.weight"
TOY = Case("tied", lambda: ToyWithLoss(tied=True), toy_tokens, 7)
OPTIONS: dict[str, Any] = {"rank_factor": 0.4, "output_rank_factor": 0.25, "train_tied_head": True}


def test_frozen_and_said_by_default() -> None:
    model = toys.Toy(tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is what a user of such a model expects: no warning
        losia_fx.transform(model, compiler="eager")
    assert TIED not in losia_fx.subnets(model)
    assert not model.embed.weight.requires_grad
    report = losia_fx.report(model)
    (row,) = [row for row in report.weights if row.name == TIED]
    assert (row.trained, row.why) == ("frozen", "tied to an embedding: left dense; train_tied_head trains it")
    assert [note for note in report.notes if TIED in note and "tied to an embedding" in note]
    toys.loss_of(model, toys.batch()).backward()
    assert model.embed.weight.grad is None


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradient_of_both_uses(compiler: str, checkpointed: bool) -> None:
    model, ids = toys.Toy(tied=True, checkpointed=checkpointed), toys.batch()
    model = model if compiler == "inductor" else model.double()
    expected = toys.plain_gradients(model, ids)
    alone = copy.deepcopy(model)
    alone.head.weight = nn.Parameter(alone.embed.weight.detach().clone())
    losia_fx.transform(model, schedule="sync", compiler=compiler, **OPTIONS)
    for _ in range(2):
        model.zero_grad()
        toys.loss_of(model, ids).backward()
        toys.assert_subnet_gradients(model, expected)
    subnet = losia_fx.subnets(model)[TIED]
    assert subnet.group == 0
    assert subnet.values.shape == (toys.VOCABULARY // 4, 16)
    of_head = toys.plain_gradients(alone, ids)["head.weight"][subnet.rows]
    assert not torch.allclose(subnet.values.grad.to(of_head), of_head)  # type: ignore[union-attr]
    (state,) = [state for state in states_of(model) if state.name == TIED]
    assert state.profile is not None
    torch.testing.assert_close(state.profile.grad, expected[TIED].float(), rtol=1e-5, atol=1e-7)
    (row,) = [row for row in losia_fx.report(model).weights if row.name == TIED]
    assert row.used == "embedding, linear; full gradient for embedding"


def test_two_rounds_as_the_reference() -> None:
    run = Run(TOY, compiler="eager", options={"train_tied_head": True})
    assert TIED in run.subnets
    run.rounds()


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        toys.loss_of(model, toys.batch()).backward()
        optimizer.step()


def test_state_dict_and_restore_keep_the_tie() -> None:
    model, plain = toys.Toy(tied=True), toys.Toy(tied=True)
    losia_fx.transform(model, compiler="eager", **OPTIONS)
    train(model)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert torch.equal(state[TIED], state["head.weight"])
    plain.load_state_dict(state)
    assert plain.head.weight is plain.embed.weight
    other = losia_fx.transform(toys.Toy(tied=True), compiler="eager", seed=1, **OPTIONS)
    other.load_state_dict(state)
    subnet = losia_fx.subnets(other)[TIED]
    assert torch.equal(subnet.values, state[TIED][subnet.rows])
    restored = losia_fx.restore(model)
    assert restored.head.weight is restored.embed.weight
    ids = toys.batch()
    torch.testing.assert_close(restored(ids), plain(ids))


def test_save_pretrained(tmp_path: Path) -> None:
    model = losia_fx.transform(toys.tiny_llama(tied=True), compiler="eager", **OPTIONS)
    assert "model.embed_tokens.weight" in losia_fx.subnets(model)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = toys.batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
