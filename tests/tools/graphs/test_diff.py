"""losia-fx diff: nodes, operators, FLOPs and bytes, held against what the shapes say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losia_fx import LosiaConfig
from losia_fx.ops.linear import subnet_linear
from losia_fx.tools import diff as command
from losia_fx.tools.graphs.capture import capture
from losia_fx.tools.graphs.changes import Diff, diff
from losia_fx.tools.graphs.costs import flops_by_weight, saved_for_backward
from tests.support.toys import Toy, batch
from tests.tools.shown import CONFIG, EACH, OPTIONS, argument, captured, captured_once, linears

__all__ = ["captured_once"]
SHARED = pytest.mark.usefixtures("captured_once")
TOKENS, WIDTH, INNER, WORDS = 2 * 6, 16, 24, 40


@pytest.fixture(scope="module")
def toy() -> Diff:
    return diff(capture(Toy(), batch(), LosiaConfig(rank_factor=0.25, compiler="eager")))


def test_flops(toy: Diff) -> None:
    rows = {layer.weight: layer for layer in toy.layers}
    assert len(rows) == 7
    for name, (out, into) in {
        "layers.0.mlp.up.weight": (INNER, WIDTH),
        "layers.1.mlp.down.weight": (WIDTH, INNER),
        "layers.1.mix.weight": (WIDTH, WIDTH),
    }.items():
        product = 2 * TOKENS * out * into
        assert rows[name].before.flops == 3 * product  # forward, dL/dx, dL/dW
        assert rows[name].after.flops == 2 * product + product // 16
        assert rows[name].subnet == (out // 4, into // 4)
    head = 2 * TOKENS * WORDS * WIDTH
    assert rows["head.weight"].after.flops == 2 * head + head * 5 // 40
    assert rows["layers.0.mix.weight"].after.flops == (2 * TOKENS * WIDTH * WIDTH) * 17 // 16  # no dL/dx
    assert toy.after.flops == sum(layer.after.flops for layer in toy.layers)
    assert toy.before.flops == sum(layer.before.flops for layer in toy.layers)


def test_kept_bytes(toy: Diff) -> None:
    for layer in toy.layers:
        into = layer.shape[1]
        assert layer.before.saved_bytes == 4 * TOKENS * into
        assert layer.after.saved_bytes == 4 * TOKENS * layer.subnet[1]
    # an input that the norms, gelu or sums around keep anyway is not freed by the rewrite: less than the rows' sum
    freed = toy.before.saved_bytes - toy.after.saved_bytes
    assert 0 < freed <= sum(layer.before.saved_bytes - layer.after.saved_bytes for layer in toy.layers)


def test_kept_bytes_are_what_autograd_keeps() -> None:
    """The eager partition of a plain model keeps what autograd's own saved-tensor hooks see."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](torch.exp(self.blocks[0](torch.exp(x))))

    model, x = Plain(), torch.randn(5, 8)
    (graph,) = capture(model, x, LosiaConfig(rank_factor=0.5, compiler="eager")).graphs
    kept: dict[int, int] = {}
    outer = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in outer:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert sum(saved_for_backward(graph.dense["forward"], graph.dense["backward"]).values()) == sum(kept.values())
    output.sum().backward()


def test_nodes(toy: Diff) -> None:
    rewrite, localization = toy.stages
    assert (rewrite.before, rewrite.after) == ("dynamo", "subnet-rewrite")
    assert len(rewrite.rewritten) == 7
    assert rewrite.removed == ()
    assert rewrite.ops == {"linear": -7, str(subnet_linear): 7, "placeholder": 3 * 7 - 1}
    assert len(rewrite.added) == 3 * 7 - 1
    assert localization.ops == {"losia.tap.default": 7, "placeholder": 7}
    assert len(localization.rewritten) == 7
    assert len(localization.added) == 14


def test_passes_on_the_joint_graph() -> None:
    stages = {stage.after: stage for stage in diff(captured("llama")).stages}
    sunk, remade, loose = (stages[name] for name in ("sink-gathers", "remake-inputs", "loosen-views"))
    assert (sunk.before, remade.before, loose.before) == ("joint", "sink-gathers", "remake-inputs")
    assert sunk.ops["aten.gather.default"] < 0 < sunk.ops["aten.index.Tensor"]
    assert sunk.added
    assert sunk.removed
    assert not sunk.remade
    assert remade.remade
    assert (remade.added, remade.removed, remade.rewritten, remade.ops) == ((), (), {}, {})
    assert set(loose.ops) == {"aten.reshape.default", "aten.view.default", "aten._unsafe_view.default"}
    assert loose.ops["aten.reshape.default"] == len(loose.rewritten) + len(loose.added)
    assert len(loose.rewritten) > len(loose.added) == 1  # an output stays nobody's view
    assert sum(loose.ops.values()) == len(loose.added)
    assert all(before == after for before, after in loose.rewritten.items())
    assert (loose.removed, loose.remade) == ((), ())


