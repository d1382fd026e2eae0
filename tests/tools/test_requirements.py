"""tools/run.sh and what it asks tools/requirements.py: which torch is taken, and what is installed beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losia_fx.tools.requirements import Requirement, main, met, pins, release, requirements

ROOT = Path(__file__).parent.parent.parent

PYPROJECT = """
[project]
dependencies = ["torch>=2.11,<3", "numpy>=1.26"]
[project.optional-dependencies]
cli = ["transformers>=5.17,<6"]
tests = ["losia-fx[cli,tools]", "pytest>=8"]
tools = ["onnx>=1.19"]
"""


@pytest.fixture
def pyproject(tmp_path: Path) -> Path:
    file = tmp_path / "pyproject.toml"
    file.write_text(PYPROJECT)
    return file


def test_requirements_of_extras_and_of_the_extras_that_they_name(pyproject: Path) -> None:
    assert [str(found) for found in requirements(pyproject=pyproject)] == ["torch>=2.11,<3", "numpy>=1.26"]
    assert [found.name for found in requirements(["tests"], pyproject)] == [
        "torch", "numpy", "pytest", "transformers", "onnx",
    ]  # fmt: skip
    with pytest.raises(KeyError, match="models"):
        requirements(["models"], pyproject)


@pytest.mark.parametrize("written", ["numpy", "numpy==1.26", "numpy>=1.26; python_version<'3.12'", "numpy>=1.26,!=2"])
def test_a_requirement_of_another_form_is_refused(pyproject: Path, written: str) -> None:
    pyproject.write_text(PYPROJECT.replace("numpy>=1.26", written))
    with pytest.raises(ValueError, match="numpy"):
        requirements(pyproject=pyproject)


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("2.10.9", False), ("2.11", True), ("2.11.0", True), ("2.11.0+cu130", True), ("2.13.0a0+git1", True),
        ("2.99", True), ("3", False), ("3.0.0", False), ("3.1", False), ("10.0", False),
    ],
)  # fmt: skip
def test_which_versions_a_range_takes(version: str, taken: bool) -> None:
    assert Requirement("torch", "2.11", "3").takes(version) == taken


def test_a_range_without_an_end_takes_all_that_is_newer() -> None:
    assert Requirement("numpy", "1.26").takes("99")
    assert not Requirement("numpy", "1.26").takes("1.9")


def test_a_release_is_the_same_with_and_without_zeros() -> None:
    assert release("2.11") == release("2.11.0") == (2, 11)
    assert release("10.0.1rc2") == (10, 0, 1)
    assert release("0.0") == (0,)
    with pytest.raises(ValueError, match="newest"):
        release("newest")


def test_what_this_python_has() -> None:
    newest = Requirement("torch", torch.__version__.partition("+")[0])
    assert met(newest)
    assert not met(Requirement("torch", "0", newest.lowest))
    assert not met(Requirement("losia-fx-no-such-thing", "0"))
    assert main(["torch"]) == main(["met", "tests"]) == 0


def test_pins_of_the_lowest_torch_bring_the_lowest_of_the_rest() -> None:
    """And of no other: there the newest is what a user gets."""
    torch_, *others = requirements(["cli"])
    assert pins("2.14.1") == ["torch==2.14.1"]
    assert pins(f"{torch_.lowest}.0") == [
        f"torch=={torch_.lowest}.0",
        *(f"{other.name}=={other.lowest}" for other in others),
    ]
    assert any(pin.startswith("transformers==") for pin in pins(torch_.lowest))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", "tools/run.sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


STUB = """#!/usr/bin/env bash
# A python that has what HAS says, and notes down what it is called with.
echo "$(basename "$(dirname "$(dirname "$0")")") $*" >>"$NOTES"
case "$*" in
  "tools/requirements.py met"*) [ "$HAS" = all ] ;;
  "tools/requirements.py torch") [ "$HAS" != nothing ] ;;
  "tools/requirements.py pins"*) echo "pins of $3" ;;
  "-m venv "*) mkdir -p "$3/bin" "$3/site" && cp "$0" "$3/bin/python" ;;
  *getsitepackages*) echo /its/site-packages ;;
  *sysconfig*) echo .venv/site ;;
