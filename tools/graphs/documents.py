"""Graphs as text, JSON, DOT, GraphML and GEXF: before any pass, after each, and as forward and backward.

>>> print(dump_graph(model, {"input_ids": ids, "labels": ids}, stage="insert-localization"))
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from losia_fx.config import LosiaConfig
from losia_fx.errors import ConfigError
from losia_fx.passes import JOINT_STAGES, makes_joint_graphs
from losia_fx.storage.atomic import write_file

from .capture import STAGES, Captured, capture
from .dot import dot
from .networkx import graph_of, import_networkx
from .places import ADDED, PART, PLANNED, REMADE, REWRITTEN
from .records import NodeRecord, check_layers, neighbourhood, records

MARKS = {REWRITTEN: "*", PLANNED: ">", ADDED: "+", REMADE: "~", PART: "|", "": " "}
LEGEND = (
    "* rewritten   > to be rewritten   + added by a pass   ~ to be made again in the backward   "
    "| part of a rewritten layer, after AOTAutograd"
)
COLUMNS = ("node", "op", "shape", "dtype", "owner module", "source")
WIDEST = 44  # of a column; longer entries lose their beginning, names tell most at their end


@dataclass(frozen=True)
class Document:
    """The nodes of one graph at one stage."""

    graph: int
    stage: str
    nodes: tuple[NodeRecord, ...]

    @property
    def name(self) -> str:
        return f"graph{self.graph}-{self.stage}"


def dump_graph(
    model: nn.Module,
    example: Any,
    *,
    config: LosiaConfig | None = None,
    stage: str | None = None,
    layer: Sequence[str] = (),
    format: str = "text",
) -> str:
    """The graphs of a step of ``model`` in one of FORMATS; see capture() for example and config.

    stage: one of capture.STAGES; None for all. layer: patterns of module names; only
    their nodes and those next to them are shown. DOT, GraphML and GEXF hold one graph: choose a stage.
    Raises ConfigError where a stage, layer or format does not exist, or where one graph is wanted and there are more.
    """
    captured = capture(model, example, config)
    return one_document(captured, documents(captured, stage, layer), format)


def documents(captured: Captured, stage: str | None = None, layer: Sequence[str] = ()) -> list[Document]:
    """What is to be shown, as plain values. Raises ConfigError as dump_graph does."""
    if stage is not None and stage not in captured.stages:
        known = ", ".join(captured.stages)
        raise ConfigError(f"--stage {stage}: {_missing(stage, captured.config)}; there are {known}")
    chosen = captured.stages if stage is None else (stage,)
    found = [
        Document(graph.index, name, tuple(records(graph.stages[name])))
        for graph in captured.graphs
        for name in chosen
        if name in graph.stages
    ]
    if layer:
        check_layers([document.nodes for document in found], layer)
        near = [Document(d.graph, d.stage, tuple(neighbourhood(d.nodes, layer))) for d in found]
        found = [document for document in near if document.nodes]
    return found


def _missing(stage: str, config: LosiaConfig) -> str:
    if stage in JOINT_STAGES and not makes_joint_graphs(config):
        return f"compiler {config.compiler!r} makes no joint graph of forward and backward, so no pass runs on it"
    if stage in STAGES:
        said = f"compiler {config.compiler!r}, schedule {config.schedule!r} and importance {config.importance!r}"
        packs = "" if config.frozen_products else ", without frozen_products"
        return f"no graph comes through it with {said}{packs}"
    return "there is no such stage"


def one_document(captured: Captured, found: Sequence[Document], format: str) -> str:
    """All of ``found`` in one text. Raises ConfigError where the format holds one graph and there are more."""
    if format == "text":
        return text(captured, found)
    if format == "json":
        return as_json(captured, found)
    if format not in FORMATS:
        raise ConfigError(
            f"--format {format}: there is no such format; there are {', '.join(('text', 'json', *FORMATS))}"
        )
    if len(found) != 1:
        raise ConfigError(
            f"--format {format} holds one graph, and there are {len(found)} ({', '.join(d.name for d in found)}): "
            "choose one with --stage, or name a folder with --out"
        )
    return FORMATS[format](found[0])


def write_documents(captured: Captured, found: Sequence[Document], format: str, out: Path) -> list[Path]:
    """Writes ``found`` to the file ``out``, or, in a format that holds one graph, a file each into the folder ``out``.

    Returns the files. Raises ConfigError where that cannot be, OSError where the disk refuses.
    """
    if format in ("text", "json") or (len(found) == 1 and not out.is_dir()):
        return [write_text(out, one_document(captured, found, format))]
    if out.is_file() or out.suffix:
        raise ConfigError(f"--out {out}: {len(found)} graphs need a folder, a file each; or choose one with --stage")
    out.mkdir(parents=True, exist_ok=True)
    return [write_text(out / f"{d.name}.{format}", one_document(captured, [d], format)) for d in found]


def write_text(path: Path, content: str) -> Path:
    """Writes the file, atomically. Raises ConfigError as check_file does."""
    check_file(path)

    def write(draft: Path) -> None:
        draft.write_text(content, encoding="utf-8")

    write_file(path, write)
    return path


def check_file(path: Path) -> None:
    """Raises ConfigError where no file of that name can be: to be asked before the work, not after it."""
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}")


# -- text ------------------------------------------------------------------------------------------------------------


def text(captured: Captured, found: Sequence[Document]) -> str:
    return "\n".join(line for line, _ in lines(captured, found)) + "\n"


def lines(captured: Captured, found: Sequence[Document]) -> list[tuple[str, str]]:
    """The lines of the text dump, each with the status of its node ("" for all others)."""
    weights = sum(len(names) for names in captured.groups)
    result = [(f"{captured.model}: {weights} weights with a subnet in {len(captured.groups)} groups", ""), (LEGEND, "")]
    for document in found:
        rewritten = sum(node.status == REWRITTEN for node in document.nodes)
        counted = f"{len(document.nodes)} nodes" + (f", {rewritten} rewritten" if rewritten else "")
        result += [("", ""), (f"graph {document.graph}, {document.stage}: {counted}", "heading")]
        rows = [_row(node) for node in document.nodes]
        widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
        result.append((_aligned("", COLUMNS, widths), "columns"))
        result += [
            (_aligned(MARKS[node.status], row, widths), node.status)
            for node, row in zip(document.nodes, rows, strict=True)
        ]
    return result


def _row(node: NodeRecord) -> tuple[str, ...]:
    target = node.target or node.op
    return tuple(_cut(part) for part in (node.name, target, node.shape_text, node.dtype, node.owner, node.source))


def _cut(entry: str) -> str:
    return entry if len(entry) <= WIDEST else f"..{entry[len(entry) - WIDEST + 2 :]}"


def _aligned(mark: str, row: Sequence[str], widths: Sequence[int]) -> str:
    cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return f"{mark:2}{cells}".rstrip()


# -- the other formats -----------------------------------------------------------------------------------------------


def as_json(captured: Captured, found: Sequence[Document]) -> str:
    """{"model", "config", "groups", "graphs": [{"graph", "stage", "nodes": [NodeRecord's fields]}]}"""
    shown = [{"graph": d.graph, "stage": d.stage, "nodes": [asdict(node) for node in d.nodes]} for d in found]
    value = {"model": captured.model, "config": asdict(captured.config), "groups": captured.groups, "graphs": shown}
    return json.dumps(value, indent=1) + "\n"


def _graphml(document: Document) -> str:
    return "\n".join(import_networkx().generate_graphml(graph_of(document.nodes))) + "\n"


def _gexf(document: Document) -> str:
    buffer = io.BytesIO()
    import_networkx().write_gexf(graph_of(document.nodes), buffer)
    return buffer.getvalue().decode("utf-8") + "\n"


def _dot(document: Document) -> str:
    return dot(document.name, document.nodes)


FORMATS: dict[str, Callable[[Document], str]] = {"dot": _dot, "graphml": _graphml, "gexf": _gexf}
"""Formats that hold one graph; "text" and "json" hold any number."""
