"""Gathers go up to where a product's input was made: what moves, what stays, and that every gradient is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import losia_fx
from losia_fx import _compat
from losia_fx.passes import GraphPass, SinkGathers
from losia_fx.passes.joint import graph as joint
from tests.support import table
from tests.support.joint_graphs import BLOCKS, WIDTH, Counted, Mlp, Stack, count, drawn, lively, losia, loss_of, rms
from tests.support.joint_graphs import plain_gradients as plain
from tests.support.toys import assert_subnet_gradients

Seen = list[tuple[Counted, Counted]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every joint graph that is made, counted before and after the pass; a second pass finds nothing to do."""
    found: Seen = []

    def watched(edit: SinkGathers, gm: fx.GraphModule) -> PassResult:
        before = count(gm.graph)
        result = GraphPass.__call__(edit, gm)
        after = count(gm.graph)
        assert not GraphPass.__call__(edit, gm).modified
        assert count(gm.graph) == after
        found.append((before, after))
        return result

    monkeypatch.setattr(SinkGathers, "__call__", watched)
    return found


def check(model: nn.Module, x: Tensor, decompositions: str = "aot_eager", **options: Any) -> nn.Module:
    """Both with the same gradients; the second step runs what the first has compiled."""
    expected = plain(model, x)
    ours = losia(model, decompositions, **options)
    for _ in range(2):
        ours.zero_grad()
        loss_of(ours, x).backward()
        assert_subnet_gradients(ours, expected, tolerance=1e-9)
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad and name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9)
    return ours


STAY = {
    # block: gathers of x in two blocks, those that stay under aot_eager's decompositions and under Inductor's
    "rms, q k v": (8, 0, 0),
    "layer norm, q k v": (8, 6, 0),  # aot_eager: the norm is one opaque node
    "gated": (6, 0, 0),
    "gated by relu": (6, 0, 0),
    "gated by tanh": (6, 0, 0),
    "gelu": (4, 0, 0),
    "gelu of tanh": (4, 0, 0),
    "silu": (4, 0, 0),
    "relu": (4, 2, 2),  # what the backward keeps of these is their own value: the gather is next to it already
    "squared relu": (4, 0, 0),
    "dropout of none": (4, 0, 0),
    "no norm": (4, 2, 2),  # a residual, which nothing in the backward has a use for
}


