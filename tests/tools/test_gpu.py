"""The command for a machine with a GPU: what it runs, what it writes, and what it says where there is none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from losia_fx.tools.gpu import command as gpu
from losia_fx.tools.gpu.command import failures, main, markdown, read_cases

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="4">
<testcase classname="tests.gpu.test_queue" name="test_one[llama]" time="1.254" />
<testcase classname="tests.gpu.test_queue" name="test_two" time="0.5">
<failure message="AssertionError: ['it waits']&#10;assert 1 == 0">long text</failure></testcase>
<testcase classname="tests.gpu.test_gradients" name="test_three" time="0">
<skipped message="about CUDA itself" /></testcase>
<testcase classname="tests.gpu.test_gradients" name="test_four" time="2">
<error message="no memory">text</error></testcase>
</testsuite></testsuites>
"""
SAID = ["test_queue: test_two: AssertionError: ['it waits']", "test_gradients: test_four: no memory"]


class Machine:
    """Stands in for the processes that the command starts."""

    def __init__(self, report: str | None = REPORT, tests: int = 0, bench: int = 0) -> None:
        self.report, self.tests, self.bench = report, tests, bench
        self.commands: list[list[str]] = []

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if "pytest" in command:
            if self.report is not None:
                (path,) = [part.partition("=")[2] for part in command if part.startswith("--junitxml=")]
                Path(path).write_text(self.report)
            return subprocess.CompletedProcess(command, self.tests)
        folder = Path(command[command.index("--out") + 1])
        if not self.bench:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "bench.json").write_text('{"rows": []}')
            (folder / "bench.md").write_text("| method | step ms |\n")
        return subprocess.CompletedProcess(command, self.bench)


def started(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, out: Path, *more: str
) -> tuple[int, dict[str, Any], str]:
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=machine.run))
    code = main(["--device", "cpu", "--out", str(out), *more])
    return code, json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def test_cases_are_read() -> None:
    found = list(read_cases(REPORT))
    assert [case["outcome"] for case in found] == ["passed", "failed", "skipped", "failed"]
    assert found[0] == {
        "file": "test_queue",
        "name": "test_one[llama]",
        "outcome": "passed",
        "seconds": 1.25,
        "said": "",
    }
    assert failures({"tests": {"ended": 1, "cases": found}}) == SAID


def test_both_parts_and_what_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(tests=1)
    code, found, text = started(machine, monkeypatch, tmp_path, "--rounds", "3")
    assert code == 1
    tests, bench = machine.commands
    assert tests[1:5] == ["-m", "pytest", "-m", "gpu"]
    assert bench[2] == "losia_fx.tools.bench"
    assert bench[bench.index("--size") + 1] == "7b"
    assert bench[bench.index("--rounds") + 1] == "3"
    assert found["environment"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert len(found["tests"]["cases"]) == 4
    assert found["bench"]["record"] == {"rows": []}
    assert text.startswith(
        f"## On a GPU: {found['environment']['machine']}\n\n- command: `python -m losia_fx.tools.gpu "
    )
    assert "| test_queue | 1 | 1 | 0 | 2 |" in text
    assert "| all | 1 | 2 | 1 | " in text
    assert all(f"\n- {line}\n" in text for line in SAID)
    assert text.endswith("### The bench\n\n| method | step ms |\n")


def test_parts_may_come_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is in the folder already stays."""
    whole = REPORT.replace("<failure", "<skipped").replace("</failure", "</skipped").replace("<error", "<skipped")
    report = whole.replace("</error", "</skipped")
    code, found, _ = started(Machine(report), monkeypatch, tmp_path, "--only", "tests")
    assert (code, "bench" in found) == (0, False)
    code, found, text = started(Machine(bench=3), monkeypatch, tmp_path, "--only", "bench")
    assert code == 1
    assert len(found["tests"]["cases"]) == 4
    assert "- the bench ended with 3\n" in text
    assert "| all | 1 | 0 | 3 | " in text
    code, found, text = started(Machine(), monkeypatch, tmp_path, "--only", "bench")
    assert code == 0
    assert text.endswith("| method | step ms |\n")


def test_a_pytest_that_never_ran_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, found, text = started(Machine(report=None, tests=4), monkeypatch, tmp_path, "--only", "tests")
    assert code == 1
    assert found["tests"]["cases"] == []
    assert "- pytest ended with 4\n" in text


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no GPU; PYTHON=... bash tools/run.sh gpu takes another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_section_needs_no_bench() -> None:
    found = {"command": "x", "environment": {"machine": "a GPU"}, "tests": {"ended": 0, "seconds": 1.0, "cases": []}}
    assert markdown(found).startswith("## On a GPU: a GPU\n\n- command: `x`\n- machine: a GPU\n\n| tests marked gpu |")


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    options = ["--tests", "tests/gpu/test_queue.py", "--size", "tiny", "--methods", "losia", "--modes", "eager"]
    assert main(["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", *options]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {case["outcome"] for case in found["tests"]["cases"]} == {"passed", "skipped"}
    assert [row["method"] for row in found["bench"]["record"]["rows"]] == ["floor", "losia"]
    assert "| losia | eager |" in (tmp_path / "gpu.md").read_text()