def test_bodies_count_too(toy: Diff) -> None:
    found = diff(capture(Toy(checkpointed=True), batch(), CONFIG))
    assert len(found.stages[0].rewritten) == 7
    assert sum("/" in name for name in found.stages[0].rewritten) == 6
    assert {layer.weight for layer in found.layers} == {layer.weight for layer in toy.layers}


def test_layers_that_share_a_graph_are_told() -> None:
    found = diff(capture(Toy(breaks=True), batch(), CONFIG))
    seen = {layer.weight for layer in found.layers}
    assert (len(seen) < 7) == bool(found.notes)
    assert found.after.flops < found.before.flops


@SHARED
@pytest.mark.parametrize("name", EACH)
def test_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*argument(name), *OPTIONS, "--format", "json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["layers"]) == linears(name)
    assert {layer["weight"] for layer in value["layers"]} == {n for names in captured(name).groups for n in names}
    for layer in value["layers"]:
        check_layer(layer)
    assert sum(len(stage["rewritten"]) for stage in value["stages"] if stage["before"] == "dynamo") == linears(name)
    assert value["after"]["flops"] < value["before"]["flops"]
    assert value["after"]["saved_bytes"] < value["before"]["saved_bytes"]
    others = {"forward": 0, "dense": 0}
    for graph in captured(name).graphs:  # what belongs to no layer, attention most of all, costs what it did
        for side, stages in (("forward", graph.stages), ("dense", graph.dense)):
            others[side] += sum(
                flops_by_weight(stages[stage])[""] for stage in stages if stage in ("forward", "backward")
            )
    assert others["forward"] == others["dense"]


def check_layer(layer: dict[str, Any]) -> None:
    *experts, out, into = layer["shape"]
    *_, rows, cols = layer["subnet"]
    subnet, whole = rows * cols, out * into
    before, after = layer["before"]["flops"], layer["after"]["flops"]
    # forward and dL/dx stay, dL/dW shrinks to the subnet's share: 3 or (where x does not learn) 2 products before
    product = {before - before * n // (n + 1): n for n in (1, 2)}
    assert any(after == before - share + share * subnet // whole for share in product), layer
    # x whole before; after it a few columns, or what x is made of again and others hold too: a norm's input and a
    # number a token, the two factors of a gated MLP
    assert layer["after"]["saved_bytes"] <= 2.02 * layer["before"]["saved_bytes"]
    assert len(experts) in (0, 1)


@SHARED
@pytest.mark.parametrize("name", EACH)
def test_text(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "diff.txt"
    assert command.main([*argument(name), *OPTIONS, "--nodes", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    found = diff(captured(name))
    assert f"graph 0, dynamo -> subnet-rewrite: {linears(name)} nodes rewritten, " in text
    for stage in found.stages:
        for op, change in stage.ops.items():
            assert re.search(rf"^  {re.escape(op)} +{re.escape(f'{change:+d}')}$", text, re.MULTILINE), op
        for node in stage.added:
            assert f"  + {node}\n" in text
    for layer in found.layers:
        (line,) = re.findall(rf"^{re.escape(layer.weight)} .*$", text, re.MULTILINE)
        cells = line.split()
        assert cells[1] == "x".join(map(str, layer.shape))
        assert cells[2] == "x".join(map(str, layer.subnet))
        assert f"{layer.before.saved_bytes:,}" in cells
        assert f"{layer.after.flops / 1e6:,.2f}" in cells
    (total,) = re.findall(r"^all graphs .*$", text, re.MULTILINE)
    saved = 100 * (found.before.flops - found.after.flops) / found.before.flops
    assert f"{saved:.1f}%" in total.split()


@SHARED
def test_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*argument("llama"), *OPTIONS, "--out", str(tmp_path / "no" / "diff.txt")]) == 2
    assert command.main([*argument("llama"), *OPTIONS, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "there is no folder" in error
    assert "is a folder; name a file" in error
