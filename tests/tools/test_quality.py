"""python -m losia_fx.tools.quality: a run a line, gone on with, and the figures that are made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from losia_fx.tools.quality import bases, frontier, main, text, training
from losia_fx.tools.quality.methods import METHODS
from losia_fx.tools.quality.training import Outcome, Run

QUICK = ["--steps", "2", "--base-steps", "2", "--seeds", "1"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Options of a call over a small text; held-out windows are few."""
    monkeypatch.setattr(text, "WINDOWS", 4)
    words = tmp_path / "words"
    words.mkdir()
    for number in range(24):
        (words / f"{number}.txt").write_text(f"chapter {number}: the quick brown fox. " * 60)
    monkeypatch.setattr(text, "standard_library", lambda: text.folder(words))
    return ["--out", str(tmp_path / "out"), "--text", *QUICK]


def lines(out: Path, name: str = "runs.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_it_goes_on_where_it_was_cut_off(few: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, argv = tmp_path / "out", [*few, "--bases", "perl", "--methods", "static", "full"]
    assert main([*argv, "--rates", "static=1e-2,2e-2", "full=1e-3"]) == 0
    first = lines(out)
    assert [(run["method"], run["lr"], run["trained"]) for run in first] == [
        ("static", 1e-2, 12160),
        ("static", 2e-2, 12160),
        ("full", 1e-3, 1303680),
    ]
    with (out / "runs.jsonl").open("a") as file:
        file.write('{"date": "cut off')
    assert main([*argv, "--rates", "static=1e-2,2e-2", "full=1e-3,2e-3"]) == 0
    assert lines(out)[:3] == first
    assert len(lines(out)) == 4
    assert "3 of 4 runs are in" in capsys.readouterr().out
    table = (out / "quality.md").read_text()
    assert "| full | every parameter | 1,303,680 | 0.002 | 1 |" in table
    assert (out / "quality.png").stat().st_size > 1000
    assert main([*argv, "--steps", "3"]) == 2
    assert "of another setting" in capsys.readouterr().err


@pytest.mark.slow
def test_parts_share_the_runs_and_are_read_together(few: list[str], tmp_path: Path) -> None:
    argv = [*few, "--bases", "perl", "--methods", "static", "random", "--rates", "static=1e-2", "random=1e-2"]
    assert main([*argv, "--part", "2/2"]) == 0
    assert [run["method"] for run in lines(tmp_path / "out", "runs-2-of-2.jsonl")] == ["random"]
    assert main([*argv, "--part", "1/2"]) == 0
    assert [run["method"] for run in lines(tmp_path / "out", "runs-1-of-2.jsonl")] == ["static"]
    assert main([*argv, "--report-only"]) == 0
    table = (tmp_path / "out" / "quality.md").read_text()
    assert all(f"| {METHODS[name].says} |" in table for name in ("static", "random"))


@pytest.mark.slow
def test_the_second_base_is_made_once(few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*few, "--bases", "python", "--methods", "static", "--rates", "static=1e-2"]
    assert main(argv) == 0
    run = lines(tmp_path / "out")[0]
    assert (run["base"], run["text"]) == ("python", "perl")
    monkeypatch.setattr(bases, "pretrain", lambda *given, **options: pytest.fail("pretrained again"))
    assert main([*argv, "--rates", "static=2e-2"]) == 0
    assert [run["lr"] for run in lines(tmp_path / "out")] == [1e-2, 2e-2]


BY_DEFAULT = ("roaming", "all-rms")
"""The others are slow."""


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in sorted(METHODS)]
)
def test_every_method_learns(method: str) -> None:
    if method.startswith("lora"):
        pytest.importorskip("peft")
    base = bases.Base("perl", bases.SHIPPED, text.unseen_perl())
    torch.manual_seed(0)
    blocks = torch.randint(0, 2048, (8, text.LENGTH))
    model = METHODS[method].prepare(base.model(), 0)
    before = training.held_out_loss(model, blocks)
    training.train(model, blocks, METHODS[method], METHODS[method].rates[0], seed=0, steps=4)
    assert training.held_out_loss(model, blocks) < before