esac
"""


def calls(folder: Path, has: str, *arguments: str) -> list[str]:
    """What a copy of tools/run.sh in ``folder`` does with pythons, "python" being the one that it starts from."""
    for made in ("tools", "python/bin"):
        (folder / made).mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / "tools/run.sh", folder / "tools")
    shutil.copy2(ROOT / "pyproject.toml", folder)
    python, notes = folder / "python/bin/python", folder / "notes"
    python.write_text(STUB)
    python.chmod(0o755)
    notes.write_text("")
    environment = {**os.environ, "PYTHON": str(python), "HAS": has, "NOTES": str(notes)}
    subprocess.run(["bash", str(folder / "tools/run.sh"), *arguments], env=environment, check=True, timeout=60)
    return [line for line in notes.read_text().splitlines() if "requirements.py" not in line and " -c " not in line]


def test_run_on_a_fresh_machine(tmp_path: Path) -> None:
    """And a second time, when nothing is left to install."""
    runs = [".venv -m losia_fx.cli finetune --steps 3"]
    assert calls(tmp_path, "nothing", "finetune", "--steps", "3") == [
        "python -m venv .venv",
        ".venv -m pip install --quiet torch==2.13.0",
        ".venv -m pip install --quiet --editable .[cli]",
        *runs,
    ]
    assert calls(tmp_path, "nothing", "finetune", "--steps", "3") == runs


def test_run_keeps_a_torch_that_is_there(tmp_path: Path) -> None:
    assert calls(tmp_path, "torch", "test", "-m", "slow") == [
        "python -m venv .venv",
        ".venv -m pip install --quiet --editable .[dev]",
        ".venv -m ruff check .",
        ".venv -m ruff format --check .",
        ".venv -m mypy",
        ".venv -m pytest -n 2 --dist worksteal -m slow",
    ]
    assert (tmp_path / ".venv/site/base.pth").read_text() == "/its/site-packages\n"


def test_run_installs_nothing_where_everything_is_there(tmp_path: Path) -> None:
    """A GPU machine without a network."""
    assert calls(tmp_path, "all", "finetune") == ["python -m losia_fx.cli finetune"]
    assert not (tmp_path / ".venv").exists()


def test_run_tests_another_torch_in_an_environment_of_its_own(tmp_path: Path) -> None:
    options = ("test", "--torch", "2.14.1", "--extra", "models", "-q", "tests/architectures")
    install = "-m pip install --quiet --constraint .venv-torch-2.14.1/pins.txt --editable .[tests,models]"
    test = ".venv-torch-2.14.1 -m pytest -n 2 --dist worksteal -q tests/architectures"
    assert calls(tmp_path, "all", *options) == [
        "python -m venv .venv-torch-2.14.1",
        f".venv-torch-2.14.1 {install}",
        test,
    ]
    assert (tmp_path / ".venv-torch-2.14.1/pins.txt").read_text() == "pins of 2.14.1\n"
    assert calls(tmp_path, "all", *options) == [test]


@pytest.mark.parametrize("version", ["2.10.0", "3.0", "newest"])
def test_run_refuses_a_torch_by_its_name_and_makes_nothing(version: str) -> None:
    done = run("test", "--torch", version)
    assert done.returncode == 2
    assert version in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (ROOT / f".venv-torch-{version}").exists()


def test_run_refuses_an_extra_without_a_torch() -> None:
    done = run("test", "--extra", "models")
    assert done.returncode == 2
    assert "--torch" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("tset",), ("--help",)])
def test_run_says_what_it_does(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Everything")
    assert done.stderr.count("tools/run.sh") == 4
    assert "set -euo" not in done.stderr
