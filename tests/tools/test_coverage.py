"""The coverage command: one line an architecture, whatever becomes of its process."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import losia_fx
from losia_fx.errors import LosiaError
from losia_fx.tools.coverage import (
    check as check_architecture,
)
from losia_fx.tools.coverage import (
    command as coverage,
)
from losia_fx.tools.coverage import (
    table as coverage_table,
)
from losia_fx.tools.coverage.check import DIED, EXACT, INEXACT, REFUSED, UNBUILT, Result, check
from losia_fx.tools.coverage.libraries import LIBRARIES, Library
from losia_fx.tools.coverage.record import Conditions, Record
from losia_fx.tools.tiny.architectures import build

SETTING = Conditions("transformers", "5.0", "2.13", "3.11.7", "eager", "float64")


def printed(results: list[Result]) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        coverage_table.print_results(console, results)
    return capture.get()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were run; each comes out exact but those whose name has a "g"."""
    names: list[str] = []

    def doctored(todo: Sequence[str], args: argparse.Namespace) -> Iterator[Result]:
        for name in todo:
            names.append(name)
            yield Result(name, INEXACT if "g" in name else EXACT, share=1.0)

    monkeypatch.setattr(coverage, "run", doctored)
    return names


def test_one_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "coverage.jsonl", tmp_path / "coverage.md"
    assert coverage.main(["llam[a]", "--compiler", "eager", "--out", str(out), "--table", str(table)]) == 0
    (result,) = lines_of(out)
    assert result["architecture"] == "llama"
    assert result["verdict"] == EXACT
    assert result["subnets"] == 15
    assert result["share"] == 1.0
    assert result["error"] < 1e-9
    assert (result["setting"]["compiler"], result["setting"]["torch"]) == ("eager", metadata.version("torch"))
    said = capsys.readouterr().out
    assert "1 exact, 0 INEXACT" in said
    assert "1/1  llama: exact  (about 0 min left)" in said
    assert set(tmp_path.iterdir()) == {out, table}
    assert f"transformers {metadata.version('transformers')}; {date.today()}" in table.read_text()


