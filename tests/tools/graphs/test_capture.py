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
from losia_fx.passes import graph_modules
from losia_fx.tools.graphs.capture import BACKWARD, DYNAMO, FORWARD, capture
from losia_fx.tools.graphs.owners import GROUP, OWNER, WEIGHT
from tests.support.toys import Toy, batch, fingerprint
from tests.tools.shown import captured

STAGES = (DYNAMO, "subnet-rewrite", "insert-localization", FORWARD, BACKWARD)


def config(**options: Any) -> LosiaConfig:
    return LosiaConfig(rank_factor=0.25, compiler="aot_eager", **options)


def of_weight(gm: fx.GraphModule, *operators: str) -> Counter[str]:
    """How many nodes of these operators belong to each weight."""
    nodes = [node for part in graph_modules(gm) for node in part.graph.nodes if node.op == "call_function"]
    return Counter(n.meta.get(WEIGHT, "") for n in nodes if any(name in str(n.target) for name in operators))


def weights_of(layers: int) -> set[str]:
    inside = {f"layers.{i}.{name}.weight" for i in range(layers) for name in ("mix", "mlp.up", "mlp.down")}
    return inside | {"head.weight"}


def test_stages_and_what_belongs_to_which_weight() -> None:
    captured = capture(Toy(), batch(), config())
    (graph,) = captured.graphs
    assert captured.stages == tuple(graph.stages) == STAGES
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
        name = node.meta[WEIGHT]
        assert node.meta[OWNER] == name.removesuffix(".weight")
        assert name in captured.groups[node.meta[GROUP]]
    assert all(OWNER in node.meta for stage in graph.stages.values() for node in stage.graph.nodes)


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
    assert captured.stages == (DYNAMO, "subnet-rewrite", FORWARD, BACKWARD)
    assert captured.graphs[0].plan.slots[0].facts.rows == losia_fx.subnets(model)["layers.0.mix.weight"].rows.numel()
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
