"""losia-fx page: the data in the file, and the page in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from losia_fx.cli import main
from losia_fx.finetune.bitmaps import decode
from losia_fx.finetune.record import Move, Names, RunRecord, SelectionRecord, StepRecord
from losia_fx.finetune.report import write_json
from losia_fx.method.subnet import draw
from losia_fx.tools import page
from tests.support import tiny
from tests.tools.browser import browser

PERIOD, STEPS = 3, 20
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def layers(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for block in data["blocks"] for layer in block["layers"]}


@pytest.fixture(scope="module")
def record() -> RunRecord:
    """Of a run of the tiny decoder: the head is group 0, its block group 1."""
    model, _ = tiny.decoder()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("proj.weight") or "lm_head" in n}
    groups = [["lm_head.weight"], [name for name in shapes if name != "lm_head.weight"]]
    made = RunRecord(groups, shapes, 900, 3000)
    made.steps += [StepRecord(step, 3.0, 1e-3, 0.1, 64.0, 0) for step in range(1, STEPS + 1)]
    generator = torch.Generator().manual_seed(0)
    for step in range(0, STEPS + 1, PERIOD):
        for group in (0, 1) if step == 0 else (step // PERIOD % 2,):
            for name in groups[group]:
                out, inner = shapes[name]
                size = (out // 8, inner if group == 0 else inner // 8)
                made.selections.setdefault(name, []).append(SelectionRecord(step, *draw((out, inner), size, generator)))
            if step:
                made.moves.append(Move(step, group, 0.5, 0.4))
    return made


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory, record: RunRecord) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model, _ = tiny.decoder()
    model.save_pretrained(folder)  # type: ignore[operator]
    settings = {"period": PERIOD, "steps": STEPS, "device": "cpu", "lr": 1e-3, "batch_size": 4, "seq_length": 8}
    write_json(folder / "run.json", record, Names("</script><b>", None), settings)
    out = folder / "page.html"
    assert main(["page", str(folder), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def test_the_page_needs_nothing_else(run_page: Path) -> None:
    text = run_page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "@@" not in text


def test_the_data_is_the_run_s(run_page: Path, record: RunRecord) -> None:
    data = data_of(run_page)
    assert data["moved"]
    assert data["config"]["period"] == PERIOD
    assert data["inputs"]["input_ids"] == [4, 8]
    assert data["round"].startswith("a round is 6 optimizer steps (2 groups, slots of 3 steps): 20 steps hold 3")
    layer = layers(data)[WEIGHT]
    assert (layer["shape"], layer["subnet"], layer["group"]) == ([32, 32], [4, 4], 1)
    assert [move["step"] for move in layer["selections"]] == [0, 3, 9, 15]
    reached: set[tuple[int, int]] = set()
    before: set[tuple[int, int]] = set()
    for ours, theirs in zip(record.selections[WEIGHT], layer["selections"], strict=True):
        rows, cols = decode(theirs["rows"], 32), decode(theirs["cols"], 32)
        assert torch.equal(rows, ours.rows)
        assert torch.equal(cols, ours.cols)
        inside = {(row, col) for row in rows.tolist() for col in cols.tolist()}
        reached |= inside
        assert theirs["reached"] == pytest.approx(len(reached) / 32**2)
        if before:
            assert theirs["jaccard"] == pytest.approx(len(inside & before) / len(inside | before))
            assert theirs["captured"] == 0.4
        before = inside


def test_the_nodes_are_those_of_the_passes(run_page: Path) -> None:
    layer = layers(data_of(run_page))[WEIGHT]
    before, after = layer["before"], layer["after"]
    assert [line["op"] for line in before if line["mark"] == "removed"] == ["linear"]
    added = [line["op"] for line in after if line["mark"] == "added"]
    assert [op for op in added if op.startswith("input")] == [f"input: {p}" for p in ("S", "rows", "cols", "handle")]
    assert [op.rpartition(".")[0] for op in added if op.startswith("losia")] == ["losia.tap", "losia.subnet_linear"]
    product = next(line for line in after if line["op"].startswith("losia.subnet_linear"))
    assert "q_proj.weight" in product["inputs"]
    assert product["value"] == "4 x 8 x 32 float32"
    assert layer["cost"]["subnet"] * 64 == layer["cost"]["full"] == 2 * 32 * 32 * 32
    assert layer["cost"]["kept_x"] * 8 == layer["cost"]["whole_x"] == 32 * 32 * 4


def test_the_methods_stand_beside_each_other(run_page: Path) -> None:
    methods = {method["name"]: method for method in data_of(run_page)["methods"]}
    ours = [f"LoSiA p = 1/{n}" for n in (32, 16, 8, 4, 2)]
    assert list(methods) == [*ours, "full fine-tuning", "LoRA r=8", "LoRA r=16", "LoRA r=64"]
    assert [methods[name]["note"] for name in ours] == ["", "", "as here", "", ""]
    trained = [methods[name]["trained"] for name in ours]
    assert trained == sorted(trained)
    assert all(methods[name]["bytes"] == sum(methods[name]["memory"].values()) for name in methods)
    full, eighth = methods["full fine-tuning"], methods["LoSiA p = 1/8"]
    assert full["flops"]["weight gradients"] > 10 * eighth["flops"]["weight gradients"]


@pytest.mark.parametrize(
    "model",
    [
        "tests.support.tiny:experts",
        pytest.param("tests.support.tiny:encoder", marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_a_model_alone_shows_its_first_subnets(model: str | None, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert page.main([*([model] if model else []), "--out", str(out), "--steps", "10", "--profile-steps", "11"]) == 0
    data = data_of(out)
    assert not data["moved"]
    assert "10 steps" in data["round"]
    shown = {name: layer for name, layer in layers(data).items() if layer["subnet"]}
    expected = {None: 29, "tests.support.tiny:experts": 8, "tests.support.tiny:encoder": 7}
    assert len(shown) == expected[model]
    for layer in shown.values():
        (first,) = layer["selections"]
        experts = layer["shape"][0] if len(layer["shape"]) == 3 else None
        rows = decode(first["rows"], layer["shape"][-2], experts)
        assert rows.shape[-1] == layer["subnet"][-2]
        assert any(line["op"].startswith("losia.subnet") for line in layer["after"])
    assert list(tmp_path.iterdir()) == [out]  # no draft is left


def test_a_run_is_explained_by_all_its_settings(tmp_path: Path, record: RunRecord) -> None:
    """It was by the paper's rule, whatever it had been."""
    model, _ = tiny.decoder()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    rule = {"schedule": "all", "importance": "random", "period": 1, "head_rows": "mixed", "head_period": 9}
    settings = {"steps": STEPS, "device": "cpu", "lr": 1e-3, "batch_size": 4, "seq_length": 8, "target": None, **rule}
    write_json(tmp_path / "run.json", record, Names("text", None), {**settings, "profile_steps": 9, "trainable": []})
    assert main(["page", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    data = data_of(tmp_path / "page.html")
    assert "slots of 1 steps, of the head 9" in data["round"]
    assert data["title"].endswith(" (on record: one move of 16)")
    assert data["methods"][0]["memory"]["profile"] == 3 * 4 * 64 * 32


def _open(chromium: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and what its console complains of."""
    opened = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    opened.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    opened.goto(path.as_uri())
    return opened, complaints


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "light"), (400, "dark")])
def test_a_click_opens_a_layer(chromium: Any, run_page: Path, width: int, scheme: str) -> None:
    shown, complaints = _open(chromium, run_page, width, scheme)
    tiles = shown.locator(".tile")
    assert tiles.count() == 9  # the embedding too
    assert shown.locator("#layer").is_hidden()
    shown.click(f'[data-name="{WEIGHT}"]')
    assert shown.locator("#layer-name").inner_text() == WEIGHT
    assert shown.evaluate("document.activeElement.id") == "layer-name"
    in_sight = "() => { const box = document.getElementById('layer-name').getBoundingClientRect();"
    shown.wait_for_function(f"{in_sight} return box.top >= 0 && box.bottom < innerHeight; }}", timeout=10_000)
    assert shown.locator(".nodes .removed").count() == 1
    assert "subnet_linear" in shown.locator(".nodes .added").last.inner_text()
    assert shown.locator(".chart").count() == 2
    assert shown.locator(".chart .bar").count() == 3
    assert shown.locator("#methods tbody tr").count() == 9
    inked = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v, i) => i % 4 == 3 && v > 0)"
    assert all(canvas.evaluate(inked) for canvas in shown.locator("canvas").all())
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    shown.close()


def test_the_bitmap_is_the_selection(chromium: Any, run_page: Path, record: RunRecord) -> None:
    """A pixel a cell, behind strips of 10 pixels; the slider goes through the selections."""
    shown, _ = _open(chromium, run_page, 1280)
    shown.click(f'[data-name="{WEIGHT}"]')
    read = """c => { const size = 32, all = c.getContext('2d').getImageData(10, 10, size, size).data;
        return Array.from({length: size * size}, (_, i) => all[4 * i + 3] > 0); }"""
    for number, selection in enumerate(record.selections[WEIGHT]):
        shown.locator("input[type=range]").fill(str(number))
        assert f"from step {selection.step} on" in shown.locator(".stepper output").inner_text()
        cells = torch.tensor(shown.locator("canvas").first.evaluate(read)).reshape(32, 32)
        mask = torch.zeros(32, 32, dtype=torch.bool)
        mask[selection.rows[:, None], selection.cols] = True
        assert torch.equal(cells, mask)
    shown.close()


def test_the_keyboard_opens_a_layer(chromium: Any, run_page: Path) -> None:
    shown, complaints = _open(chromium, run_page, 1000)
    for _ in range(20):  # past the link to the map and the choice of bars
        shown.keyboard.press("Tab")
        if shown.evaluate("document.activeElement.className").startswith("tile"):
            break
    shown.keyboard.press("ArrowDown")
    assert shown.evaluate("document.activeElement.dataset.name") == WEIGHT
    shown.keyboard.press("ArrowRight")
    assert shown.evaluate("document.activeElement.dataset.name") == WEIGHT.replace("q_proj", "k_proj")
    shown.keyboard.press("ArrowLeft")
    shown.keyboard.press("Enter")
    assert shown.locator("#layer-name").inner_text() == WEIGHT
    assert shown.locator(f'[data-name="{WEIGHT}"]').get_attribute("aria-expanded") == "true"
    shown.keyboard.press("Escape")
    assert shown.locator("#layer").is_hidden()
    assert shown.evaluate("document.activeElement.dataset.name") == WEIGHT
    assert complaints == []
    shown.close()


def test_an_address_may_name_a_layer(chromium: Any, run_page: Path) -> None:
    shown = chromium.new_page()
    shown.goto(f"{run_page.as_uri()}#{WEIGHT}")
    assert shown.locator("#layer-name").inner_text() == WEIGHT
    shown.close()


def test_bad_input_is_one_line(tmp_path: Path, run_page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    out = str(tmp_path / "page.html")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("[]", encoding="utf-8")
    for argv, why in (
        (["no/such/model", "--out", out], "no such file or folder"),
        ([str(run_page.parent), "--out", str(tmp_path)], "name a file in a folder that exists"),
        ([str(run_page.parent), "--out", str(tmp_path / "no" / "page.html")], "name a file in a folder that exists"),
        ([str(tmp_path / "run"), "--out", out], "cannot be read as the record of a run"),
        (["--steps", "0", "--out", out], "--steps 0"),
    ):
        assert main(["page", *argv]) == 2
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1
    assert not Path(out).exists()
