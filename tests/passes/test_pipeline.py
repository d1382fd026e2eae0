"""The declared passes: which of them run under which options, and that an observer sees every stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import losia_fx
from losia_fx import LosiaConfig
from losia_fx._compat import install_call
from losia_fx.api.transform import CompiledCall
from losia_fx.compile.backend import LosiaBackend
from losia_fx.ops.linear import subnet_linear
from losia_fx.ops.localization import tap
from losia_fx.passes import FORWARD_STAGES, JOINT_STAGES, Observer, forward_pipeline, joint_pipeline
from losia_fx.plan import SubnetPlan
from losia_fx.runtime import expected
from tests.support import graphs
from tests.support.joint_graphs import Gated, drawn, lively, loss_of, plain_gradients, rms
from tests.support.toys import assert_subnet_gradients

UNPACKED = tuple(stage for stage in FORWARD_STAGES if stage != "frozen-products")
BOTH, JOINT = ["subnet-rewrite", "insert-localization"], ["sink-gathers", "remake-inputs"]
EAGER_STAGES = tuple(stage for stage in JOINT_STAGES if stage != "settle-products")  # which is for Inductor

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, BOTH),
        ({"schedule": "sync"}, BOTH),
        ({"importance": "gradient"}, BOTH),
        ({"schedule": "static"}, BOTH[:1]),
        ({"importance": "random"}, BOTH[:1]),
    ],
)
def test_passes_of_the_forward(options: dict[str, str], names: list[str]) -> None:
    gm = graphs.trace(graphs.plain)
    plan = graphs.plan_of(gm, {"w": graphs.facts("w")})
    pipeline = forward_pipeline(plan, LosiaConfig(**options))  # type: ignore[arg-type]
    assert [step.name for step in pipeline.passes] == names
    pipeline(gm)
    assert subnet_linear in graphs.targets(gm)
    assert (tap in graphs.targets(gm)) == (len(names) == 2)


def test_no_subnet_no_pass() -> None:
    assert forward_pipeline(SubnetPlan((), ()), LosiaConfig()).passes == ()


@pytest.mark.parametrize(
    ("compiler", "products", "names"),
    [
        ("inductor", None, JOINT),
        ("inductor", "int8", ["settle-products", *JOINT]),
        ("inductor", "float8", JOINT),
        ("aot_eager", None, [*JOINT, "loosen-views"]),
        ("aot_eager", "int8", [*JOINT, "loosen-views"]),
        ("eager", "int8", []),
    ],
)
def test_passes_of_the_joint_graph(compiler: str, products: str | None, names: list[str]) -> None:
    config = LosiaConfig(compiler=compiler, frozen_products=products)
    assert [step.name for step in joint_pipeline(config).passes] == names


class Headed(nn.Module):
    """Two blocks, a norm and a head that is a subnet's: something for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated(rms()) for _ in range(2))
        self.norm, self.lm_head = rms(), nn.Linear(16, 24, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.lm_head(self.norm(x).flatten(0, 1))
        return y


Stages = list[tuple[str, str]]


def observed(tolerance: float = 1e-9, **options: Any) -> Stages:
    """(stage, text of the graph there), in the order in which a step shows them; its gradients are the plain ones."""
    model, x = drawn(Headed()).double(), lively(2, 5, 16)
    plain = plain_gradients(model, x)
    config = LosiaConfig(rank_factor=0.25, output_rank_factor=0.25, **options)
    twin = losia_fx.transform(copy.deepcopy(model), config)
    stages: Stages = []

    def watch(gm: fx.GraphModule, inputs: Sequence[Any], plan: SubnetPlan) -> Observer:
        return lambda stage, after: stages.append((stage, graphs.text(after)))

    install_call(twin, CompiledCall(twin, config, LosiaBackend(config, watch=watch)))
    loss_of(twin, x).backward()
    assert_subnet_gradients(twin, plain, tolerance=tolerance)
    return stages


def test_an_observer_sees_every_stage() -> None:
    stages = observed(compiler="aot_eager")
    assert tuple(name for name, _ in stages) == (*UNPACKED, *EAGER_STAGES)
    text = dict(stages)
    assert "subnet_linear" not in text["dynamo"]
    assert "subnet_linear" in text["subnet-rewrite"]
    assert "tap" in text["insert-localization"]
    assert "tangents_1" in text["joint"]
    assert text["sink-gathers"].count("gather.default(") < text["joint"].count("gather.default(")
    assert text["sink-gathers"].count("index.Tensor(") > text["joint"].count("index.Tensor(")
    assert text["remake-inputs"] == text["sink-gathers"]  # it marks nodes, and moves none
    assert " view.default(" in text["remake-inputs"]
    assert " view.default(" not in text["loosen-views"]


def test_without_a_joint_graph_an_observer_sees_the_forwards_stages() -> None:
    assert tuple(name for name, _ in observed(compiler="eager")) == UNPACKED
    static = observed(compiler="aot_eager", schedule="static")
    assert [name for name, _ in static] == ["dynamo", "subnet-rewrite", *EAGER_STAGES]


def test_frozen_products_are_a_stage_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "share_of_dense", lambda *_: 0.5)
    stages = dict(observed(compiler="aot_eager", frozen_products="int8", tolerance=0.1))
    assert tuple(stages) == (*FORWARD_STAGES, *EAGER_STAGES)
    before, after = stages["insert-localization"], stages["frozen-products"]
    assert "packed_linear" not in before
    planned = before.count("call_function subnet_linear") - 1  # all but the head
    assert after.count("call_function packed_linear") == planned
    assert stages["joint"].count("_int_mm.default(") == 2 * planned  # the forward's and dL/dx's


