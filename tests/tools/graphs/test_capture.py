"""The graphs of a model, stage by stage, and which node belongs to which module and weight."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import losia_fx
from losia_fx import LosiaConfig, LosiaError
from losia_fx.ops.linear import subnet_linear
from losia_fx.passes import DYNAMO, JOINT_STAGES, graph_modules
from losia_fx.tools.graphs.capture import BACKWARD, FORWARD, STAGES, capture
from losia_fx.tools.graphs.places import place_of, weight_of
from tests.support.toys import Toy, batch, fingerprint
from tests.tools.shown import captured

EAGER_STAGES = tuple(stage for stage in JOINT_STAGES if stage != "settle-products")  # which is for Inductor


def config(**options: Any) -> LosiaConfig:
    return LosiaConfig(rank_factor=0.25, compiler="aot_eager", **options)


def of_weight(gm: fx.GraphModule, *operators: str) -> Counter[str]:
    """How many nodes of these operators belong to each weight."""
    nodes = [node for part in graph_modules(gm) for node in part.graph.nodes if node.op == "call_function"]
    return Counter(weight_of(n) for n in nodes if any(name in str(n.target) for name in operators))


def weights_of(layers: int) -> set[str]:
    inside = {f"layers.{i}.{name}.weight" for i in range(layers) for name in ("mix", "mlp.up", "mlp.down")}
    return inside | {"head.weight"}


def test_stages_and_what_belongs_to_which_weight() -> None:
    captured = capture(Toy(), batch(), config())
    (graph,) = captured.graphs
    assert (
        captured.stages
        == tuple(graph.stages)
        == tuple(s for s in STAGES if s not in ("frozen-products", "settle-products"))
    )
    assert captured.groups[0] == ("head.weight",)
    once = dict.fromkeys(weights_of(2), 1)
    assert of_weight(graph.stages[DYNAMO], "linear") == once
    rewritten = graph.stages["insert-localization"]
    assert of_weight(rewritten, "losia.subnet_linear") == of_weight(rewritten, "losia.tap") == once
    assert of_weight(graph.stages[FORWARD], "aten.mm.") == once
    # dL/dx and dL/dS of each; the first layer's input is an embedding that does not learn
    products = of_weight(graph.stages[BACKWARD], "aten.mm.")
    assert products == {name: 1 if name == "layers.0.mix.weight" else 2 for name in once}
    for node in rewritten.graph.find_nodes(op="call_function", target=subnet_linear):
        place = place_of(node)
        assert place is not None
        assert place.owner == place.weight.removesuffix(".weight")
        assert place.weight in captured.groups[place.group]
    assert all(place_of(node) is not None for stage in graph.stages.values() for node in stage.graph.nodes)


@pytest.mark.parametrize("keep_dense", [True, False])
def test_frozen_products_are_a_stage_and_belong_to_their_weights(
    monkeypatch: pytest.MonkeyPatch, keep_dense: bool
) -> None:
    monkeypatch.setattr("losia_fx.runtime.expected.share_of_dense", lambda *_: 0.5)
    found = capture(Toy(width=16, inner=32), batch(), config(frozen_products="int8", keep_dense=keep_dense))
    (graph,) = found.graphs
    assert found.stages == tuple(stage for stage in STAGES if stage != "settle-products")
    packed = dict.fromkeys((name for name in weights_of(2) if name != "head.weight"), 1)
    stage = graph.stages["frozen-products"]
    assert of_weight(stage, "losia.packed_linear") == packed
    assert of_weight(stage, "losia.subnet_linear") == {"head.weight": 1}
    held = [node for node in stage.graph.find_nodes(op="placeholder") if node.name.startswith("losia_packed_")]
    assert {weight_of(node) for node in held} == set(packed)
    assert [tuple(node.meta["example_value"].shape) for node in held] == [(16, 16), (32, 16), (16, 32)] * 2
    assert of_weight(graph.stages[FORWARD], "aten._int_mm.") == packed


def test_the_joint_graph_has_the_products_of_both_and_says_what_passes_did() -> None:
    (graph,) = captured("llama").graphs
    joint, sunk, remade, loose = (graph.stages[stage] for stage in EAGER_STAGES)
    both = of_weight(graph.stages[FORWARD], "aten.mm.") + of_weight(graph.stages[BACKWARD], "aten.mm.")
    assert of_weight(joint, "aten.mm.") == both
    old = {node.name for node in joint.graph.nodes}
    assert {place.status for node in joint.graph.nodes if (place := place_of(node))} == {"", "part"}
    added = {node.name for node in sunk.graph.nodes} - old
    assert added
    assert with_status(sunk, "added") == added
    marked = {node.name for node in remade.graph.nodes if "recompute" in node.meta}
    assert marked
    assert with_status(remade, "remade") == marked - added
    reshaped = loose.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
    assert with_status(loose, "rewritten") == {node.name for node in reshaped} & old
    weights = {name for names in captured("llama").groups for name in names}
    for stage in EAGER_STAGES:  # inputs of the joint graph are those of the graph that it was made of
        holders = graph.stages[stage].graph.find_nodes(op="placeholder")
        assert weights <= {weight_of(holder) for holder in holders}


def with_status(gm: fx.GraphModule, status: str) -> set[str]:
    return {node.name for node in gm.graph.nodes if (place := place_of(node)) and place.status == status}


def test_without_a_joint_graph_none_of_its_stages_is_there() -> None:
    captured = capture(Toy(), batch(), LosiaConfig(rank_factor=0.25, compiler="eager"))
    assert captured.stages == (DYNAMO, "subnet-rewrite", "insert-localization", FORWARD, BACKWARD)


def test_dense_graphs_are_those_of_full_training() -> None:
    captured = capture(Toy(), batch(), config())
    (graph,) = captured.graphs
    assert tuple(graph.dense) == (FORWARD, BACKWARD)
    assert of_weight(graph.dense[FORWARD], "aten.mm.") == dict.fromkeys(weights_of(2), 1)
    assert of_weight(graph.dense[BACKWARD], "aten.mm.") == of_weight(graph.stages[BACKWARD], "aten.mm.")
    gradients = [n.meta["val"].shape for n in graph.dense[BACKWARD].graph.nodes if "aten.mm" in str(n.target)]
    shapes = {tuple(p.shape) for n, p in Toy().named_parameters() if n in weights_of(2)}
    assert shapes <= {tuple(shape) for shape in gradients} | {tuple(reversed(shape)) for shape in gradients}


def test_model_is_left_as_it_was() -> None:
    model = Toy()
    before, values = fingerprint(model), copy.deepcopy(model.state_dict())
    capture(model, batch(), config())
    assert fingerprint(model) == before
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_transformed_model_is_shown_as_it_is() -> None:
    model = losia_fx.transform(Toy(), rank_factor=0.5, schedule="static", compiler="aot_eager")
    captured = capture(model, batch())
    assert captured.config.rank_factor == 0.5
    assert captured.stages == (DYNAMO, "subnet-rewrite", *EAGER_STAGES, FORWARD, BACKWARD)
    assert captured.graphs[0].plan.ports[0].facts.rows == losia_fx.subnets(model)["layers.0.mix.weight"].rows.numel()
    assert losia_fx.controller(model).config.rank_factor == 0.5


def test_graph_breaks_make_several_graphs() -> None:
    captured = capture(Toy(breaks=True), batch(), config())
    assert len(captured.graphs) > 1
    found: set[str] = set()
    for graph in captured.graphs:
        uses = of_weight(graph.stages[DYNAMO], "linear")
        assert of_weight(graph.stages[FORWARD], "aten.mm.") == of_weight(graph.dense[FORWARD], "aten.mm.") == uses
        found |= set(uses)
    # a graph that serves both layers is seen once, with the first one's weights
    assert {"layers.0.mix.weight", "layers.0.mlp.up.weight", "layers.0.mlp.down.weight", "head.weight"} <= found


def test_checkpointed_bodies_are_looked_into() -> None:
    (graph,) = capture(Toy(checkpointed=True), batch(), config()).graphs
    assert of_weight(graph.stages["subnet-rewrite"], "losia.subnet_linear") == dict.fromkeys(weights_of(2), 1)
    for stages in (graph.stages, graph.dense):
        assert set(of_weight(stages[BACKWARD], "aten.mm.")) == weights_of(2)


def test_experts_have_a_weight_each() -> None:
    (graph,) = captured("mixtral").graphs
    found = of_weight(graph.stages[BACKWARD], "losia.grouped_outer")
    assert found == {f"model.layers.{i}.mlp.experts.{n}": 1 for i in (0, 1) for n in ("gate_up_proj", "down_proj")}


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x.new_ones(3)


def test_step_that_fails_is_told_in_a_line() -> None:
    with pytest.raises(LosiaError, match=r"^Fails cannot run a step: .*\w") as caught:
        capture(Fails(), torch.ones(2, 4), config())
    assert "\n" not in str(caught.value)


def test_nothing_learns() -> None:
    class Constant(Fails):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).detach()

    with pytest.raises(LosiaError, match="no output of Constant depends on a weight that learns"):
        capture(Constant(), torch.ones(2, 4), config())
