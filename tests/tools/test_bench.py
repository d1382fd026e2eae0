"""The bench: what its numbers are made of, and that it says what it could not measure. No timings are asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import losia_fx
from losia_fx._compat import compile_call, inner_compiler, install_call
from losia_fx.errors import ConfigError
from losia_fx.runtime.quantised_weight import QuantisedWeight
from losia_fx.runtime.same import strays
from losia_fx.tools.bench import __main__ as command
from losia_fx.tools.bench import apart, host, starts
from losia_fx.tools.bench.__main__ import main
from losia_fx.tools.bench.adapters import equal_rank
from losia_fx.tools.bench.catalogue import METHODS
from losia_fx.tools.bench.clock import StepTime
from losia_fx.tools.bench.graphs import GraphCounts
from losia_fx.tools.bench.grow import AXES, sized
from losia_fx.tools.bench.losia_methods import count_trained
from losia_fx.tools.bench.memory import allocated_peak, measure_memory
from losia_fx.tools.bench.methods import COMPILED, EAGER, Method, Trial, chosen
from losia_fx.tools.bench.plain_pro import ProLinear
from losia_fx.tools.bench.record import Row, set_ratios
from losia_fx.tools.bench.rounds import entries_of, run
from losia_fx.tools.bench.schedule import over_rounds, reselection_ms
from losia_fx.tools.bench.sizes import SIZES, Setup, check_device
from losia_fx.tools.bench.table import COLUMNS
from losia_fx.tools.forecast import slots

CPU = torch.device("cpu")
TINY = replace(SIZES["tiny"], layers=1, dtype="float32", rounds=2)
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture
def setup() -> Setup:
    return Setup.of(TINY, CPU)


def built(setup: Setup, name: str, mode: str = EAGER) -> Trial:
    return BY_NAME[name].build(setup, mode)


def silent(_: str) -> None: ...


# -- what is compared -------------------------------------------------------------------------------------------------


def test_models_share_weights_and_nothing_else(setup: Setup) -> None:
    first, second = setup.model(), setup.model()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is not other
        assert one.data_ptr() == other.data_ptr()
    first.lm_head.weight.requires_grad_(True)
    first.lm_head.register_forward_hook(lambda *_: None)
    assert not second.lm_head.weight.requires_grad
    assert not second.lm_head._forward_hooks


@pytest.mark.parametrize(
    "name",
    ["losia", "losia, a block profiled", "losia int8", "losia int8, instead", "losia, checkpointed", "losia by string"],
)
def test_what_another_method_wrote_is_not_looked_into_on_the_clock(setup: Setup, name: str) -> None:
    trial, other = built(setup, name), built(setup, "losia")
    trial.step()
    other.step()
    controller = losia_fx.controller(trial.model)
    assert controller.agreement.differing(), "nothing was written"
    trial.prepare()
    assert controller.agreement.differing() == []
    assert not controller.agreement.shows_a_write()
    assert strays(controller.states) == []
    packed = [state for state in controller.states if state.packed is not None]
    assert all(state.stored is not None or (state.packed and state.packed.is_of(state.weight)) for state in packed)


def test_size_counts_its_parameters() -> None:
    for size in (TINY, replace(TINY, layers=3, heads=4, kv_heads=2)):
        assert sum(p.numel() for p in Setup.of(size, CPU).base.parameters()) == size.parameters


def test_losia_methods_train_the_same_number_of_parameters(setup: Setup) -> None:
    wanted = count_trained(setup)
    names = ["losia", "losia, a block profiled", "losia, checkpointed", "losia-pro, plain"]
    assert [sum(p.numel() for p in built(setup, name).trained) for name in names] == [wanted] * len(names)
    by_string = built(setup, "losia by string")
    by_string.step()
    assert sum(p.numel() for p in by_string.trained) == wanted


def test_equal_rank_is_the_nearest(setup: Setup) -> None:
    pytest.importorskip("peft")
    wanted = count_trained(setup)
    rank = equal_rank(setup)
    trained = sum(p.numel() for p in built(setup, "lora r=equal").trained)
    assert trained % rank == 0
    assert abs(trained - wanted) <= trained // rank / 2
    assert sum(p.numel() for p in built(setup, "shira").trained) == trained


def test_adapters_with_and_without_casts() -> None:
    pytest.importorskip("peft")
    setup = Setup.of(replace(TINY, dtype="bfloat16"), CPU)
    assert {p.dtype for p in built(setup, "lora r=16").trained} == {torch.float32}
    assert {p.dtype for p in built(setup, "lora r=16, no casts").trained} == {torch.bfloat16}


# -- the floor --------------------------------------------------------------------------------------------------------


def first_grads(setup: Setup) -> dict[str, Tensor]:
    """Plain autograd's gradients at the outputs of layer 0's q, k and v."""
    model = setup.model()
    attention = model.model.layers[0].self_attn
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _: Any, y: Tensor) -> Tensor:
            y = y.detach().requires_grad_(True)
            y.register_hook(lambda grad: found.__setitem__(name, grad))
            return y

        return hook

    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(keep(name))
    model(**setup.batch).loss.backward()
    return found


@pytest.fixture
def drained() -> Iterator[list[Tensor]]:
    """The gradients that end in the floor's op, compiled or not."""
    found: list[Tensor] = []

    def drain(grad: Tensor) -> Tensor:
        found.append(grad.clone())
        return grad.new_zeros(())

    with torch.library._scoped_library("losia_bench", "IMPL") as library:
        library.impl("drain", drain, "CPU")
        yield found


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (EAGER, "floor"),
        (EAGER, "floor, checkpointed"),
        pytest.param(COMPILED, "floor", marks=pytest.mark.slow),
        pytest.param(COMPILED, "floor, checkpointed", marks=pytest.mark.slow),
    ],
)
def test_floor_makes_the_gradients_of_the_first_linears(
    setup: Setup, name: str, mode: str, drained: list[Tensor]
) -> None:
    trial = built(setup, name, mode)
    loss = trial.forward()
    trial.backward(loss)
    torch.testing.assert_close(loss, setup.base(**setup.batch).loss)
    wanted = list(first_grads(setup).values())
    assert len(drained) == len(wanted) == 3
    for grad in wanted:
        assert grad.any()
        assert any(torch.allclose(found, grad, rtol=1e-4, atol=1e-8) for found in drained)