@pytest.mark.parametrize("decompositions", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", BLOCKS)
def test_exact_and_moved(name: str, decompositions: str, seen: Seen) -> None:
    check(drawn(Stack(BLOCKS[name]).double()), lively(2, 5, WIDTH), decompositions)
    ((before, after),) = seen
    gathers, *stay = STAY[name]
    assert before.of_x == before.of_gradients == after.of_gradients == gathers
    assert after.of_x == stay[decompositions == "inductor"]
    assert (after.indexed > before.indexed) == (after.of_x < before.of_x)


@pytest.mark.parametrize("name", ["layer norm, q k v", "gated"])
@pytest.mark.parametrize("decompositions", ["aot_eager", "inductor"])
def test_norms_and_biases_that_learn(name: str, decompositions: str) -> None:
    model = check(
        drawn(Stack(BLOCKS[name]).double()), lively(2, 5, WIDTH), decompositions, trainable=("*norm*", "*bias")
    )
    learning = {name for name, p in model.named_parameters() if p.requires_grad and "subnet" not in name}
    assert any("norm" in name for name in learning)


@pytest.mark.parametrize("shape", [(WIDTH,), (7, WIDTH), (2, 5, WIDTH), (2, 3, 4, WIDTH)])
def test_any_number_of_dimensions(shape: tuple[int, ...], seen: Seen) -> None:
    check(drawn(Stack(BLOCKS["gated"]).double()), lively(*shape))
    ((before, after),) = seen
    assert (before.of_x, after.of_x) == (6, 0)


@pytest.mark.parametrize("marked", [True, False])
def test_shapes_that_vary(marked: bool, seen: Seen) -> None:
    """Views with symbolic sizes are written anew for the columns."""
    model = drawn(Stack(BLOCKS["gated"]).double())
    ours = losia(model)
    for length in (5, 9, 12):
        x = lively(3, length, WIDTH)
        if marked:
            torch._dynamo.mark_dynamic(x, 1)
        ours.zero_grad()
        loss_of(ours, x).backward()
        assert_subnet_gradients(ours, plain(model, x), tolerance=1e-9)
    assert len(seen) == (1 if marked else 2)
    assert all((before.of_x, after.of_x) == (6, 0) for before, after in seen)


@pytest.mark.parametrize("name", ["rms, q k v", "gated", "gelu"])
def test_bfloat16(name: str, seen: Seen) -> None:
    """As near to the truth as the plain model's own gradients."""
    model, x = drawn(Stack(BLOCKS[name])).bfloat16(), lively(4, 8, WIDTH, dtype=torch.bfloat16)
    truth, theirs = plain(copy.deepcopy(model).double(), x.detach().double()), plain(model, x)
    ours = losia(model)
    loss_of(ours, x).backward()
    for weight, subnet in losia_fx.subnets(ours).items():
        assert subnet.values.grad is not None
        exact = truth[weight][subnet.rows][:, subnet.cols]
        allowed = (theirs[weight][subnet.rows][:, subnet.cols].double() - exact).norm()
        assert (subnet.values.grad.double() - exact).norm() <= 2 * allowed + 1e-6, weight
    ((_, after),) = seen
    assert after.of_x == 0


def test_an_x_that_is_an_output_too(seen: Seen) -> None:
    check(drawn(Stack(BLOCKS["rms, q k v"], shows=True).double()), lively(2, 5, WIDTH))
    ((_, after),) = seen
    assert after.of_x == 0


@pytest.mark.parametrize("decompositions", ["aot_eager", "inductor"])
def test_nothing_random_is_made_twice(decompositions: str, seen: Seen) -> None:
    """Drawn anew, a mask would be another one, and the gradients not those of the forward."""
    model = drawn(Stack(lambda: Mlp(rms(), lambda x: F.dropout(F.gelu(x), 0.5))).double())
    dense, x = copy.deepcopy(model), lively(2, 5, WIDTH)
    compiled = torch.compile(dense, backend=_compat.aot_compiler(decompositions, lambda gm: None, lambda gm: None))
    ours = losia(model, decompositions)
    for call in (compiled, ours):
        torch.manual_seed(3)
        loss_of(call, x).backward()
    assert_subnet_gradients(ours, {name: p.grad for name, p in dense.named_parameters()}, tolerance=1e-9)
    ((before, after),) = seen
    assert before.random == after.random == 2
    assert after.of_x < before.of_x


def test_gathers_of_a_checkpointed_block_stay(seen: Seen) -> None:
    check(drawn(Stack(BLOCKS["gated"], checkpointed=True).double()), lively(2, 5, WIDTH))
    ((before, after),) = seen
    assert before == after
    assert before.of_x > 0


class Sums(nn.Module):
    """Linears right on the residual, to which each block adds what its backward keeps anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x) * self.b(x)


def test_a_long_residual_is_not_summed_up_again(seen: Seen) -> None:
    """Every term of it is at hand, but a gather moves over so many nodes and no more."""
    layers = 12
    check(drawn(Stack(Sums, layers).double()), lively(2, 5, WIDTH))
    ((before, after),) = seen
    assert before.of_x == 2 * layers
    assert 2 * (layers - joint.LONGEST // 2) <= after.of_x < before.of_x
    assert after.nodes - before.nodes <= (before.of_x - after.of_x) * 3 * joint.LONGEST


@pytest.mark.parametrize("longer", [False, True])
def test_how_far_a_gather_goes(longer: bool, seen: Seen) -> None:
    """Up to what the backward of silu keeps, over LONGEST nodes at most."""

    def act(x: Tensor) -> Tensor:
        x = F.silu(x)
        for _ in range(joint.LONGEST + (1 if longer else -1)):  # silu itself is one
            x = x + 0.25
        return x

    check(drawn(Stack(lambda: Mlp(rms(), act), layers=1).double()), lively(2, 5, WIDTH))
    ((before, after),) = seen
    assert (before.of_x, after.of_x) == (2, 1 if longer else 0)


class Raw(nn.Module):
    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH))])
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x * 0.5 if self.scaled else x)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_models_own_input(scaled: bool, seen: Seen) -> None:
    check(drawn(Raw(scaled).double()), torch.randn(2, 5, WIDTH, dtype=torch.float64))
    ((before, after),) = seen
    assert (before.of_x, after.of_x) == (1, 0 if scaled else 1)


@pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")
def test_gpt2(seen: Seen) -> None:
    """Conv1D: addmm of a view, whose shape differs from that of what made x."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": table.VOCABULARY}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    case = table.Case("gpt2", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **still)), table.tokens, 8)
    model, batch = table.build(case, torch.float64), table.batch(case)
    dense = copy.deepcopy(model)
    dense(**batch).loss.backward()
    losia_fx.transform(model, rank_factor=0.25, compiler="aot_eager")
    assert len(losia_fx.subnets(model)) == case.linears
    model(**batch).loss.backward()
    assert_subnet_gradients(model, {name: p.grad for name, p in dense.named_parameters()}, tolerance=1e-9)
    before, after = seen[0]  # the other is that of the loss
    assert (before.of_x, after.of_x) == (8, 6)  # the norms are opaque, and so is attention


class Turned(nn.Module):
    """A linear whose x is made of a transposed tensor, and lies in memory as that does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x).transpose(0, 1))).transpose(0, 1)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 5)])
def test_an_x_that_is_not_contiguous(shape: tuple[int, int], seen: Seen) -> None:
    check(drawn(Stack(Turned).double()), lively(*shape, WIDTH))
    ((before, after),) = seen
    assert (before.of_x, after.of_x) == (4, 2)


def test_a_joint_pass_of_the_users_own_runs_first(seen: Seen) -> None:
    shown: list[int] = []

    def users(gm: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        shown.append(count(gm.graph).of_x)
        return gm

    with torch._functorch.config.patch(joint_custom_pass=users):
        check(drawn(Stack(BLOCKS["gated"]).double()), lively(2, 5, WIDTH))
    ((before, after),) = seen
    assert shown == [before.of_x] == [6]
    assert after.of_x == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer norm, q k v", "gated", "gelu"])
def test_under_inductor(name: str, seen: Seen) -> None:
    model, x = drawn(Stack(BLOCKS[name]).double()), lively(2, 5, WIDTH)
    expected = plain(model, x)
    losia_fx.transform(model, rank_factor=0.25)
    for _ in range(2):
        model.zero_grad()
        loss_of(model, x).backward()
        assert_subnet_gradients(model, expected, tolerance=1e-9)
