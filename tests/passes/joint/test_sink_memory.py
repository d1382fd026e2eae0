"""What is saved for the backward once the gathers have moved: as much as for a frozen model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx.passes import RemakeInputs, SinkGathers
from tests.architectures.test_exact import recorded_bytes, storages
from tests.support import table
from tests.support.joint_graphs import BLOCKS, WIDTH, Stack, drawn, lively, losia


def kept_by(model: nn.Module, *known: Tensor) -> int:
    return recorded_bytes(lambda: model(*known), storages(model, *known))


@pytest.mark.parametrize(
    "name", ["rms, q k v", "gated", "gated by relu", "gated by tanh", "gelu", "silu", "squared relu"]
)
def test_nothing_is_kept_for_a_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen model's forward keeps as much; without the pass, the inputs' columns come on top."""
    model, x = drawn(Stack(BLOCKS[name])), lively(2, 5, WIDTH, dtype=torch.float32)
    frozen = torch.compile(copy.deepcopy(model).requires_grad_(False), backend="aot_eager")
    floor = recorded_bytes(lambda: frozen(x), storages(frozen, x))
    assert floor <= kept_by(losia(model), x) <= 1.03 * floor
    monkeypatch.setattr(SinkGathers, "apply", lambda self, gm: 0)
    assert kept_by(losia(model), x) > 1.03 * floor


def test_a_llama_keeps_what_a_frozen_one_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RemakeInputs, the head's input comes on top."""
    model, batch = table.build(table.LLAMA), table.batch(table.LLAMA, size=4, length=16)
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.get_input_embeddings().requires_grad_(True)
    compiled = torch.compile(frozen, backend="aot_eager")
    floor = recorded_bytes(lambda: compiled(**batch).loss, storages(frozen))
    heads = batch["input_ids"].numel() * model.lm_head.in_features * 4

    def ours() -> int:
        twin = losia_fx.transform(copy.deepcopy(model), compiler="aot_eager", trainable="*embed_tokens*")
        return recorded_bytes(lambda: twin(**batch).loss, storages(twin))

    assert floor < ours() <= 1.03 * floor < floor + heads
    monkeypatch.setattr(RemakeInputs, "apply", lambda self, gm: 0)
    assert floor + heads <= ours() <= 1.03 * floor + heads
    monkeypatch.setattr(SinkGathers, "apply", lambda self, gm: 0)
    assert ours() > 1.03 * floor + heads
