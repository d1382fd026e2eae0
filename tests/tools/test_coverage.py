"""The coverage command: one line an architecture, whatever becomes of its process."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from losia_fx.tools.architectures import build
from losia_fx.tools.check_architecture import EXACT, INEXACT, REFUSED, UNBUILT, Result, check
from rich.console import Console

import losia_fx
from losia_fx.tools import check_architecture, coverage


def printed(results: list[Result]) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        coverage.print_results(console, results)
    return capture.get()


def test_one_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "coverage.json"
    assert coverage.main(["llam[a]", "--compiler", "eager", "--out", str(out)]) == 0
    (result,) = json.loads(out.read_text())
    assert result["architecture"] == "llama"
    assert result["verdict"] == EXACT
    assert result["subnets"] == 15
    assert result["share"] == 1.0
    assert result["error"] < 1e-9
    assert "1 exact, 0 INEXACT" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_unknown_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["llama", "nosuch*"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'nosuch*' matches none of the" in error


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["llama", "--out", str(tmp_path / "no" / "a.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_inexact_is_shown_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def doctored(*_: object) -> Iterator[Result]:
        yield Result("llama", EXACT, model="LlamaForCausalLM", subnets=15, share=1.0, error=0.0)
        yield Result("gpt2", INEXACT, "h.0.weight: off by 0.5", "GPT2LMHeadModel", "float64", 8, 1.0, 0.5)

    monkeypatch.setattr(coverage, "run", doctored)
    assert coverage.main([]) == 1
    assert "1 exact, 1 INEXACT" in capsys.readouterr().out


def test_verdicts_are_told_apart() -> None:
    text = printed([Result("a", EXACT), Result("b", INEXACT, "x [1]"), Result("c", REFUSED), Result("d", UNBUILT)])
    for verdict in (EXACT, INEXACT, REFUSED, UNBUILT):
        assert verdict in text
    assert "x [1]" in text
    assert "1 exact, 1 INEXACT, 1 refused, 1 cannot be built, 0 no result of 4" in text
    assert coverage.exit_code([Result("a", REFUSED), Result("b", UNBUILT), Result("c", coverage.DIED)]) == 0


def test_time_limit() -> None:
    (result,) = coverage.run(["llama"], "eager", "float32", jobs=1, timeout=0.01)
    assert result == Result("llama", coverage.DIED, "not done after 0.01 s")


def test_wrong_gradient_is_found() -> None:
    """Subnets' gradients held against those of a model with other weights: none may pass."""
    tiny = build("llama", torch.float64)
    model = losia_fx.transform(copy.deepcopy(tiny.model), rank_factor=0.25, compiler="eager")
    ours, plain = check_architecture._Run(tiny, model), check_architecture._Run(tiny, copy.deepcopy(tiny.model))
    ours.backward()
    plain.backward()
    assert check_architecture.compare(ours, plain, 1e-9)[0] == []
    name, subnet = next(iter(losia_fx.subnets(model).items()))
    assert subnet.values.grad is not None
    subnet.values.grad[0, 0] += 1e-6
    subnet.weight.grad = torch.zeros_like(subnet.weight)
    faults, worst = check_architecture.compare(ours, plain, 1e-9)
    assert [fault.startswith(name) for fault in faults] == [True, True]
    assert worst > 1e-9
    subnet.values.grad = None
    assert any("no gradient" in fault for fault in check_architecture.compare(ours, plain, 1e-9)[0])


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