@pytest.mark.parametrize("name", ["floor", "floor, checkpointed"])
def test_floor_makes_no_gradient_below(setup: Setup, name: str) -> None:
    """One product less a linear of layer 0's q, k and v than the plain floor; no weight has a gradient."""
    products = {}
    for each in (name, "floor, plain"):
        trial = built(setup, each)
        loss = trial.forward()
        with FlopCounterMode(display=False) as counter:
            trial.backward(loss)
        products[each] = counter.get_total_flops()
        assert all(p.grad is None for n, p in trial.model.named_parameters() if not n.endswith(".source"))
    if name == "floor":
        linear = 2 * TINY.tokens * TINY.hidden * TINY.hidden
        assert products["floor, plain"] - products["floor"] == 3 * linear


# -- clock, ratios, memory --------------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round(setup: Setup) -> None:
    """A machine that slows down over the rounds changes no ratio."""
    entries = entries_of(setup.size, chosen(METHODS, ["losia-pro, plain"]), [EAGER])
    pace = {"floor": 10.0, "losia-pro, plain": 12.0}
    taken: list[str] = []

    def clock(trial: Trial) -> StepTime:
        entry = next(entry for entry in entries if entry.trial is trial)
        taken.append(entry.row.method)
        slower = 1 + (len(taken) - 1) // len(entries)
        return StepTime(0.0, pace[entry.row.method] * slower, 0.0)

    run(setup, entries, clock, silent)
    assert taken == ["floor", "losia-pro, plain"] * TINY.rounds
    floor, pro = (entry.row for entry in entries)
    assert [step.step_ms for step in pro.steps] == [12.0, 24.0]
    assert pro.ratios == [1.2, 1.2]
    assert floor.ratios == [1.0, 1.0]
    assert (pro.step.median, pro.step.least, pro.step.most) == (18.0, 12.0, 24.0)


