"""losia-fx dump: every format on every model, read back; one clear line for what is wrong."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from torch import Tensor, fx, nn

from losia_fx import LosiaConfig, LosiaError
from losia_fx.cli import main
from losia_fx.tools import dump
from losia_fx.tools.graphs import documents
from losia_fx.tools.graphs.capture import capture
from losia_fx.tools.graphs.documents import dump_graph
from losia_fx.tools.graphs.networkx import to_networkx
from losia_fx.tools.graphs.records import records
from tests.support.toys import VOCABULARY, Toy, batch
from tests.tools.shown import CONFIG, EACH, OPTIONS, argument, captured, captured_once, linears

__all__ = ["captured_once"]
JOINT = ["joint", "sink-gathers", "remake-inputs", "loosen-views"]
STAGES = ["dynamo", "subnet-rewrite", "insert-localization", *JOINT, "forward", "backward"]
SHARED = pytest.mark.usefixtures("captured_once")


def run(name: str, *arguments: str) -> int:
    return dump.main([*argument(name), *OPTIONS, *arguments])


@SHARED
@pytest.mark.parametrize("name", EACH)
def test_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name) == 0
    text = capsys.readouterr().out
    headings = re.findall(r"^graph 0, ([\w-]+): (\d+) nodes(?:, (\d+) rewritten)?$", text, re.MULTILINE)
    assert [stage for stage, _, _ in headings] == STAGES
    rewritten = {stage: int(count or 0) for stage, _, count in headings}
    assert [rewritten[stage] for stage in STAGES if stage not in JOINT] == [0, linears(name), linears(name), 0, 0]
    assert rewritten["joint"] == 0
    assert rewritten["sink-gathers"] <= rewritten["remake-inputs"] < rewritten["loosen-views"]
    for stage, nodes, _ in headings:
        assert int(nodes) == len(records(captured(name).graphs[0].stages[stage]))
    assert len([line for line in text.splitlines() if line.startswith("* ")]) >= 2 * linears(name)
    (section,) = re.findall(r"^graph 0, dynamo: .*?\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    head, *rows = section.splitlines()
    places = [head.index(column) for column in ("op", "shape", "dtype", "owner module", "source")]
    for row in rows:  # aligned: every column starts where its heading does
        assert all(place >= len(row) or row[place - 1] == " " for place in places)
    (line,) = (row for row in rows if re.match(r"> .*0\.(self_attn\.q_proj|attention\.self\.query) ", row))
    assert re.search(r"  linear +2x16x\d+ +float32 +[\w.]+\.(q_proj|query) +modeling_\w+\.py:\d+$", line)


@SHARED
@pytest.mark.parametrize("name", EACH)
def test_json(name: str, tmp_path: Path) -> None:
    out = tmp_path / "dump.json"
    assert run(name, "--format", "json", "--out", str(out)) == 0
    value = json.loads(out.read_text())
    assert value["config"]["rank_factor"] == 0.25
    assert sum(map(len, value["groups"])) == linears(name)
    first = [entry for entry in value["graphs"] if entry["graph"] == 0]
    assert [entry["stage"] for entry in first] == STAGES
    for entry in first:
        names = {node["name"] for node in entry["nodes"]}
        assert len(names) == len(entry["nodes"])
        assert all(given in names for node in entry["nodes"] for given in node["inputs"])
    weights = Counter(node["weight"] for node in first[2]["nodes"] if node["status"] == "rewritten")
    assert weights == {weight: 1 for group in value["groups"] for weight in group}
    assert list(tmp_path.iterdir()) == [out]


@SHARED
@pytest.mark.parametrize("name", EACH)
def test_graphml_and_gexf(name: str, tmp_path: Path) -> None:
    for format, read in (("graphml", nx.read_graphml), ("gexf", nx.read_gexf)):
        assert run(name, "--format", format, "--out", str(tmp_path / format)) == 0
        for stage in STAGES:
            graph = to_networkx(captured(name).graphs[0].stages[stage])
            back = read(tmp_path / format / f"graph0-{stage}.{format}")
            assert_same_graph(back, graph)


def assert_same_graph(back: Any, graph: Any) -> None:
    """Nodes, edges and all attributes with their types; GEXF adds labels and numbers of its own."""
    assert set(back) == set(graph)
    assert set(back.edges) == set(graph.edges)
    for node, data in graph.nodes(data=True):
        read = {key: value for key, value in back.nodes[node].items() if key in data}
        assert read == data
        assert [type(value) for value in read.values()] == [type(data[key]) for key in read]
    for source, target, data in graph.edges(data=True):
        assert {key: back.edges[source, target][key] for key in data} == data


@SHARED
@pytest.mark.parametrize("name", EACH)
def test_dot(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--format", "dot", "--stage", "insert-localization") == 0
    text = capsys.readouterr().out
    graph = to_networkx(captured(name).graphs[0].stages["insert-localization"])
    nodes, edges = read_dot(text)
    assert set(nodes) == set(graph)
    assert edges == set(graph.edges)
    filled = {node for node, attributes in nodes.items() if "#f4a259" in attributes}
    assert filled == {node for node, data in graph.nodes(data=True) if data["rewritten"]}
    assert 'label="lm_head"' in text or name == "bert"


def read_dot(text: str) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Nodes with their attributes and edges; every line must be one that we write."""
    quoted = r'"((?:[^"\\]|\\.)*)"'
    nodes: dict[str, str] = {}
    edges: set[tuple[str, str]] = set()
    depth = 0
    for line in text.splitlines():
        depth += line.endswith("{") - (line.strip() == "}")
        if edge := re.fullmatch(rf"\s*{quoted} -> {quoted};", line):
            edges.add((edge[1], edge[2]))
        elif node := re.fullmatch(rf"\s*{quoted} \[label={quoted}(.*)\];", line):
            nodes[node[1]] = node[3]
        else:
            assert re.fullmatch(
                rf"digraph {quoted} {{|  rankdir.*;|  subgraph cluster_\d+ {{|    label={quoted}; color=gray;|\s*}}",
                line,
            )
    assert depth == 0
    return nodes, edges


