"""Whole training runs follow an eager LoSiA of the tests' own (tests/reference.py), step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import losia_fx
from losia_fx.method.subnet import gather
from tests.support import table
from tests.support.reference import Reference
from tests.support.table import BERT, GPT_NEOX, LLAMA, TOY, Case

PERIOD = 3
slow = pytest.mark.slow
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def adamw(parameters: list[nn.Parameter], lr: float = 3e-3) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, **ADAMW)


def fused(parameters: list[nn.Parameter], lr: float = 3e-3) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True, **ADAMW)


def momentum(parameters: list[nn.Parameter], lr: float = 0.1) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)


RATES: dict[Callable[..., Optimizer], float] = {adamw: 3e-3, fused: 3e-3, momentum: 0.1}


@dataclass
class Run:
    """One model through losia_fx and its copy through the reference, on the same batches."""

    case: Case
    make: Callable[..., Optimizer] = adamw
    string: bool = False
    compiler: str = "aot_eager"
    dtype: torch.dtype = torch.float32
    frozen: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    """Pieces of names: frozen by the user (the string way), trained in full (transform)."""
    clip_norm: float | None = None
    clip_value: float | None = None
    decay: float = 1.0
    """Of the learning rate, a step."""
    set_to_none: bool = True
    tolerance: float = 1e-4
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": PERIOD, **self.options}
        self.inner = table.build(self.case, self.dtype)
        plain = copy.deepcopy(self.inner)
        options = {**self.options, "compiler": self.compiler}
        if self.string:
            self.begin_string(options)
        else:
            self.model = losia_fx.transform(self.inner, trainable=[f"*{piece}*" for piece in self.full], **options)
            self.optimizer = self.make([p for p in self.model.parameters() if p.requires_grad])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: self.decay**step)
        self.subnets = losia_fx.subnets(self.model)
        names = [name for name, _ in plain.named_parameters() if name not in self.subnets]
        self.learns_in_full = {name for name in names if self.in_full(name)}
        self.reference = Reference(
            plain,
            {name: (subnet.rows, subnet.cols) for name, subnet in self.subnets.items()},
            losia_fx.controller(self.model).groups,
            self.make,
            lambda steps: RATES[self.make] * self.decay**steps,
            full=self.learns_in_full,
            **{k: value for k, value in self.options.items() if not k.endswith(("rank_factor", "tied_head"))},
        )

    def begin_string(self, options: dict[str, Any]) -> None:
        """torch.compile(backend="losia"), as a user has it: the optimizer first, on the dense weights."""
        for name, parameter in self.inner.named_parameters():
            parameter.requires_grad_(not any(piece in name for piece in self.frozen))
        self.model = torch.compile(self.inner, backend="losia", options=options)
        self.optimizer = self.make([p for p in self.model.parameters() if p.requires_grad])
        self.model(**table.batch(self.case, self.dtype))  # the subnets are made now

    def in_full(self, name: str) -> bool:
        if self.string:
            return not any(piece in name for piece in self.frozen)
        return any(piece in name for piece in self.full)

    def step(self, shapes: Sequence[tuple[int, int]] = ((2, 8), (2, 8))) -> None:
        """One optimizer step, a micro-batch of each shape."""
        for size, length in shapes:
            batch = table.batch(self.case, self.dtype, size, length)
            loss, expected = self.model(**batch).loss, self.reference.model(**batch).loss
            torch.testing.assert_close(loss, expected, rtol=self.tolerance, atol=0)
            (loss / len(shapes)).backward()
            (expected / len(shapes)).backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.model.parameters(), self.clip_value)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        self.reference.step(self.clip_norm, self.clip_value)
        self.compare()

    def compare(self) -> None:
        step = self.reference.steps
        assert losia_fx.controller(self.model).step == step
        for name, weight in self.reference.weights.items():
            assert torch.equal(self.subnets[name].rows, weight.rows), f"rows of {name} after step {step}"
            assert torch.equal(self.subnets[name].cols, weight.cols), f"cols of {name} after step {step}"
        state, expected = self.inner.state_dict(), self.reference.model.state_dict()
        assert list(state) == list(expected)
        for name, value in expected.items():
            near(state[name], value, self.tolerance, f"{name} after step {step}")
        for name, subnet in self.subnets.items():
            picked = gather(subnet.weight, subnet.rows, subnet.cols).to(subnet.values.dtype)
            assert torch.equal(subnet.values, picked), name

    def rounds(self, count: int = 2, shapes: Sequence[Sequence[tuple[int, int]]] = (((2, 8), (2, 8)),)) -> None:
        """That many rounds of the schedule; the shapes of the steps repeat."""
        start = {name: weight.clone() for name, weight in self.reference.model.state_dict().items()}
        first = {name: (weight.rows, weight.cols) for name, weight in self.reference.weights.items()}
        for step in range(count * PERIOD * len(self.reference.groups)):
            self.step(shapes[step % len(shapes)])
        self.moved(first)
        for name in [*self.reference.weights, *self.learns_in_full]:
            assert not torch.equal(start[name], self.inner.state_dict()[name]), f"{name} has not learned"
        history = [(event.step, event.group) for event in losia_fx.controller(self.model).history]
        assert history == self.reference.reselections

    def moved(self, first: dict[str, tuple[Tensor, Tensor]]) -> None:
        """A run in which nothing moves would prove nothing."""
        for name, (rows, cols) in first.items():
            weight = self.reference.weights[name]
            same = torch.equal(rows, weight.rows) and torch.equal(cols, weight.cols)
            assert same == (not self.reference.reselections), name


def near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    off = (actual - expected).abs().max().item()
    assert off <= tolerance, f"{what}: off by {off:.3g}, {tolerance:g} allowed"


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


NO_BIAS = ("key.bias", "query_key_value.bias")
"""Of these the gradient is zero but for rounding, and AdamW makes a full step of the rounding."""


@pytest.mark.parametrize(
    ("case", "make"),
    [
        (LLAMA, adamw),
        pytest.param(LLAMA, fused, marks=slow),
        pytest.param(LLAMA, momentum, marks=slow),
        pytest.param(GPT_NEOX, adamw, marks=slow),
        pytest.param(GPT_NEOX, fused, marks=slow),
        pytest.param(GPT_NEOX, momentum, marks=slow),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else value.__name__,
)
def test_transform(case: Case, make: Callable[..., Optimizer]) -> None:
    run = Run(case, make, clip_norm=0.5)
    run.rounds()
    assert graphs() == 1
    assert not breaks()


@pytest.mark.parametrize(
    "make", [pytest.param(adamw, marks=slow), fused, pytest.param(momentum, marks=slow)], ids=lambda make: make.__name__
)
def test_backend_string(make: Callable[..., Optimizer]) -> None:
    """Embeddings and norms train in full beside the subnets, and count in the clipped norm."""
    run = Run(LLAMA, make, string=True, clip_norm=0.5)
    assert run.learns_in_full == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"model.layers.{i}.{norm}_layernorm.weight" for i in (0, 1) for norm in ("input", "post_attention")),
    }
    run.rounds()
    assert graphs() == 1
    assert not breaks()


def test_backend_string_with_biases() -> None:
    run = Run(BERT, string=True, frozen=NO_BIAS, clip_norm=0.5)
    run.rounds()
    assert graphs() == 1


@pytest.mark.parametrize(
    ("case", "string"),
    [
        (TOY, False),
        pytest.param(LLAMA, False, marks=slow),
        pytest.param(LLAMA, True, marks=slow),
    ],
    ids=["toy", "llama", "llama-string"],
)
def test_inductor(case: Case, string: bool) -> None:
    run = Run(case, fused, string=string, compiler="inductor", clip_norm=0.5)
    run.rounds()
    assert graphs() == 1
    assert not breaks()


def test_eager() -> None:
    run = Run(TOY, compiler="eager", clip_norm=0.5)
    run.rounds()
    assert graphs() == 1
    assert not breaks()


def test_float64() -> None:
    """Tight: the importance alone is float32, and it decides about indices only."""
    Run(LLAMA, dtype=torch.float64, clip_norm=0.5, tolerance=1e-10).rounds()


@pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")
def test_bert_with_norms_in_full() -> None:
    run = Run(BERT, full=("LayerNorm",), clip_norm=0.5)
    assert len(run.learns_in_full) == 2 * (1 + 2 * 2 + 1)
    run.rounds()


def test_sync() -> None:
    run = Run(TOY, clip_norm=0.5, options={"schedule": "sync"})
    run.rounds()
    assert [step for step, _ in run.reference.reselections] == [3] * 3 + [12] * 3


def test_static() -> None:
    run = Run(TOY, clip_norm=0.5, options={"schedule": "static"})
    run.rounds()
    assert not losia_fx.controller(run.model).history
    assert losia_fx.controller(run.model).active is None


@pytest.mark.parametrize("importance", ["first", "second", "gradient"])
def test_importance(importance: str) -> None:
    Run(TOY, options={"importance": importance}).rounds()


@pytest.mark.parametrize("steps", [1, 2, PERIOD])
@pytest.mark.parametrize("schedule", ["async", "sync"])
def test_profile_steps(schedule: str, steps: int) -> None:
    """Measured in the last steps of a slot alone, chosen by that at its end; one graph for both kinds of steps."""
    run = Run(TOY, clip_norm=0.5, options={"profile_steps": steps, "schedule": schedule})
    controller = losia_fx.controller(run.model)
    states, seen = losia_fx.runtime.state.states_of(run.model), set()

    def check() -> None:
        profiled = run.reference.profiled()
        assert controller.active == (profiled[0] if len(profiled) == 1 else None)
        assert {state.group for state in states if state.profile is not None} == set(profiled)
        seen.add(bool(profiled))

    step = run.step
    run.step = lambda *args: (check(), step(*args))  # type: ignore[assignment,method-assign,func-returns-value]
    run.rounds()
    assert seen == ({True, False} if steps < PERIOD or schedule == "sync" else {True})
    assert controller.left_out == 0
    assert graphs() == 1
    assert not breaks()


def test_betas() -> None:
    Run(TOY, options={"beta1": 0.5, "beta2": 0.2}).rounds()


def test_without_rewarm() -> None:
    Run(TOY, options={"rewarm": False}).rounds()


def test_clip_by_value() -> None:
    """A clamp that bites in about half of the elements: the importance sees G clamped alike."""
    plain = table.build(TOY)
    plain(**table.batch(TOY)).loss.backward()
    larger = torch.cat([(p.grad.abs() > 1e-3).flatten().float() for p in plain.parameters() if p.grad is not None])
    assert 0.2 < larger.mean() < 0.95
    run = Run(TOY, momentum, clip_value=1e-3)
    run.rounds()
    assert losia_fx.controller(run.model).left_out == 0


def test_learning_rate_scheduler() -> None:
    Run(TOY, decay=0.9).rounds()


def test_zero_grad_in_place() -> None:
    """zero_grad(set_to_none=False) leaves zeros on S: the next step's G starts at zero all the same."""
    Run(TOY, set_to_none=False, clip_norm=0.5).rounds()