def test_ratio_is_to_the_floor_of_its_own_mode() -> None:
    rows = [
        Row("floor", EAGER, "floor", "", steps=[StepTime(1, 1, 0)]),
        Row("floor", COMPILED, "floor", "", steps=[StepTime(1, 0, 0)]),
        Row("x", EAGER, "floor", "", steps=[StepTime(1, 1, 2)]),
        Row("x", COMPILED, "floor", "", steps=[StepTime(1, 1, 1)]),
        Row("y", COMPILED, "another", "", steps=[StepTime(1, 1, 1)]),
    ]
    set_ratios(rows)
    assert [row.ratios for row in rows] == [[1.0], [1.0], [2.0], [3.0], []]


def test_peak_of_a_known_pattern() -> None:
    old = [torch.empty(8192, dtype=torch.uint8)]

    def pattern() -> None:
        first = torch.empty(1024, dtype=torch.uint8)
        second = torch.empty(2048, dtype=torch.uint8)
        del first
        old.clear()  # from before: does not count
        third = torch.empty(4096, dtype=torch.uint8)
        del second, third
        torch.empty(5120, dtype=torch.uint8)

    assert allocated_peak(pattern) == 2048 + 4096


def test_memory_of_full_fine_tuning(setup: Setup) -> None:
    """Weights, and two moments and a step count of each; gradients of all of them at once are in the peak."""
    trial = built(setup, "full")
    trial.step()
    memory = measure_memory(trial)
    weights = 4 * TINY.parameters
    count = len(trial.trained)
    assert memory.optimizer == 2 * weights + 4 * count
    buffers = sum(b.nbytes for b in trial.model.buffers())
    assert memory.held == 3 * weights + 4 * count + buffers
    assert memory.peak >= memory.held + weights
    assert memory.saved > 0
    assert all(p.grad is None for p in trial.trained)


def test_a_profiled_block_holds_its_importance(setup: Setup) -> None:
    idle, profiled = built(setup, "losia"), built(setup, "losia, a block profiled")
    for trial in (idle, profiled):
        trial.step()
        trial.step()
    block = 4 * sum(
        linear.weight.numel() for linear in profiled.model.model.layers[0].modules() if isinstance(linear, nn.Linear)
    )
    assert measure_memory(profiled).held - measure_memory(idle).held == 2 * block


def test_copies_in_8_bits_are_held_and_not_saved(setup: Setup) -> None:
    plain, packed = built(setup, "losia"), built(setup, "losia int8")
    for trial in (plain, packed):
        trial.step()
    weights = [state.weight for state in losia_fx.controller(packed.model).states if state.packed is not None]
    assert len(weights) == 7
    plain_memory, memory = measure_memory(plain), measure_memory(packed)
    assert memory.held - plain_memory.held == sum(weight.numel() + 4 * weight.shape[0] for weight in weights)
    assert memory.saved - plain_memory.saved < min(weight.numel() for weight in weights)


def test_8_bits_instead_of_weights_take_their_place_in_one_model_alone(setup: Setup) -> None:
    plain, instead = built(setup, "losia"), built(setup, "losia int8, instead")
    for trial in (plain, instead):
        trial.step()
    weights = [weight for state in losia_fx.controller(instead.model).states if (weight := state.stored) is not None]
    assert len(weights) == 7
    assert not any(isinstance(weight, QuantisedWeight) for weight in setup.base.parameters())
    packed = sum(weight.numel() + 4 * weight.shape[0] for weight in weights)
    dense = sum(weight.numel() * weight.itemsize for weight in weights)
    plain_memory, memory = measure_memory(plain), measure_memory(instead)
    assert memory.held - plain_memory.held == packed - dense
    assert memory.saved - plain_memory.saved < min(weight.numel() for weight in weights)


def test_saved_bytes_of_losia_are_fewer(setup: Setup) -> None:
    saved = {}
    for name in ("losia", "full"):
        trial = built(setup, name)
        trial.step()
        saved[name] = measure_memory(trial).saved
    assert saved["losia"] < saved["full"]


# -- losia ------------------------------------------------------------------------------------------------------------