def test_a_graph_without_parameters_is_shown_too() -> None:
    seen: list[str] = []
    config = LosiaConfig(compiler="aot_eager")
    backend = LosiaBackend(config, watch=lambda gm, inputs, plan: lambda stage, after: seen.append(stage))
    x = torch.randn(3, requires_grad=True)
    run: Callable[[Tensor], Tensor] = torch.compile(lambda x: torch.sin(x).sum(), backend=backend)
    run(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert tuple(seen) == ("dynamo", *EAGER_STAGES)


def joint_graph() -> fx.GraphModule:
    """y = silu(x) w^T and z = (y y) v^T, forward and backward: cols of x for w's subnet, every column for v's."""
    graph = fx.Graph()
    shapes = {"primals_1": (5, 4), "primals_2": (4, 4), "primals_3": (6, 4), "tangents_1": (5, 6)}
    x, w, v = (graph.placeholder(name) for name in list(shapes)[:3])
    rows, cols, head_rows = (graph.placeholder(f"primals_{number}") for number in (4, 5, 6))
    grad_z = graph.placeholder("tangents_1")

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    def picked(value: fx.Node, index: fx.Node) -> fx.Node:
        return call(aten.gather.default, value, 1, call(aten.expand.default, index, [5, 2]))

    a = call(aten.silu.default, x)
    y = call(aten.mm.default, call(aten.view.default, a, [5, 4]), call(aten.t.default, w))
    h = call(aten.mul.Tensor, y, y)
    z = call(aten.mm.default, h, call(aten.t.default, v))
    grad_v = call(aten.mm.default, call(aten.t.default, picked(grad_z, head_rows)), h)
    grad_h = call(aten.mm.default, grad_z, v)
    half = call(aten.mul.Tensor, grad_h, y)
    grad_y = call(aten.add.Tensor, half, half)
    grad_w = call(aten.mm.default, call(aten.t.default, picked(grad_y, rows)), picked(a, cols))
    grad_x = call(aten.silu_backward.default, call(aten.mm.default, grad_y, w), x)
    graph.output((z, grad_w, grad_v, grad_x))
    gm = fx.GraphModule({}, graph)
    given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    index = torch.empty(2, dtype=torch.int64, device="meta")

    class Traced(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    Traced(gm).run(*(given.get(node.name, index) for node in graph.find_nodes(op="placeholder")))
    return gm


def test_golden_joint(golden: Callable[[str, str], None]) -> None:
    gm = joint_graph()
    stages: list[str] = []

    def observe(stage: str, after: fx.GraphModule) -> None:
        marked = [node.name for node in after.graph.nodes if "recompute" in node.meta]
        stages.append(f"{stage}\n{'=' * len(stage)}\n{graphs.text(after)}to be made again: {', '.join(marked)}\n")

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((5, 4), (4, 4), (6, 4))]
    inputs = [*values, torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([2, 5]), torch.randn(5, 6)]
    expected = gm(*inputs)
    joint_pipeline(LosiaConfig(compiler="aot_eager"), observe)(gm)
    torch.testing.assert_close(gm(*inputs), expected)
    golden("joint_stages", "\n".join(stages))
