"""ONNX: the checker and onnxruntime accept both files, their numbers are torch's, and nodes and weights keep names."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx import LosiaConfig, LosiaError
from losia_fx.tools import dump
from losia_fx.tools.graphs.onnx_export import export_onnx
from tests.support.toys import Toy, batch, needs_traced_experts
from tests.tools.shown import EACH, argument, linears, loaded

CONFIG = LosiaConfig.roaming(rank_factor=0.25, output_rank_factor=0.125)


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def uneven(model: Toy) -> Toy:
    """Norms start as ones and zeros, and the exporter keeps equal weights once."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def attributes(node: Any) -> dict[str, Any]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def subnet_nodes(model: Any) -> list[Any]:
    return [node for node in model.graph.node if node.domain == "losia"]


@pytest.mark.parametrize("name", EACH)
def test_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "mixtral":
        needs_traced_experts()
    path = tmp_path / "model.onnx"
    arguments = [*argument(name), "--rank-factor", "0.25", "--format", "onnx", "--out", str(path)]
    assert dump.main(arguments) == 0
    backward = tmp_path / "model-backward.onnx"
    assert capsys.readouterr().out.split() == [str(path), str(backward)]
    assert sorted(tmp_path.iterdir()) == [backward, path]
    for file in (path, backward):
        onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(path)
    nodes = subnet_nodes(model)
    assert len(nodes) == linears(name)
    weights = {entry.name: entry for entry in model.graph.initializer}
    for node in nodes:
        carried = attributes(node)
        parameter = carried["parameter"].decode()
        assert node.name == f"{parameter.rpartition('.')[0]}/{node.op_type}" or "experts" in parameter
        assert carried["rank_factor"] == pytest.approx(0.125 if parameter == "lm_head.weight" else 0.25)
        assert carried["group"] >= 0
        assert parameter in weights or "experts" in parameter
        if node.op_type == "SubnetLinear":  # of equal rows the exporter keeps one, so the name may be another's
            rows = round(weights[parameter].dims[0] * carried["rank_factor"] - 0.5)
            assert node.input[3].endswith("_subnet_rows")
            assert list(weights[node.input[3]].dims) == [max(1, rows)]
    assert "/" not in "".join(entry.key for node in model.graph.node for entry in node.metadata_props)
    agrees_with_torch(path, name)


def agrees_with_torch(path: Path, name: str) -> None:
    runtime, (model, example) = session(path), (loaded(name).model, loaded(name).example)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = twin(**example.kwargs)
    given = {value.name: example.kwargs[value.name].numpy() for value in runtime.get_inputs()}
    got = runtime.run(None, given)
    logits = [value for value in got if value.shape == tuple(expected.logits.shape)]
    assert logits
    np.testing.assert_allclose(logits[0], expected.logits.numpy(), rtol=0, atol=1e-5)
    for value in got:
        if value.shape == ():
            np.testing.assert_allclose(value, expected.loss.numpy(), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Path]:
    torch.manual_seed(0)
    model, path = uneven(Toy(bias=True)), tmp_path_factory.mktemp("onnx") / "toy.onnx"
    export_onnx(model, batch(), path, config=CONFIG)
    return model, path


def test_toy(toy: tuple[Toy, Path]) -> None:
    model, path = toy
    ids = batch()
    (got,) = session(path).run(None, {"input_0": ids.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(ids).numpy(), rtol=0, atol=1e-5)
    proto = onnx.load(path)
    assert {entry.name for entry in proto.graph.initializer} >= {n for n, _ in model.named_parameters()}
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert {"layers.0.mlp.up/SubnetLinear", "layers.1.norm/LayerNormalization", "head/SubnetLinear"} <= set(names)


def test_function_bodies_are_what_any_runtime_needs(toy: tuple[Toy, Path]) -> None:
    model, path = toy
    inlined = onnx.inliner.inline_local_functions(onnx.load(path))
    assert not subnet_nodes(inlined)
    ids = batch()
    (got,) = onnx.reference.ReferenceEvaluator(inlined).run(None, {"input_0": ids.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(ids).numpy(), rtol=0, atol=1e-5)


def test_backward_is_the_layers_own(toy: tuple[Toy, Path]) -> None:
    model, path = toy
    transformed = losia_fx.transform(copy.deepcopy(model), CONFIG, compiler="eager")
    runtime = session(path.with_name("toy-backward.onnx"))
    parameters = dict(model.named_parameters())
    given: dict[str, Tensor] = {}
    for value in runtime.get_inputs():
        given[value.name] = parameters[value.name] if value.name in parameters else torch.randn(value.shape)
    names = [value.name for value in runtime.get_outputs()]
    got = dict(zip(names, runtime.run(None, {n: v.detach().numpy() for n, v in given.items()}), strict=True))
    subnets = losia_fx.subnets(transformed)
    assert len(got) == 2 * len(subnets) == 14
    for name, subnet in subnets.items():
        layer = name.removesuffix(".weight")
        x, weight = given[f"{layer}/x"].requires_grad_(), parameters[name].detach().requires_grad_()
        y = nn.functional.linear(x, weight)
        grad_x, grad_w = torch.autograd.grad(y, (x, weight), given[f"{layer}/grad_y"])
        np.testing.assert_allclose(got[f"{layer}/grad_x"], grad_x.numpy(), rtol=0, atol=1e-5)
        block = grad_w[subnet.rows][:, subnet.cols]
        np.testing.assert_allclose(got[f"{layer}/grad_values"], block.numpy(), rtol=0, atol=1e-5)


def test_without_weights(tmp_path: Path) -> None:
    model, path = uneven(Toy()), tmp_path / "toy.onnx"
    export_onnx(model, batch(), path, config=CONFIG, weights=False)
    proto = onnx.load(path)
    assert not [entry for entry in proto.graph.initializer if entry.data_type == onnx.TensorProto.FLOAT and entry.dims]
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in proto.graph.input}
    for name, parameter in model.named_parameters():
        assert shapes[name] == tuple(parameter.shape)
    runtime, ids = session(path), batch()
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), "input_0": ids}
    given = {v.name: tensors[v.name] if v.name in tensors else torch.zeros(v.shape) for v in runtime.get_inputs()}
    (got,) = runtime.run(None, {name: value.detach().numpy() for name, value in given.items()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(ids).numpy(), rtol=0, atol=1e-5)


def test_large_weights_lie_beside(tmp_path: Path) -> None:
    model, path = Toy(width=32), tmp_path / "toy.onnx"
    written = export_onnx(model, batch(), path, config=CONFIG, external_bytes=4096)
    data = tmp_path / "toy.onnx.data"
    assert written == [path, data, tmp_path / "toy-backward.onnx"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert data.stat().st_size > 32 * 24 * 4 * 4 > path.stat().st_size - 20_000
    ids = batch()
    (got,) = session(path).run(None, {"input_0": ids.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(ids).numpy(), rtol=0, atol=1e-5)


def test_what_onnx_cannot_express(tmp_path: Path) -> None:
    class Odd(Toy):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.linalg.eigvals(super().forward(ids)[:, :4, :4]).abs()

    with pytest.raises(LosiaError, match="cannot be put into ONNX") as caught:
        export_onnx(Odd(), batch(), tmp_path / "odd.onnx", config=CONFIG)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_missing_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(LosiaError, match=r"ONNX needs onnx: install losia-fx\[tools\]"):
        export_onnx(Toy(), batch(), tmp_path / "a.onnx")