@SHARED
def test_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llama", "--format", "json", "--stage", "insert-localization", "--layer", "layers.0.mlp") == 0
    ((shown),) = json.loads(capsys.readouterr().out)["graphs"]
    nodes = {node["name"]: node for node in shown["nodes"]}
    inside = {n for n, node in nodes.items() if ".layers.0.mlp." in f"{node['owner']}." and node["op"] != "placeholder"}
    assert sum(node["status"] == "rewritten" for node in nodes.values()) == 3
    assert inside
    for name, node in nodes.items():
        owned = ".layers.0.mlp." in f"{node['owner']}."
        next_to = inside & set(node["inputs"]) or any(name in nodes[other]["inputs"] for other in inside)
        assert owned or next_to, name
    assert all(given in nodes for name in inside for given in nodes[name]["inputs"])


def test_dump_graph() -> None:
    text = dump_graph(Toy(), batch(), config=CONFIG, stage="subnet-rewrite", layer=("layers.1.mix",))
    assert re.search(r"^graph 0, subnet-rewrite: \d+ nodes, 1 rewritten$", text, re.MULTILINE)
    (line,) = (line for line in text.splitlines() if line.startswith("* subnet"))
    assert re.search(r"losia\.subnet_linear\.v\d+ +2x6x16 +float32 +layers\.1\.mix +toys\.py:\d+$", line)


@SHARED
@pytest.mark.parametrize("stage", JOINT)
def test_a_stage_of_the_joint_graph(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llama", "--stage", stage) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("graph ")] == [
        line for line in text.splitlines() if line.startswith(f"graph 0, {stage}: ")
    ]
    assert re.search(r"^  tangents_1 +placeholder ", text, re.MULTILINE)
    assert re.search(r"^\| \w+ +aten.mm.default +\d+x\d+ .* model\.layers\.0\.self_attn\.q_proj", text, re.MULTILINE)
    marks = {line[0] for line in text.splitlines()[4:]}
    assert {"+", "~"} & marks == {"joint": set(), "sink-gathers": {"+"}}.get(stage, {"+", "~"})


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        *((stage, {"compiler": "eager"}, "compiler 'eager' makes no joint graph of forward") for stage in JOINT),
        (
            "loosen-views",
            {"compiler": "inductor"},
            "no graph comes through it with compiler 'inductor', schedule 'async'",
        ),
        (
            "insert-localization",
            {"schedule": "static"},
            "with compiler 'inductor', schedule 'static' and importance 'mixed'",
        ),
        ("frozen-products", {"compiler": "eager"}, "and importance 'mixed', without frozen_products"),
    ],
)
def test_a_stage_that_these_options_do_without(stage: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LosiaError, match=f"^--stage {stage}: .*{said}.*; there are dynamo, subnet-rewrite"):
        dump_graph(Toy(), batch(), config=LosiaConfig(rank_factor=0.25, **options), stage=stage)