def test_shapes_that_vary() -> None:
    """Lengths and batch sizes that change with every micro-batch: a handful of graphs, then never another one."""
    run = Run(TOY, clip_norm=0.5)
    cycle = [[(2, 8), (3, 6)], [(4, 11), (2, 5)], [(5, 9), (3, 7)]]
    run.step([(2, 8), (3, 6), (4, 11)])
    made = graphs()
    run.rounds(2, cycle)
    assert graphs() == made <= 4
    assert not breaks()


@pytest.mark.parametrize(("schedule", "steps"), [("async", None), ("sync", None), ("async", 1)])
def test_random_selection(schedule: str, steps: int | None) -> None:
    """Subnets move when a slot ends and at no other time, to sorted distinct indices; nothing is profiled."""
    options = {"rank_factor": 0.25, "period": PERIOD, "schedule": schedule, "importance": "random"}
    options["profile_steps"] = steps
    model = losia_fx.transform(table.build(TOY), compiler="aot_eager", **options)
    optimizer, controller = adamw(list(model.parameters())), losia_fx.controller(model)
    subnets, count = losia_fx.subnets(model), len(controller.groups)
    for step in range(2 * PERIOD * count):
        before = {name: (subnet.rows.clone(), subnet.cols.clone()) for name, subnet in subnets.items()}
        model(**table.batch(TOY)).loss.backward()
        assert losia_fx.ops.localization.tapped_bytes() == 0
        assert all(state.profile is None for state in losia_fx.runtime.state.states_of(model))
        optimizer.step()
        optimizer.zero_grad()
        slot, ends = step // PERIOD, (step + 1) % PERIOD == 0
        for name, subnet in subnets.items():
            moves = ends and (slot % count == (subnet.group if schedule == "async" else 0))
            same = all(torch.equal(a, b) for a, b in zip(before[name], (subnet.rows, subnet.cols), strict=True))
            assert same != moves, f"{name} at step {step}"
            for index, size in zip((subnet.rows, subnet.cols), subnet.weight.shape, strict=True):
                assert (index[1:] > index[:-1]).all()
                assert 0 <= index[0] <= index[-1] < size
            torch.testing.assert_close(subnet.values, subnet.weight[subnet.rows][:, subnet.cols], rtol=0, atol=0)
    assert graphs() == 1


def test_random_selection_is_seeded() -> None:
    ends = []
    for seed in (0, 0, 1):
        model = losia_fx.transform(
            table.build(TOY), compiler="eager", period=1, importance="random", seed=seed, rank_factor=0.25
        )
        optimizer = adamw(list(model.parameters()))
        for _ in range(3):
            model(**table.batch(TOY)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([(subnet.rows.tolist(), subnet.cols.tolist()) for subnet in losia_fx.subnets(model).values()])
    assert ends[0] == ends[1] != ends[2]