def test_losia_stays_as_it_is_put(setup: Setup) -> None:
    idle, profiled = built(setup, "losia"), built(setup, "losia, a block profiled")
    for _ in range(3):
        idle.prepare()
        assert all(state.profile is None for state in losia_fx.controller(idle.model).states)
        profiled.prepare()
        assert {s.group for s in losia_fx.controller(profiled.model).states if s.profile is not None} == {1}
        for trial in (idle, profiled):
            trial.backward(trial.forward())
            trial.optimize()
    gathered = [state.profile for state in losia_fx.controller(profiled.model).members(1)]
    assert all(profile is not None and profile.importance is not None for profile in gathered)
    assert losia_fx.controller(idle.model).history == losia_fx.controller(profiled.model).history == []


def test_slots_are_opened_by_group(setup: Setup) -> None:
    model = losia_fx.transform(setup.model(), compiler="eager", period=7)
    controller = losia_fx.controller(model)
    slots.open_slot(controller, 1)
    assert (controller.step, controller.active) == (7, 1)
    slots.rest(controller)
    assert all(state.profile is None for state in controller.states)


def test_reselection_is_measured_where_it_happens(setup: Setup) -> None:
    """By a clock that says how many re-selections a step made."""
    seen: list[int] = []

    def clock(trial: Trial) -> StepTime:
        history = losia_fx.controller(trial.model).history
        before = len(history)
        trial.step()
        seen.extend(event.group for event in history[before:])
        return StepTime(0.0, 0.0, float(len(history) - before))

    assert reselection_ms(setup, EAGER, clock) == {"a block's group": 1.0, "the head": 1.0}
    assert seen == [1, 1, 1, 0, 0, 0]


def test_two_rounds_are_one_graph(setup: Setup) -> None:
    found = over_rounds(setup, "losia", EAGER)
    assert (found.steps, found.moves) == (8, 4)
    assert found.graphs == GraphCounts(graphs=1, breaks=0, recompilations=0)


def test_recompilation_is_counted() -> None:
    counts = GraphCounts()
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with counts.watching(warm=False):
        function(torch.ones(2))
    with counts.watching(warm=True):
        function(torch.ones(3))
    assert counts == GraphCounts(graphs=2, breaks=0, recompilations=1)


def test_graphs_of_methods_stand_apart(setup: Setup) -> None:
    """As many models of one class as Dynamo's limit of graphs for a function, and more: each has its one graph."""
    limit = 2
    trials = [built(setup, "losia-pro, plain") for _ in range(limit + 1)]
    for trial in trials:
        install_call(trial.model, compile_call(trial.model, inner_compiler("eager"), limit))
    counts = GraphCounts()
    for warm in (False, True):
        with counts.watching(warm):
            for trial in trials:
                trial.step()
    assert counts == GraphCounts(graphs=limit + 1, breaks=0, recompilations=0)


def test_plain_pro_has_the_block_of_the_full_gradient(setup: Setup) -> None:
    trial, full = built(setup, "losia-pro, plain"), built(setup, "full")
    for each in (trial, full):
        each.backward(each.forward())
    dense = dict(full.model.named_parameters())
    linears = {name: module for name, module in trial.model.named_modules() if isinstance(module, ProLinear)}
    assert len(linears) == 8
    for name, linear in linears.items():
        grad = dense[f"{name}.weight"].grad
        assert grad is not None
        wanted = grad[linear.rows] if linear.cols is None else grad[linear.rows][:, linear.cols]
        torch.testing.assert_close(linear.values.grad, wanted)
        assert linear.weight.grad is None
        before = linear.weight.detach().clone()
        with torch.no_grad():
            linear.values += 1
        linear.write_back()
        assert int((linear.weight != before).sum()) == linear.values.numel()
    trial.optimizer = None
    with torch.no_grad():
        for linear in linears.values():
            linear.values -= 1
            linear.write_back()


# -- the command ------------------------------------------------------------------------------------------------------


def test_missing_package_is_skipped_by_name(setup: Setup) -> None:
    absent = Method("absent", lambda *_: pytest.fail("built"), needs="no_such_package")
    entries = entries_of(setup.size, [BY_NAME["floor"], absent], [EAGER])
    run(setup, entries, lambda _: StepTime(1, 1, 1), silent)
    assert entries[1].row.skipped == "package no_such_package is not installed: pip install no-such-package"
    assert entries[1].row.steps == []
    assert entries[0].row.steps


