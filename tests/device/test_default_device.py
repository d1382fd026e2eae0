"""torch.set_default_device changes nothing: what belongs on the CPU says so, all else is where its weight is.

The default device is "meta", on which no value exists: a tensor that followed it would end the run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx import passes
from losia_fx.checkpoint.state import load_state, save_state
from losia_fx.finetune import bitmaps
from tests.architectures.test_experts import MIXTRAL
from tests.support import table
from tests.support.table import LLAMA, TOY, Case
from tests.support.toys import by_string

PERIOD, STEPS = 2, 8  # a round of the largest: the head and two blocks


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def trained(case: Case, folder: Path, **options: Any) -> dict[str, Any]:
    """All that a run over a whole round leaves: weights, losses, state, moves, its delta and a run resumed from it."""
    model, twin, base = (table.build(case) for _ in range(3))
    batches = [table.batch(case) for _ in range(STEPS)]
    options = {"period": PERIOD, "rank_factor": 0.25, "compiler": "aot_eager", "track_delta": True, **options}
    with default_device(options.pop("device", "cpu")):
        losia_fx.transform(model, **options)
        losses = steps(model, batches)
        losia_fx.save_delta(model, folder / "delta.safetensors")
        state = losia_fx.state_dict(model)
        save_state(model, folder / "state.safetensors")
        losia_fx.transform(twin, **{**options, "compiler": "eager"})
        twin.load_state_dict(model.state_dict())
        load_state(twin, folder / "state.safetensors")
        losses += steps(twin, batches[:3])
        losia_fx.load_delta(base, folder / "delta.safetensors")
        assert "subnet" in str(losia_fx.report(model))
        history = [tuple(vars(event).values()) for event in losia_fx.controller(twin).history]
        losia_fx.restore(twin)
    found = {**model.state_dict(), **{f"twin.{name}": value for name, value in twin.state_dict().items()}}
    found |= {f"base.{name}": value for name, value in base.state_dict().items()}
    return {"losses": losses, "history": history, **state, **found}


def steps(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    """Fused: torch's own Adam keeps its counts on the default device otherwise, and then reads them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, fused=True)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].device.type == "cpu", name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (TOY, {}),
        (TOY, {"compiler": "eager", "schedule": "sync", "output_rank_factor": 1.0}),
        (TOY, {"compiler": "eager", "importance": "random"}),
        pytest.param(TOY, {"compiler": "inductor"}, marks=pytest.mark.slow),
        pytest.param(LLAMA, {}, marks=pytest.mark.slow),
        pytest.param(MIXTRAL, {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "-".join(map(str, value.values())) or "plain",
)
def test_a_run_is_the_same_to_the_bit(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = trained(case, tmp_path, **options)
    torch.manual_seed(0)
    torch._dynamo.reset()
    assert_same(trained(case, tmp_path, device="meta", **options), expected)
    assert expected["history"]


def test_by_string_too() -> None:
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, batches = table.build(TOY), [table.batch(TOY) for _ in range(6)]
        with default_device(device):
            compiled = by_string(model, period=PERIOD)
            found.append({"losses": steps(compiled, batches), **model.state_dict()})
    assert_same(found[1], found[0])


def test_bitmaps() -> None:
    rows = torch.tensor([[0, 3, 8], [1, 2, 9]])
    with default_device("meta"):
        assert torch.equal(bitmaps.decode(bitmaps.encode(rows, 10), 10, experts=2), rows)


FOLDERS = [Path(losia_fx.__file__).parent, Path(passes.__file__).parent]
FACTORIES = frozenset(
    """
    arange as_tensor asarray empty empty_strided eye full linspace logspace ones rand randint randn randperm range
    scalar_tensor tensor tril_indices triu_indices zeros
""".split()
)


def is_factory(node: ast.AST) -> bool:
    function = node.func if isinstance(node, ast.Call) else None
    named = isinstance(function, ast.Attribute) and function.attr in FACTORIES
    return named and isinstance(function.value, ast.Name) and function.value.id == "torch"


def test_every_new_tensor_names_its_device() -> None:
    """What torch.set_default_device would move, in all of the library: runs reach only some of it."""
    files = [file for folder in FOLDERS for file in folder.rglob("*.py")]
    calls = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text())) if is_factory(node)]
    assert len(calls) > 20
    silent = [f"{f.name}:{n.lineno}" for f, n in calls if "device" not in {keyword.arg for keyword in n.keywords}]
    assert not silent