def test_nested_bodies_are_joined_to_their_graph() -> None:
    value = json.loads(
        dump_graph(Toy(checkpointed=True), batch(), config=CONFIG, stage="subnet-rewrite", format="json")
    )
    nodes = {node["name"]: node for node in value["graphs"][0]["nodes"]}
    inside = [node for node in nodes.values() if "/" in node["name"]]
    assert sum(node["status"] == "rewritten" for node in inside) == 6
    for node in inside:
        if node["op"] == "placeholder":
            (outer,) = node["inputs"]
            assert "/" not in outer
    states = [node for node in inside if node["op"] == "placeholder" and "losia_" in node["name"]]
    assert states
    assert all(node["inputs"][0] == node["name"].rpartition("/")[2] for node in states)
    regions = [node for node in nodes.values() if node["target"] == "tag_activation_checkpoint"]
    assert all(any("/output" in given for given in node["inputs"]) for node in regions)
    assert len(regions) == 2


@SHARED
def test_terminal_is_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    for variable, value in (("TERM", "xterm-256color"), ("NO_COLOR", None)):
        monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable, raising=False)
    assert run("llama", "--stage", "insert-localization") == 0
    lines = screen.getvalue().splitlines()
    assert sum(line.startswith("\x1b[1;33m* ") for line in lines) == linears("llama")
    assert not any("\x1b" in line for line in lines if re.match(r"  \w", line) and "node " not in line[:8])


def test_escapes() -> None:
    name = 'a"b <&>'

    class Odd(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(VOCABULARY, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return getattr(self, name)(super().forward(ids))

    made = capture(Odd(), batch(), CONFIG)
    for format in ("dot", "graphml", "gexf"):
        text = documents.one_document(made, documents.documents(made, "dynamo"), format)
        if format == "dot":
            assert len(read_dot(text)[0]) > 4
            assert r'label="a\"b <&>"' in text
        else:
            read: Any = {"graphml": nx.read_graphml, "gexf": nx.read_gexf}[format]
            graph = read(io.BytesIO(text.encode()))
            assert name in {data["owner"] for _, data in graph.nodes(data=True)}


@SHARED
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", "nosuch"], "--layer nosuch: no module of that name in the graphs; there are model.layers.0."),
        (["--stage", "nosuch"], "--stage nosuch: there is no such stage; there are dynamo, subnet-rewrite"),
        (["--format", "dot"], "--format dot holds one graph, and there are 9 (graph0-dynamo, "),
        (["--format", "gexf", "--out", "there.gexf"], "--out there.gexf: 9 graphs need a folder"),
        (["--out", "no/dump.txt"], "--out no/dump.txt: there is no folder no"),
        (["--out", "."], "--out .: is a folder; name a file"),
        (["--no-weights"], "--no-weights: is about ONNX, not --format text"),
        (["--format", "onnx"], "--format onnx: name the file with --out"),
        (["--format", "onnx", "--out", "no/a.onnx"], "--out no/a.onnx: there is no folder no"),
        (["--format", "onnx", "--out", "a.onnx", "--stage", "forward"], "--stage: an ONNX file holds the whole"),
        (["--format", "nosuch"], "invalid choice: 'nosuch'"),
        (["--rank-factor", "2"], "rank_factor=2.0: give a number in (0, 1]"),
    ],
)
def test_wrong(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("llama", *arguments) == 2
    captured_output = capsys.readouterr()
    assert captured_output.out == ""
    assert captured_output.err.count("\n") == 1
    assert said in captured_output.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["dump", "diff"])
def test_no_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@SHARED
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run("llama", "--out", str(blocked / "dump.txt")) in (1, 2)
    assert run("llama", "--format", "gexf", "--out", str(blocked / "folder")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "Traceback" not in error


def test_missing_networkx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(LosiaError, match=r"needs networkx: install losia-fx\[tools\]"):
        to_networkx(fx.symbolic_trace(lambda x: x + 1))
