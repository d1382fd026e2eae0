"""The ONNX domain ``losia``: bodies of its nodes as model-local functions, and the backward of a layer as a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from .onnx_graphs import BATCHED, LINEAR, LinearUse

DOMAIN = "losia"
LINEAR_GRAD = "SubnetLinearGrad"
ATTRIBUTES = ("parameter", "group", "rank_factor")
"""Of every node: the weight's name, its group, and the share of its rows and columns in the subnet."""

KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
Function = Any  # onnx's protobuf classes have no types of their own


def forward_functions(opset: int) -> list[Function]:
    """SubnetLinear(x, weight, values, rows, cols) = x weight^T, SubnetBatched(...) = x weight, a matrix a batch entry.

    The subnet takes no part in the value: its elements are those of the weight.
    """
    inputs = ("x", "weight", "values", "rows", "cols")
    linear = [
        helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    batched = [helper.make_node("MatMul", ["x", "weight"], ["y"])]
    return [_function(LINEAR, inputs, ["y"], linear, opset), _function(BATCHED, inputs, ["y"], batched, opset)]


def backward_function(opset: int) -> Function:
    """SubnetLinearGrad(x, grad_y, weight, rows, cols) -> grad_x = grad_y weight, grad_values = grad_y[rows]^T x[cols].

    x (..., in), grad_y (..., out), weight (out, in), rows (r,), cols (c,); grad_values (r, c).
    """
    node = helper.make_node
    body = [
        node("MatMul", ["grad_y", "weight"], ["grad_x"]),
        node("Gather", ["grad_y", "rows"], ["picked"], axis=-1),
        node("Gather", ["x", "cols"], ["kept"], axis=-1),
        node("Constant", [], ["tokens"], value_ints=[-1]),
        node("Shape", ["rows"], ["row_count"]),
        node("Shape", ["cols"], ["col_count"]),
        node("Concat", ["tokens", "row_count"], ["picked_shape"], axis=0),
        node("Concat", ["tokens", "col_count"], ["kept_shape"], axis=0),
        node("Reshape", ["picked", "picked_shape"], ["picked_flat"]),
        node("Reshape", ["kept", "kept_shape"], ["kept_flat"]),
        node("Transpose", ["picked_flat"], ["picked_turned"], perm=[1, 0]),
        node("MatMul", ["picked_turned", "kept_flat"], ["grad_values"]),
    ]
    inputs = ("x", "grad_y", "weight", "rows", "cols")
    return _function(LINEAR_GRAD, inputs, ["grad_x", "grad_values"], body, opset)


def _function(name: str, inputs: Sequence[str], outputs: Sequence[str], body: Sequence[Any], opset: int) -> Function:
    return helper.make_function(
        DOMAIN, name, list(inputs), list(outputs), list(body), [helper.make_opsetid("", opset)], list(ATTRIBUTES)
    )


def backward_model(uses: Sequence[LinearUse], opset: int, ir_version: int) -> Any:
    """A model with a node SubnetLinearGrad a use of a layer, each by itself.

    Inputs "<layer>/x" and "<layer>/grad_y" and the weight, which the forward's file holds; rows and cols are inside.
    Outputs "<layer>/grad_x" and "<layer>/grad_values".
    """
    nodes, outputs = [], []
    inputs: dict[str, Any] = {}
    indices: dict[str, Any] = {}
    for name, use in _named(uses):
        kind = KINDS[use.dtype]
        out_shape = (*use.x_shape[:-1], use.weight_shape[0])
        rows = use.rows.cpu().numpy()
        cols = np.arange(use.weight_shape[1]) if use.cols is None else use.cols.cpu().numpy()
        given = {f"{name}/x": use.x_shape, f"{name}/grad_y": out_shape, use.parameter: use.weight_shape}
        inputs |= {key: helper.make_tensor_value_info(key, kind, shape) for key, shape in given.items()}
        for part, index in (("rows", rows), ("cols", cols)):
            indices[f"{name}/{part}"] = numpy_helper.from_array(index, f"{name}/{part}")
        made = {f"{name}/grad_x": use.x_shape, f"{name}/grad_values": (rows.size, cols.size)}
        outputs += [helper.make_tensor_value_info(key, kind, shape) for key, shape in made.items()]
        taken = [*given, f"{name}/rows", f"{name}/cols"]
        attributes: Mapping[str, Any] = use.attributes
        nodes.append(helper.make_node(LINEAR_GRAD, taken, list(made), name=name, domain=DOMAIN, **attributes))
    graph = helper.make_graph(nodes, "losia_backward", list(inputs.values()), outputs, list(indices.values()))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph,
        functions=[backward_function(opset)],
        opset_imports=opsets,
        ir_version=ir_version,
        producer_name="losia_fx",
    )


def _named(uses: Sequence[LinearUse]) -> list[tuple[str, LinearUse]]:
    """The uses by their layers' names; a second use of a layer gets a number."""
    seen: dict[str, int] = {}
    named = []
    for use in uses:
        layer = use.parameter.rpartition(".")[0] or use.parameter
        seen[layer] = seen.get(layer, 0) + 1
        named.append((layer if seen[layer] == 1 else f"{layer}:{seen[layer]}", use))
    return named