def test_a_wrong_call_is_named(few: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*few, "--methods", "static", "--rates", "full=1e-3"]) == 2
    assert "--rates names 'full'" in capsys.readouterr().err
    assert main([*few, "--text", "/nowhere/at/all"]) == 2
    assert "/nowhere/at/all: no such folder" in capsys.readouterr().err
    for wrong in (
        ["--part", "3/2"],
        ["--rates", "full"],
        ["--rates", "full=inf"],
        ["--rates", "full=1e-3,1e-3"],
        ["--methods", "magic"],
        ["--steps", "0"],
        ["--steps", "ten"],
    ):
        with pytest.raises(SystemExit):
            main([*few, *wrong])


def test_two_of_one_name_are_refused_before_a_run(
    few: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("perl", "a/docs", "b/docs"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(24):
            (tmp_path / place / f"{number}.txt").write_text("some words")
    docs = [str(tmp_path / "a/docs"), str(tmp_path / "b/docs")]
    for wrong, twice in (
        (["--text", *docs], "'docs' twice"),
        (["--text", str(tmp_path / "perl")], "'perl' twice"),  # it would stand for the Perl manual
        (["--methods", "static", "static"], "'static' twice"),
        (["--rates", "full=1e-3", "full=1e-4"], "'full' twice"),
    ):
        assert main([*few, *wrong]) == 2
        assert twice in capsys.readouterr().err


def test_a_report_of_nothing_says_so_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "nowhere"), "--report-only"]) == 2
    assert "holds no run of these bases and methods" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


# -- the figures, by hand ---------------------------------------------------------------------------------------------


def outcome(learnt: float, forgotten: float) -> Outcome:
    return Outcome(learnt, forgotten, 5.0, 3.0, 100, 60.0)


RUNS = {
    Run("perl", "python", "one", 1e-2, 0): outcome(4.0, 3.8),
    Run("perl", "python", "one", 1e-3, 0): outcome(4.4, 3.4),
    Run("perl", "python", "one", 1e-2, 1): outcome(4.0, 4.0),
    Run("perl", "python", "one", 1e-3, 1): outcome(4.4, 3.4),
    Run("perl", "python", "two", 1e-2, 0): outcome(4.2, 3.3),
    Run("perl", "python", "two", 1e-3, 0): outcome(4.6, 3.1),
}


def test_points_are_means_over_seeds_with_standard_errors() -> None:
    first, second, *_ = frontier.points(RUNS)
    assert (first.method, first.lr) == ("one", 1e-3)
    assert (second.lr, second.forgotten.count) == (1e-2, 2)
    assert second.forgotten.value == pytest.approx(3.9)
    assert second.forgotten.error == pytest.approx(0.1)  # sqrt((0.1^2 + 0.1^2) / 1) / sqrt(2)
    assert str(second.forgotten) == "3.900 ±0.100"
    assert str(frontier.points(RUNS)[-1].learnt) == "4.200"


def test_what_is_forgotten_is_read_between_the_rates_seed_by_seed() -> None:
    found = frontier.at_level(RUNS, "one", 4.1)
    assert found is not None
    assert (found.value, found.count) == (pytest.approx((3.7 + 3.85) / 2), 2)
    assert frontier.at_level(RUNS, "two", 4.1) is None
    assert frontier.levels(RUNS) == [4.4, 4.2]


def test_levels_lie_where_runs_do_and_two_methods_reach() -> None:
    runs = {Run("perl", "python", name, lr, 0): outcome(lr, 3.0) for name in "ab" for lr in range(1, 31)}
    found = frontier.levels({**runs, Run("perl", "python", "a", 99.0, 0): outcome(99.0, 3.0)})
    assert len(found) == frontier.LEVELS
    assert (found[0], found[-1]) == (30, 1)
    assert frontier.levels({run: each for run, each in runs.items() if run.method == "a"}) == []


def test_a_point_that_another_beats_on_both_is_not_of_the_frontier() -> None:
    curve = [(4.0, 3.8), (4.1, 3.9), (4.2, 3.5)]
    assert frontier.frontier(curve) == [(4.0, 3.8), (4.2, 3.5)]
    assert frontier.interpolated(curve, 4.1) == pytest.approx(3.65)
    assert frontier.interpolated(curve, 4.3) is None


def test_a_text_is_split_by_file_and_what_is_no_text_is_passed_over(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "zero.bin").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / ".hidden").write_text("hidden")
    corpus = text.folder(tmp_path)
    assert sorted([*corpus.train, *corpus.held_out]) == sorted(f"text {number}" for number in range(60))
    assert corpus.held_out
    assert text.folder(tmp_path) == corpus
