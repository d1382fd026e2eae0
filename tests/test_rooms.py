"""The rooms of the house: who may import whom, as pyproject.toml says it and import-linter reads it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import losia_fx

ROOT = Path(__file__).parent.parent
SOURCES = [file for folder in ("losia_fx", "passes", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]
LINES, FUNCTION_LINES = 350, 50


def test_imports_go_down_and_never_round(tmp_path: Path) -> None:
    pytest.importorskip("importlinter")
    shutil.copytree(ROOT / "losia_fx", tmp_path / "losia_fx", ignore=shutil.ignore_patterns("assets", "*.pyi"))
    for folder in ("passes", "tools"):  # where a wheel has them: the linter looks for a package's folders within it
        shutil.copytree(ROOT / folder, tmp_path / "losia_fx" / folder)
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_public_name_hides_a_module() -> None:
    modules = {path.stem for path in (ROOT / "losia_fx").iterdir()}
    assert not modules & set(losia_fx.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_at_a_sitting_and_a_function_fits_a_screen(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name}: a function of many lines"