def test_unknown_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["llama", "nosuch*"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'nosuch*' matches none of the" in error


@pytest.mark.parametrize("option", ["--out", "--table"])
def test_missing_folder(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["llama", option, str(tmp_path / "no" / "a.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_inexact_is_shown_and_fails(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["llama", "gpt2"]) == 1
    assert "1 exact, 1 INEXACT" in capsys.readouterr().out


def test_parts_are_all_of_them_once(asked: list[str]) -> None:
    for part in ("1/3", "2/3", "3/3"):
        coverage.main(["b*", "--part", part])
    assert asked[:2] == sorted(asked[:2])
    wanted = sorted(name for name in LIBRARIES["transformers"].names() if name.startswith("b"))
    assert sorted(asked) == wanted
    assert len(wanted) > 15


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_no_such_part(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        coverage.main(["--part", text])
    assert caught.value.code == 2
    assert "as in 1/8" in capsys.readouterr().err


# -- going on --------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_done_again(asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.jsonl"
    assert coverage.main(["llama", "gpt2", "--out", str(out)]) == 1
    assert coverage.main(["llama", "gpt2", "bert", "--out", str(out)]) == 1
    assert asked == ["gpt2", "llama", "bert"]
    assert "2 of 3 are in" in capsys.readouterr().out
    assert coverage.main(["llama", "gpt2", "bert", "--out", str(out), "--retry"]) == 1
    assert asked[3:] == ["gpt2"]
    assert [line["architecture"] for line in lines_of(out)] == ["gpt2", "llama", "bert", "gpt2"]
    assert coverage.main(["llama", "--out", str(out)]) == 0


def test_the_last_line_of_a_model_counts_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record = Record(path, SETTING)
    for verdict in (DIED, UNBUILT, EXACT):
        record.add(Result("a", verdict))
    record.add(Result("b", UNBUILT))
    path.write_text(path.read_text() + '{"date": "2026')
    again = Record(path, SETTING)
    assert again.results == {"a": Result("a", EXACT), "b": Result("b", UNBUILT)}
    assert again.left(["a", "b", "c"], retry=False) == ["c"]
    assert again.left(["a", "b", "c"], retry=True) == ["b", "c"]
    again.add(Result("c", REFUSED))
    assert [line["architecture"] for line in lines_of(path)] == ["a", "a", "a", "b", "c"]
    assert Record(path, SETTING).left(["c"], retry=True) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 2: no result of coverage"),
        ('{"a": 1}', "line 2: no result of coverage"),
        ("[]", "line 2: no result of coverage"),
    ],
)
def test_a_damaged_file_is_refused(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Record(path, SETTING).add(Result("a", EXACT))
    before = path.read_text() + line + "\n"
    path.write_text(before)
    with pytest.raises(LosiaError, match=said):
        Record(path, SETTING)
    assert path.read_text() == before


def test_results_of_another_setting_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    Record(path, SETTING).add(Result("a", EXACT))
    assert coverage.main(["llama", "--out", str(path)]) == 2
    assert "line 1: of another setting (library transformers, version 5.0" in capsys.readouterr().err


# -- tables ----------------------------------------------------------------------------------------------------------


def test_markdown() -> None:
    results = [
        Result("a", EXACT, share=1.0),
        Result("b", EXACT, "1 x frozen: a | b", share=0.5),
        Result("c", INEXACT, "x <y>"),
        Result("d", REFUSED, "no"),
        Result("e", UNBUILT, "nothing"),
        Result("f", DIED, "late"),
        Result("g", EXACT, "its h alone", share=1.0),
    ]
    assert coverage_table.markdown(SETTING, {"2026-01-02", "2026-01-01"}, results, 9) == (
        "`python -m losia_fx.tools.coverage --compiler eager`: 7 of 9 models of transformers 5.0; 2026-01-01 to "
        "2026-01-02, torch 2.13, Python 3.11.7, compiler eager, float64 where the model runs in it, else float32.\n"
        "\n| | |\n|---|---:|\n"
        "| exact, every linear inside a block trained through a subnet | 2 |\n"
        "| exact, some of them left as they are | 1 |\n"
        "| of the exact, those of which only a part was run | 1 |\n"
        "| not exact | 1 |\n| refused | 1 |\n| not built | 1 |\n| no result | 1 |\n"
        "\n| model | | why |\n|---|---|---|\n"
        "| b | exact | 1 x frozen: a \\| b |\n| c | INEXACT | x &lt;y> |\n| d | refused | no |\n"
        "| e | cannot be built | nothing |\n| f | no result | late |\n| g | exact | its h alone |\n"
    )


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Library("no-such", "no_such_module", "architectures")
    monkeypatch.setitem(LIBRARIES, "timm", missing)
    assert coverage.main(["--library", "timm"]) == 2
    assert "no-such cannot be imported (ModuleNotFoundError" in capsys.readouterr().err
    assert check("a", "eager", "float64", "timm").verdict == UNBUILT


def test_verdicts_are_told_apart() -> None:
    text = printed([Result("a", EXACT), Result("b", INEXACT, "x [1]"), Result("c", REFUSED), Result("d", UNBUILT)])
    for verdict in (EXACT, INEXACT, REFUSED, UNBUILT):
        assert verdict in text
    assert "x [1]" in text
    assert "1 exact, 1 INEXACT, 1 refused, 1 cannot be built, 0 no result of 4" in text
    assert coverage.exit_code([Result("a", REFUSED), Result("b", UNBUILT), Result("c", DIED)]) == 0


def test_time_limit() -> None:
    args = argparse.Namespace(compiler="eager", dtype="float32", library="transformers", jobs=1, timeout=0.01)
    (result,) = coverage.run(["llama"], args)
    assert result == Result("llama", DIED, "not done after 0.01 s")


def test_wrong_gradient_is_found() -> None:
    """Subnets' gradients held against those of a model with other weights: none may pass."""
    tiny = build("llama", torch.float64)
    model = losia_fx.transform(copy.deepcopy(tiny.model), rank_factor=0.25, compiler="eager")
    ours, plain = check_architecture._Run(tiny, model), check_architecture._Run(tiny, copy.deepcopy(tiny.model))
    ours.backward()
    plain.backward()
    assert check_architecture.compare(ours, plain, "float64")[0] == []
    name, subnet = next(iter(losia_fx.subnets(model).items()))
    assert subnet.values.grad is not None
    subnet.values.grad[0, 0] += 1e-6
    subnet.weight.grad = torch.zeros_like(subnet.weight)
    faults, worst = check_architecture.compare(ours, plain, "float64")
    assert [fault.startswith(name) for fault in faults] == [True, True]
    assert worst > 1e-9
    for off, passes in ((1e-5, True), (1e-8, False)):  # of torch.compile alone, in the subnet
        alone = check_architecture._Run(tiny, copy.deepcopy(plain.model))
        alone.backward()
        grad = alone.model.get_parameter(name).grad
        assert grad is not None
        grad[subnet.rows[1], subnet.cols[1]] += off
        assert len(check_architecture.compare(ours, plain, "float64", alone)[0]) == 2 - passes
    subnet.values.grad = None
    assert any("no gradient" in fault for fault in check_architecture.compare(ours, plain, "float64")[0])


def test_block_of_experts() -> None:
    dense = torch.randn(3, 8, 6)
    rows, cols = torch.tensor([[0, 5], [1, 2], [6, 7]]), torch.tensor([[0, 1, 2], [3, 4, 5], [1, 3, 5]])
    picked = check_architecture.block(dense, rows, cols)
    assert picked.shape == (3, 2, 3)
    assert picked[1, 0, 2] == dense[1, 1, 5]


def test_unknown_architecture_cannot_be_built() -> None:
    result = check("lama", "eager", "float64")
    assert result.verdict == UNBUILT
    assert "no such model type" in result.why