def test_method_that_fails_is_skipped_with_its_reason(setup: Setup) -> None:
    def fail(*_: object) -> Trial:
        raise RuntimeError("mat1 and mat2\ndo not fit")

    entries = entries_of(setup.size, [Method("broken", fail)], [EAGER])
    run(setup, entries, lambda _: StepTime(1, 1, 1), silent)
    assert entries[0].row.skipped == "RuntimeError: mat1 and mat2 do not fit"


def test_patterns_choose_methods_and_their_floors() -> None:
    assert [m.name for m in chosen(METHODS, ["losia, check*"])] == ["floor, checkpointed", "losia, checkpointed"]
    assert [m.name for m in chosen(METHODS, ["full", "losia"])] == ["floor", "losia", "full"]
    assert len(chosen(METHODS, ["*"])) == len(METHODS)


def test_axes_keep_the_model_whole() -> None:
    for axis, values in AXES.items():
        for value in values:
            size = sized(SIZES["small"], axis, value)
            assert size.hidden % size.heads == 0
            assert size.heads % size.kv_heads == 0
            changed = {n for n, v in vars(size).items() if v != vars(SIZES["small"])[n]}
            assert changed <= {axis, *(("hidden", "intermediate", "heads", "kv_heads") if axis == "width" else ())}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "0"], "--layers 0: give a whole number of at least 1"),
        (["--rank-factor", "1.5"], "--rank-factor 1.5: give a number in (0, 1]"),
        (["--methods", "lorra"], "--methods 'lorra': matches none of 'floor'"),
        (["--size", "7b", "--device", "cpu"], "--size 7b: needs a CUDA device"),
        (
            ["--grow", "layers", "--size", "tiny"],
            "measures losia on a base of its own; leave out --size",
        ),
        (["--grow", "layers", "--warm-start"], "leave out --warm-start"),
        (["--host", "--size", "tiny"], "--host: measures a model of its own; leave out --size"),
        (["--host", "--rounds", "0"], "--rounds 0: give a whole number of at least 1"),
        (["--out", __file__], "is a file; give a folder"),
    ],
)
def test_wrong_use(options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*([] if "--out" in options else ["--out", str(tmp_path / "no")]), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "no").exists()


def test_no_cuda_and_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda: torch sees no CUDA device"):
        check_device(TINY, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"--size tiny: takes \d+ GiB at least and cpu has \d+; give fewer --layers"):
        check_device(replace(TINY, layers=10**9), CPU)


def test_unknown_choice_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--size", "huge"])
    assert end.value.code == 2
    assert "--size" in capsys.readouterr().err


@pytest.fixture
def one_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """The imports are timed once, which takes a third of the time."""
    monkeypatch.setattr(starts, "PROCESSES", 1)


COMMAND = ["--size", "tiny", "--layers", "1", "--rounds", "2", "--device", "cpu"]


@pytest.mark.usefixtures("one_import")
def test_run_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--methods", "losia, a block profiled", "losia-pro*", "--modes", "eager", "--out", str(out)]
    assert main([*COMMAND, *options]) == 0
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.md", "bench.png"}
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    methods = ["floor", "losia, a block profiled", "losia-pro, plain"]

    found = json.loads((out / "bench.json").read_text())
    assert [(row["method"], row["mode"]) for row in found["rows"]] == [(name, EAGER) for name in methods]
    assert all(len(row["steps"]) == len(row["ratios"]) == 2 for row in found["rows"])
    assert found["size"]["layers"] == 1
    assert found["environment"]["torch"] == torch.__version__
    assert set(found["reselection_ms"]) == {"a block's group", "the head", "a 4096 x 11008 weight by itself"}
    assert set(found["import_s"]) == {"torch", "losia_fx, after torch"}

    text = (out / "bench.md").read_text()
    assert text.startswith("- command: `python -m losia_fx.tools.bench --size tiny --layers 1")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == f"| {' | '.join(name for name, _ in COLUMNS)} |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == methods
    printed = capsys.readouterr()
    assert "round 2 of 2: floor (eager)" in printed.err
    assert all(name in printed.out for name in methods)


