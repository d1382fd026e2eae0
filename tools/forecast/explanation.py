"""What ``losia-fx explain`` finds out, and its tables."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import losia_fx
from losia_fx.api.report import Report
from losia_fx.config import LosiaConfig
from losia_fx.console import make_table
from losia_fx.errors import LosiaWarning
from losia_fx.finetune.record import group_label
from losia_fx.method.schedule import round_length

from ..graphs.capture import Captured
from ..load_model import Example
from .estimate import PARTS, MethodCost, RoundFit, StepFacts, full_fine_tuning, lora, losia, profiled_group
from .measure import measure
from .products import ProductsForecast
from .ranks import HELD, SENT, RanksForecast

RANKS = (8, 64)  # of LoRA, for comparison
VISITS = (1, 10, 50)  # places of a subnet, for what track_delta costs
ACTIVATIONS_NOTE = (
    "kept for the backward: forecast from the shapes in the captured forward graph; measured with autograd's "
    "saved_tensors_hooks, each storage once, weights and inputs aside. Not in the table: what the backward needs for a "
    "moment, and what the allocator loses"
)


@dataclass(frozen=True)
class Explanation:
    report: Report
    facts: StepFacts
    fit: RoundFit
    methods: tuple[MethodCost, ...]
    """LoSiA as configured, full fine-tuning of the same weights, and LoRA."""
    measured: Mapping[str, int] | None
    """Bytes by part, as forecast in methods[0].memory."""
    inputs: Mapping[str, tuple[int, ...]]
    products: ProductsForecast | None = None
    """Of frozen products in 8 bits, where the options ask for them."""
    sharded: RanksForecast | None = None
    """Under FSDP2, where a number of processes is given."""

    def as_dict(self) -> dict[str, Any]:
        facts = self.facts
        return {
            "config": asdict(facts.config),
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "weights": [asdict(weight) for weight in self.report.weights],
            "groups": [{"label": group_label(names) or names[0], "weights": list(names)} for names in facts.groups],
            "round": {**asdict(self.fit), "fits": self.fit.fits},
            "forecast": dict(self.methods[0].memory),
            "measured": None if self.measured is None else dict(self.measured),
            "profiled_group": profiled_group(facts),
            "track_delta": {visits: facts.base_bytes(visits) for visits in visits_of(self.fit, facts.config)},
            "methods": [asdict(method) for method in self.methods],
            "frozen_products": None if self.products is None else asdict(self.products),
            "sharded": None if self.sharded is None else asdict(self.sharded),
        }


def explain(
    model: nn.Module,
    captured: Captured,
    example: Example,
    steps: int | None = None,
    measured: bool = False,
    ranks: int | None = None,
) -> Explanation:
    """captured: of this model with this example. steps: of a run, if known. ranks: processes that FSDP2 is to shard the
    model over, if any. The model is left as it was."""
    config = captured.config
    sharded = None if ranks is None else RanksForecast.of(model, config, ranks)
    facts = StepFacts.of(model, captured)
    counted = measure(model, example, config, profiled_group(facts)) if measured else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LosiaWarning)  # the report says it too
        losia_fx.transform(model, config)
    report = losia_fx.report(model)
    losia_fx.restore(model)
    methods = (losia(facts), full_fine_tuning(facts), *(lora(facts, rank) for rank in RANKS))
    fit = RoundFit.of(config, len(facts.groups), steps)
    products = ProductsForecast.of(model, facts)
    return Explanation(report, facts, fit, methods, counted, shapes_of(example), products, sharded)


def shapes_of(example: Example) -> dict[str, tuple[int, ...]]:
    named = {**{f"input {number}": value for number, value in enumerate(example.args)}, **example.kwargs}
    return {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}


def size_text(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def count_text(count: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:.3g} P"


def round_text(fit: RoundFit, facts: StepFacts) -> str:
    config = facts.config
    if config.schedule == "static":
        return "schedule static: the first subnets stay, there are no rounds"
    head = f", of the head {config.head_period}" if facts.has_head_period else ""
    said = f"a round is {fit.round_steps} optimizer steps ({fit.groups} groups, slots of {fit.period} steps{head})"
    if fit.steps is None:
        return said
    if fit.fits:
        return f"{said}: {fit.steps} steps hold {fit.steps // fit.round_steps}"
    if fit.fitting_period is None:
        return f"{said}: {fit.steps} steps are fewer than the groups, so some never move, whatever the period"
    return f"{said}: more than {fit.steps} steps, so some subnets never move; --period {fit.fitting_period} would fit"


def visits_of(fit: RoundFit, config: LosiaConfig) -> tuple[int, ...]:
    """By how many visits of a subnet to forecast its base: by those of the run, where that is known."""
    if config.schedule == "static":
        return (1,)
    return VISITS if fit.steps is None else (1 + fit.steps // round_length(config, fit.groups),)


def base_text(fit: RoundFit, facts: StepFacts) -> str:
    whose = "each subnet but the head's" if facts.has_head_period else "each subnet"
    costs = (f"{size_text(facts.base_bytes(n))} after {n}" for n in visits_of(fit, facts.config))
    return (
        f"track_delta=True, which save_delta needs, keeps base values in host memory: {', '.join(costs)} visits by "
        f"{whose}, if every place is drawn anew; less where they overlap more"
    )


def show(found: Explanation, console: Console | None = None) -> None:
    console = console or Console()
    facts = found.facts
    console.print(found.report)
    console.print(_groups(facts))
    console.print(round_text(found.fit, facts), highlight=False, soft_wrap=True)
    console.print(_memory(found))
    console.print(ACTIVATIONS_NOTE, highlight=False)
    console.print(base_text(found.fit, facts), highlight=False, soft_wrap=True)
    console.print(_methods(found.methods))
    if found.products is not None:
        console.print(str(found.products), highlight=False, soft_wrap=True)
    if found.sharded is not None:
        console.print(_sharded(found.sharded))


def _groups(facts: StepFacts) -> Table:
    shown = make_table(
        "Groups, in the order of their slots", "group", "", "weights", "elements", "of them in subnets", left=("",)
    )
    for number, names in enumerate(facts.groups):
        members = [weight for weight in facts.weights if weight.group == number]
        elements = sum(weight.elements for weight in members)
        inside = sum(math.prod(weight.subnet(facts.config)) for weight in members)
        shown.add_row(str(number), group_label(names) or names[0], str(len(names)), f"{elements:,}", f"{inside:,}")
    return shown


def _memory(found: Explanation) -> Table:
    said = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in found.inputs.items())
    shown = make_table(
        f"Memory of a step ({said})", "part", "forecast", *(("measured", "off by") if found.measured else ())
    )
    ours = found.methods[0].memory
    for part, label in PARTS.items():
        cells = [size_text(ours[part])]
        if found.measured:
            cells += [size_text(found.measured[part]), _off(ours[part], found.measured[part])]
        shown.add_row(label, *cells)
    total = sum(ours.values())
    cells = [size_text(total)]
    if found.measured:
        counted = sum(found.measured.values())
        cells += [size_text(counted), _off(total, counted)]
    shown.add_section()
    shown.add_row("all of it", *cells)
    return shown


def _sharded(found: RanksForecast) -> Table:
    shown = make_table(f"Under FSDP2, on each of {found.ranks} processes (activations aside)", "", "bytes")
    for part, label in HELD.items():
        shown.add_row(f"holds {label}", size_text(found.held[part]))
    shown.add_section()
    for part, label in SENT.items():
        shown.add_row(f"sends {label}", size_text(found.sent[part]))
    return shown


def _methods(methods: Sequence[MethodCost]) -> Table:
    shown = make_table("Beside it", "method", "learns", "memory", "kept for the backward", "matmul FLOPs a step")
    for method in methods:
        memory = size_text(method.bytes), size_text(method.memory["activations"])
        shown.add_row(method.name, f"{method.trained:,}", *memory, count_text(method.all_flops))
    return shown


def _off(forecast: int, measured: int) -> str:
    return "" if not measured else f"{100 * (forecast - measured) / measured:+.1f}%"
