"""What a graph is asked: the depth of rewritten layers, dominators of the loss, one group's part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from losia_fx import LosiaConfig, LosiaError
from losia_fx.tools.graphs.capture import capture
from losia_fx.tools.graphs.networkx import (
    group_subgraph,
    held_activations,
    longest_rewritten_path,
    loss_dominators,
    loss_of,
    to_networkx,
)
from losia_fx.tools.graphs.places import weight_of
from tests.support.toys import Toy, batch
from tests.tools.shown import CONFIG, EACH, captured


class WithLoss(Toy):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(super().forward(ids).flatten(0, 1), labels.flatten())


def test_plain_graph() -> None:
    """Of a graph that nobody captured too: what the tracer knows, and no more."""

    def function(x: Tensor) -> Tensor:
        return torch.relu(x) * torch.relu(x) + x

    graph = to_networkx(fx.symbolic_trace(function))
    assert list(graph.edges) == [
        ("x", "relu"), ("x", "relu_1"), ("x", "add"),
        ("relu", "mul"), ("relu_1", "mul"), ("mul", "add"), ("add", "output"),
    ]  # fmt: skip
    assert graph.nodes["relu"]["target"] == "relu"
    assert longest_rewritten_path(graph) == []
    assert loss_dominators(graph) == ["x", "add"]


def test_argument_places() -> None:
    graph = to_networkx(fx.symbolic_trace(lambda x: torch.add(x, x, alpha=2)))
    assert graph.edges["x", "add"]["arguments"] == "0,1"


@pytest.fixture(scope="module")
def toy() -> fx.GraphModule:
    (graph,) = capture(WithLoss(), {"ids": batch(), "labels": batch()}, CONFIG).graphs
    return graph.stages["subnet-rewrite"]


def test_longest_path_of_rewritten_layers(toy: fx.GraphModule) -> None:
    graph = to_networkx(toy)
    path = longest_rewritten_path(graph)
    # mix, up and down of each block, one after the other, and the head
    order = [f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("mix", "mlp.up", "mlp.down")]
    assert [graph.nodes[node]["weight"] for node in path] == [*order, "head.weight"]


def test_dominators_of_the_loss(toy: fx.GraphModule) -> None:
    graph = to_networkx(toy)
    chain = loss_dominators(graph)
    assert graph.nodes[chain[0]]["shape"] == "2x6"  # the token ids
    assert chain[-1] == loss_of(graph)
    owners = [graph.nodes[node]["owner"] for node in chain]
    assert owners[1] == "embed"
    # the residual stream: the two sums of each block, and nothing that lies beside it
    targets = [graph.nodes[node]["target"] for node in chain]
    assert [target.strip(".") for target in targets].count("add") == 4
    assert "layers.0.mlp.up" not in owners
    assert "head" in owners
    for node in chain[1:-1]:
        without = graph.subgraph(set(graph) - {node})
        assert not reaches(without, chain[0], chain[-1]), node
    others = set(graph) - set(chain)
    assert all(reaches(graph.subgraph(set(graph) - {node}), chain[0], chain[-1]) for node in others)


def reaches(graph: Any, source: str, target: str) -> bool:
    todo, seen = [source], {source}
    while todo:
        for following in graph.successors(todo.pop()):
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return target in seen


def test_group(toy: fx.GraphModule) -> None:
    graph = to_networkx(toy)
    part = group_subgraph(graph, 2)
    assert {data["weight"] for _, data in part.nodes(data=True) if data["rewritten"]} == {
        "layers.1.mix.weight", "layers.1.mlp.up.weight", "layers.1.mlp.down.weight",
    }  # fmt: skip
    assert any(data["owner"] == "layers.1.norm" and data["op"] != "placeholder" for _, data in part.nodes(data=True))
    assert not any(data["owner"].startswith("layers.0") for _, data in part.nodes(data=True))
    with pytest.raises(LosiaError, match=r"group 7: no node of the graph belongs to it; there are \[0, 1, 2\]"):
        group_subgraph(graph, 7)


@pytest.mark.parametrize("name", EACH)
def test_every_model(name: str) -> None:
    found = captured(name)
    graph = to_networkx(found.graphs[0].stages["insert-localization"])
    path = longest_rewritten_path(graph)
    layers = {"embedded": 4}.get(name, 2)
    # v, o, one of gate and up, down (of a mixture: v, o, router, both of the experts' products) a layer, and the head
    assert len(path) == (5 if name == "mixtral" else 4) * layers + (name != "bert")
    groups = [graph.nodes[node]["group"] for node in path]
    assert [group for group in groups if group] == sorted(group for group in groups if group)
    assert len(loss_dominators(graph)) > 2 * layers
    for group, names in enumerate(found.groups):
        weights = {data["weight"] for _, data in group_subgraph(graph, group).nodes(data=True) if data["rewritten"]}
        assert weights == set(names)


def test_activations_that_layers_hold() -> None:
    (graph,) = capture(Toy(), batch(), LosiaConfig(rank_factor=0.25, compiler="eager")).graphs
    found = {held.weight: held for held in held_activations(graph)}
    tokens, width, inner = 2 * 6, 16, 24
    sizes = {"mix": width, "mlp.up": width, "mlp.down": inner}
    for layer in (0, 1):
        for weight, size in sizes.items():
            held = found[f"layers.{layer}.{weight}.weight"]
            assert held.group == layer + 1
            assert list(held.before.values()) == [4 * tokens * size]
            assert list(held.after.values()) == [4 * tokens * size // 4]  # a quarter of the columns
            assert held.freed == 3 * tokens * size
            assert set(held.before) <= {node.name for node in graph.dense["forward"].graph.nodes}
            (kept,) = (node for node in graph.stages["forward"].graph.nodes if node.name in held.after)
            assert weight_of(kept) == held.weight
    assert found["head.weight"].freed == 0  # every column learns