def test_rounds_outlive_whatever_ends_what_comes_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_follow_schedule", interrupted)
    assert main([*COMMAND, "--methods", "losia", "--modes", "eager", "--out", str(tmp_path)]) == 130
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["method"], len(row["ratios"])) for row in rows] == [("floor", 2), ("losia", 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}


@pytest.mark.slow
@pytest.mark.usefixtures("one_import")
def test_each_method_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = ["--apart", "--methods", "losia-pro*", "--modes", "eager", "--out", str(tmp_path)]
    assert main([*COMMAND, *options]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["floor", "losia-pro, plain"]
    assert all(len(row["ratios"]) == 2 and row["memory"]["peak"] for row in rows)


def test_process_that_dies_costs_its_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "CODE", "import sys; sys.exit('out of memory')")
    methods = chosen(METHODS, ["full"])
    rows = apart.run_apart(TINY, CPU, methods, entries_of(TINY, methods, [EAGER]), silent)
    assert [row.method for row in rows] == ["floor", "full"]
    assert all(row.skipped == "its process ended with 1: out of memory" for row in rows)


@pytest.mark.slow
def test_growth_along_an_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AXES, "rank_factor", (1 / 16, 1 / 4))
    options = ["--grow", "rank_factor", "--modes", "eager", "--layers", "1", "--length", "16", "--rounds", "1"]
    assert main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"grow.json", "grow.md", "grow.png"}
    points = json.loads((tmp_path / "grow.json").read_text())["points"]["rank_factor"]
    assert [point["rank_factor"] for point in points] == list(AXES["rank_factor"])
    trained = [point["rows"][1]["trained"] for point in points]
    assert trained == sorted(set(trained))
    lines = (tmp_path / "grow.md").read_text().splitlines()
    assert sum(line.startswith("| rank_factor |") for line in lines) == 3 * len(points)


def test_host_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(host, "WEIGHTS", 3)
    threads = torch.get_num_threads()
    assert main(["--host", "--rounds", "3", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "host.json").read_text())
    printed = capsys.readouterr().out
    assert found["repeats"] == 3
    assert [each["what"] for each in found["times"]] == [
        "no_grad forward of the plain model",
        "no_grad forward of the transformed model",
        "step of an optimizer that does nothing",
        "another's optimizer, no transformed model",
        "another's optimizer beside a transformed model",
        "resolve() of a weight without a subnet",
    ]
    for each in found["times"]:
        assert 0 < each["least_us"] <= each["median_us"]
        assert each["what"] in printed
    assert torch.get_num_threads() == threads


def test_new_cache_is_empty_and_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "the user's")
    with starts.new_cache():
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert list(folder.iterdir()) == []
    assert not folder.exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "the user's"


def test_library_imports_none_of_the_tools_packages() -> None:
    """Nor does an eager step. networkx is not among them: torch._dynamo brings it."""
    code = """
import sys, torch, losia_fx
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3)))
losia_fx.transform(model, compiler="eager")
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
model(torch.ones(2, 8)).sum().backward()
optimizer.step()
print([name for name in sys.argv[1:] if name in sys.modules])
"""
    heavy = ["transformers", "accelerate", "peft", "tokenizers", "matplotlib", "onnx", "onnxscript", "rich"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_compiled_losia_and_floor(tmp_path: Path) -> None:
    options = ["--methods", "losia", "--warm-start", "--out", str(tmp_path)]
    assert main([*COMMAND, *options]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    compiled = {row["method"]: row for row in found["rows"] if row["mode"] == COMPILED}
    assert set(compiled) == {"floor", "losia"}
    for row in compiled.values():
        assert row["graphs"] == {"graphs": 1, "breaks": 0, "recompilations": 0}
    (rounds,) = found["rounds_of_schedule"]
    assert rounds["graphs"] == {"graphs": 1, "breaks": 0, "recompilations": 0}
    assert rounds["moves"] == 4
    assert len(found["warm_start_s"]) == 2
