"""A model's forward as ONNX, its rewritten layers as nodes ``losia::SubnetLinear``; beside it, those layers' backward.

>>> export_onnx(model, {"input_ids": ids}, Path("model.onnx"))    # and model-backward.onnx
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaError
from losia_fx.storage.atomic import write_files

from ..load_model import Example
from .documents import check_file

EXTERNAL_BYTES = 64 * 2**20
"""From this size on weights go into a file of their own beside the model, "<name>.data"; protobuf ends at 2 GiB."""
SCOPES = "pkg.torch.onnx.name_scopes"


def export_onnx(
    model: nn.Module,
    example: Any,
    out: Path,
    *,
    config: LosiaConfig | None = None,
    weights: bool = True,
    external_bytes: int = EXTERNAL_BYTES,
) -> list[Path]:
    """Writes the forward to ``out`` and the backward of the rewritten layers to "<out>-backward.onnx"; the files.

    The forward is that of evaluation mode, for inputs of the example's shapes. A node SubnetLinear(x, weight, values,
    rows, cols) has the attributes parameter, group and rank_factor, and a body, so that any runtime can run the file.
    Nodes are called "<module>/<operation>". A model of several graphs makes a pair of files a graph. weights: without,
    parameters are inputs of the model: their shape is all that the file has of them.
    Both have passed onnx.checker in full. Raises LosiaError for what ONNX cannot express, ConfigError for ``out``.
    """
    onnx = _import_onnx()
    from .onnx_functions import backward_model
    from .onnx_graphs import ExportableGraph, rewritten_graphs

    check_file(out)
    settings = LosiaConfig.of(config, {"schedule": "static", "compiler": "eager"})
    graphs = rewritten_graphs(model, Example.of(example), settings)
    written = []
    for number, graph in enumerate(graphs):
        path = out if len(graphs) == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        exportable = ExportableGraph(graph, settings)
        forward = _forward(onnx, exportable, tuple(graph.batch.values()))
        names = [graph.names[holder] for holder in graph.batch]
        _rename(forward, names)
        if not weights:
            _leave_out_weights(onnx, forward)
        written += _save(onnx, forward, path, external_bytes)
        if graph.uses:
            opset = next(entry.version for entry in forward.opset_import if entry.domain == "")
            backward = backward_model(graph.uses, opset, forward.ir_version)
            written += _save(onnx, backward, path.with_name(f"{path.stem}-backward.onnx"), external_bytes)
    return written


def _import_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ModuleNotFoundError as error:
        raise LosiaError(f"ONNX needs {error.name}: install losia-fx[tools]") from None
    return onnx


def _forward(onnx: Any, exportable: nn.Module, batch: tuple[Any, ...]) -> Any:
    """The model in ONNX's protobuf form, functions included."""
    from .onnx_functions import forward_functions

    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(torch.export.export(exportable, batch), dynamo=True, verbose=False)
    except LosiaError:
        raise
    except Exception as error:  # an operator that torch.onnx cannot translate, most often
        cause = error.__cause__ or error
        first = str(cause).strip().partition("\n")[0]
        raise LosiaError(f"this forward cannot be put into ONNX: {type(cause).__name__}: {first}") from error
    assert program is not None
    proto = program.model_proto
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    used = {node.op_type for node in proto.graph.node if node.domain == "losia"}
    proto.functions.extend(function for function in forward_functions(opset) if function.name in used)
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx tells of packages that it does not need here, its optimizer of foldings that it leaves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _rename(model: Any, inputs: list[str]) -> None:
    """Nodes get their modules' names, inputs those of the forward's arguments; the exporter's notes and paths go."""
    graph = model.graph
    called = {value.name: name for value, name in zip(graph.input, inputs, strict=True)}
    for value in graph.input:
        value.name = called[value.name]
    taken: Counter[str] = Counter()
    for node in graph.node:
        node.input[:] = [called.get(name, name) for name in node.input]
        properties = {entry.key: entry.value for entry in node.metadata_props}
        del node.metadata_props[:]
        scopes = [scope for scope in ast.literal_eval(properties.get(SCOPES, "[]")) if scope]
        module = scopes[0] if len(scopes) > 1 else _owner(node)
        name = f"{module}/{node.op_type}" if module else node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        if SCOPES in properties:
            node.metadata_props.add(key=SCOPES, value=properties[SCOPES])


def _owner(node: Any) -> str:
    """The module of the parameter that a node of ours names: torch.onnx below 2.13 loses some scopes."""
    named = [entry.s.decode() for entry in node.attribute if node.domain == "losia" and entry.name == "parameter"]
    return named[0].rpartition(".")[0] if named else ""


def _leave_out_weights(onnx: Any, model: Any) -> None:
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    graph = model.graph
    weights = [entry for entry in graph.initializer if entry.data_type in floating and len(entry.dims)]
    kept = [entry for entry in graph.initializer if not (entry.data_type in floating and len(entry.dims))]
    graph.input.extend(onnx.helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _save(onnx: Any, model: Any, path: Path, external_bytes: int) -> list[Path]:
    """Writes and checks the file, and moves it to its place when it is whole. Raises LosiaError where it is no ONNX."""
    size = sum(len(entry.raw_data) for entry in model.graph.initializer)
    data = path.with_name(f"{path.name}.data")
    external = size >= external_bytes

    def write(folder: Path) -> None:
        part = folder / path.name
        onnx.save_model(model, part, save_as_external_data=external, location=data.name, size_threshold=1024)
        try:
            onnx.checker.check_model(str(part), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise LosiaError(f"{path}: onnx.checker refuses it: {str(error).partition(chr(10))[0]}") from error

    write_files(path.parent, write, path.name)
    return [path, data] if external else [path]
