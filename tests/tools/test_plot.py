"""losia-fx plot: a run read back to the bit, and pictures of what is in it."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch

from losia_fx.cli import main
from losia_fx.finetune.bitmaps import decode, encode
from losia_fx.finetune.plots import coverage_of, map_of
from losia_fx.finetune.record import SelectionRecord
from losia_fx.tools import plot
from losia_fx.tools.plot.command import PICTURES
from losia_fx.tools.plot.overlap import jaccard
from losia_fx.tools.plot.pictures import coverage, rates
from losia_fx.tools.plot.run_folder import read_run
from tests.tools.runs import GROUPS, PERIOD, SHAPES, STEPS, write_run


def test_indices_survive_as_bitmaps() -> None:
    for size in (1, 7, 8, 9, 64, 1001):
        indices = torch.randperm(size)[: max(1, size // 3)].sort().values
        assert torch.equal(decode(encode(indices, size), size), indices)
    experts = torch.stack([torch.randperm(13)[:4].sort().values for _ in range(5)])
    assert torch.equal(decode(encode(experts, 13), 13, 5), experts)
    assert encode(torch.tensor([0, 9]), 10) == "gEA="  # 1000 0000 0100 0000


@pytest.mark.parametrize(
    ("text", "experts", "why"),
    [("gEA", None, "base64"), ("gA==", None, "1 bytes"), ("gEAA", 2, "different sizes")],
)
def test_what_is_no_bitmap_is_refused(text: str, experts: int | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode(text, 10, experts)


def test_a_run_is_read_back_whole(tmp_path: Path) -> None:
    written = write_run(tmp_path)
    read = read_run(tmp_path).record
    assert read.groups == written.groups
    assert read.shapes == written.shapes
    assert (read.steps, read.moves, read.evaluations) == (written.steps, written.moves, written.evaluations)
    for name, selections in written.selections.items():
        for ours, theirs in zip(selections, read.selections[name], strict=True):
            assert ours.step == theirs.step
            assert torch.equal(ours.rows, theirs.rows)
            assert torch.equal(ours.cols, theirs.cols)


def test_jaccard_and_coverage_count_elements() -> None:
    shape = (3, 16, 20)
    made = [SelectionRecord(0, *_draw(shape)), SelectionRecord(4, *_draw(shape)), SelectionRecord(8, *_draw(shape))]
    masks = [_mask(selection, shape) for selection in made]
    assert jaccard(made[0], made[0]) == 1.0
    assert jaccard(made[0], made[1]) == pytest.approx(float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()))
    reached = [masks[0], masks[0] | masks[1], masks[0] | masks[1] | masks[2]]
    assert coverage_of(made, shape) == pytest.approx([float(mask.float().mean()) for mask in reached])
    assert torch.allclose(map_of(made[0], shape), masks[0].float().mean(0))  # less than a bin a row: no binning


def test_the_rates_are_the_scheduler_s_but_while_a_group_is_rewarmed(tmp_path: Path) -> None:
    write_run(tmp_path)
    run = read_run(tmp_path)
    table = rates(run)
    scheduled = [step.lr for step in run.record.steps]
    assert table.shape == (len(GROUPS), STEPS)
    for group in range(len(GROUPS)):
        for column in range(STEPS):
            last = max((m.step for m in run.record.moves if m.group == group and m.step <= column), default=None)
            share = 1.0 if last is None else min(1.0, (column - last + 1) / PERIOD)
            assert table[group, column] == pytest.approx(scheduled[column] * share)


def test_a_run_of_all_groups_at_once_is_not_rewarmed_and_has_gaps(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "run.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["settings"] |= {"schedule": "all", "importance": "random", "head_rows": "mixed", "head_period": 9}
    path.write_text(json.dumps(content), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.config.head_period == 9
    assert (rates(run) == [step.lr for step in run.record.steps]).all()
    assert run.record.gaps == " (on record: one move of 4)"
    assert run.record.gaps in coverage(run.record).axes[0].get_title()


def test_every_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    assert main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "pictures")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "pictures" / f"{name}.png") for name in PICTURES]
    for path in printed:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.02  # not a blank sheet
    assert not list((tmp_path / "pictures").glob(".*"))


def test_pictures_name_the_weights_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    write_run(tmp_path)
    options = ["--format", "svg", "--only", "moves", "coverage", "--layer", "experts*", "--layer", "layers.0.q_proj"]
    assert plot.main([str(tmp_path), *options]) == 0
    moves = (tmp_path / "moves.svg").read_text(encoding="utf-8")
    assert "layers.1.experts.down_proj" in moves
    assert "layers.0.q_proj" in moves
    assert "up_proj" not in moves
    coverage = (tmp_path / "coverage.svg").read_text(encoding="utf-8")
    assert all(name.removesuffix(".weight").removeprefix("model.") in coverage for name in SHAPES)
    assert not (tmp_path / "losses.svg").exists()


def _complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plot", *argv]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert "is no folder" in _complaint(capsys, str(run))
    run.mkdir()
    assert "has no run.json" in _complaint(capsys, str(run))
    (run / "run.json").write_text("{nothing", encoding="utf-8")
    assert "cannot be read" in _complaint(capsys, str(run))
    write_run(run)
    assert "matches none of the run's 5 weights" in _complaint(capsys, str(run), "--layer", "no_such")
    assert "is a file" in _complaint(capsys, str(run), "--out", str(run / "run.json"))
    content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    del content["selections"]
    (run / "run.json").write_text(json.dumps(content), encoding="utf-8")
    assert "lacks 'selections'" in _complaint(capsys, str(run))


def _draw(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.stack([torch.randperm(shape[-2])[:5].sort().values for _ in range(shape[0])])
    cols = torch.stack([torch.randperm(shape[-1])[:6].sort().values for _ in range(shape[0])])
    return rows, cols


def _mask(selection: SelectionRecord, shape: tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for expert in range(shape[0]):
        mask[expert][selection.rows[expert][:, None], selection.cols[expert]] = True
    return mask
