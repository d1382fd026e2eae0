"""A head's input is made again in the backward: what is marked, what is not, and that every gradient is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import losia_fx
from losia_fx.passes import GraphPass, RemakeInputs
from tests.support import table
from tests.support.eight_bits import needs_float8
from tests.support.joint_graphs import Gated, lively, losia, loss_of, plain_gradients, rms
from tests.support.toys import assert_subnet_gradients

Seen = list[list[str]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Of every joint graph, the targets of the nodes that the pass has marked; a second pass finds nothing to do."""
    found: Seen = []

    def marked(graph: fx.Graph) -> set[fx.Node]:
        return {node for node in graph.nodes if "recompute" in node.meta}

    def watched(edit: RemakeInputs, gm: fx.GraphModule) -> PassResult:
        before = marked(gm.graph)
        result = GraphPass.__call__(edit, gm)
        after = marked(gm.graph)
        assert not GraphPass.__call__(edit, gm).modified
        found.append(sorted(str(node.target) for node in after - before))
        return result

    monkeypatch.setattr(RemakeInputs, "__call__", watched)
    return found


class Headed(nn.Module):
    """Blocks, a norm and a head; ``shows``: what the head reads is an output too."""

    def __init__(self, norm: nn.Module, shows: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated(rms()) for _ in range(2))
        self.norm, self.lm_head, self.shows = norm, nn.Linear(16, 24, bias=False), shows

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        y = self.lm_head(x[:, :])
        return (y, x) if self.shows else y


@pytest.mark.parametrize("decompositions", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("norm", "shows", "remade"), [(rms, False, True), (nn.Identity, False, False), (rms, True, False)]
)
def test_exact_and_marked(
    norm: Callable[[], nn.Module], shows: bool, remade: bool, decompositions: str, seen: Seen
) -> None:
    """A residual is no more to be made again than it was kept: nothing elementwise leads to it."""
    torch.manual_seed(2)
    model, x = Headed(norm(), shows).double(), lively(2, 5, 16)
    expected = plain_gradients(model, x)
    ours = losia(model, decompositions)
    assert losia_fx.subnets(ours)["lm_head.weight"].cols.numel() == 16
    for _ in range(2):
        ours.zero_grad()
        loss_of(ours, x).backward()
        assert_subnet_gradients(ours, expected, tolerance=1e-9)
    (marks,) = seen
    assert bool(marks) == remade
    assert all("mm" not in mark for mark in marks)


def test_checkpointed_llama(seen: Seen) -> None:
    """Marks of ours beside those of checkpointed blocks."""
    model, batch = table.build(table.LLAMA, torch.float64), table.batch(table.LLAMA)
    dense = copy.deepcopy(model)
    dense(**batch).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    losia_fx.transform(model.train(), rank_factor=0.25, compiler="aot_eager")
    model(**batch).loss.backward()
    assert_subnet_gradients(model, {name: p.grad for name, p in dense.named_parameters()}, tolerance=1e-9)
    assert any(seen)


def test_an_opaque_norm_is_kept(seen: Seen) -> None:
    """Under aot_eager LayerNorm is one node, which gives its statistics too."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": table.VOCABULARY}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **still, tie_word_embeddings=False))
    losia_fx.transform(model, rank_factor=0.25, compiler="aot_eager")
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert not any(seen)


@needs_float8
def test_packed_weights_are_not_kept_turned_round(seen: Seen) -> None:
    """The backward's products in float8 want copies of them; the forward keeps the weights alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 64), nn.Linear(64, 32))
    losia_fx.transform(model, target="*", rank_factor=0.25, compiler="aot_eager", frozen_products="float8")
    x = torch.randn(16, 32, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).square().sum()
    loss.backward()
    assert sum(marks.count("aten.clone.default") for marks in seen) == 3
    packed = [state.packed.tensors[0] for state in losia_fx.controller(model).states if state.packed is not None]
    weights = [tensor for tensor in kept if tensor.dtype.itemsize == 1]
    assert len(packed) == len(weights) == 3
    places = {each.untyped_storage().data_ptr() for each in packed}
    assert all(weight.untyped_storage().data_ptr() in places for weight in weights)
