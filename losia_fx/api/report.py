"""What of a model learns, how, and why the rest does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from losia_fx.errors import listed
from losia_fx.method.schedule import round_length
from losia_fx.model.blocks import plain_name
from losia_fx.model.kinds import EXPERTS
from losia_fx.registry import GRAPH_USES
from losia_fx.runtime.controller import Controller, Role
from losia_fx.runtime.packed import why_unpacked
from losia_fx.runtime.state import SubnetState

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class WeightReport:
    name: str
    shape: tuple[int, ...]
    trained: str
    """"subnet", "full" or "frozen"."""
    subnet: tuple[int, ...] | None
    """Shape of S: (r, c), or (E, r, c) of experts."""
    group: int | None
    why: str
    kind: str | None
    """Of linear weight; None for any other parameter."""
    used: str
    """What compiled graphs do with it; "" until one has run."""
    products: str = ""
    """What its frozen products are computed in, or why not as frozen_products says; "" where that says nothing."""


@dataclass(frozen=True)
class Report:
    """Every weight of a model. print() shows it as a table; as_dict() gives plain values."""

    weights: tuple[WeightReport, ...]
    groups: int
    round_steps: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def totals(self) -> Mapping[str, int]:
        """Elements that learn, by how: through subnets, in full; and those that stay frozen."""
        totals: Counter[str] = Counter(subnet=0, full=0, frozen=0)
        for weight in self.weights:
            size = _product(weight.shape)
            if weight.trained == "subnet" and weight.subnet is not None:
                totals["subnet"] += _product(weight.subnet)
                totals["frozen"] += size - _product(weight.subnet)
            else:
                totals["full" if weight.trained == "full" else "frozen"] += size
        return totals

    @property
    def coverage(self) -> float:
        """The share, 0 to 1, of the elements of all linear weights that lie in a weight with a subnet."""
        linear = [weight for weight in self.weights if weight.kind is not None]
        covered = sum(_product(weight.shape) for weight in linear if weight.trained == "subnet")
        return covered / max(1, sum(_product(weight.shape) for weight in linear))

    def __rich__(self) -> Group:
        from rich.console import Group  # here: whoever only trains does not wait for it

        from losia_fx.console import make_table

        columns = ["weight", "shape", "trained", "subnet", "group", "why", "used by"]
        packs = any(weight.products for weight in self.weights)
        columns += ["frozen products"] if packs else []
        table = make_table("losia_fx: what learns", *columns, left=("trained", *columns[5:]))
        for weight in self.weights:
            subnet = "" if weight.subnet is None else _shape(weight.subnet)
            group = "" if weight.group is None else str(weight.group)
            row = (weight.name, _shape(weight.shape), weight.trained, subnet, group, weight.why, weight.used)
            table.add_row(*row, *([weight.products] if packs else []))
        totals = self.totals()
        everything = sum(totals.values())
        summary = (
            f"{totals['subnet']:,} elements learn through subnets, {totals['full']:,} in full, of {everything:,} "
            f"({100 * (totals['subnet'] + totals['full']) / everything:.2f}%); weights with a subnet hold "
            f"{self.coverage:.1%} of all linear weights' elements; {self.groups} groups, a round is "
            f"{self.round_steps} optimizer steps"
        )
        return Group(table, summary, *self.notes)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def report_of(controller: Controller) -> Report:
    states = {state.name: state for state in controller.states}
    hidden = {id(state.values) for state in controller.states}
    rows, notes = [], []
    for full_name, parameter in controller.root.named_parameters():
        if id(parameter) in hidden:
            continue
        name = plain_name(full_name)
        state = states.get(name)
        role = controller.roles.get(name, Role("full" if parameter.requires_grad else "frozen", "requires_grad", None))
        trained, why = role.trained, role.why
        if state is not None and controller.train.by_string:
            trained, why = "subnet", "output head: rows only" if state.whole_cols else "linear"
        subnet, group = (None, None) if state is None else (tuple(state.values.shape), state.group)
        shape, kind = tuple(parameter.shape), role.kind if state is None else role.kind or "linear"
        products = "" if kind is None else _products(controller, parameter, state)
        rows.append(WeightReport(name, shape, trained, subnet, group, why, kind, _used(parameter), products))
    notes += _notes(controller, rows)
    return Report(
        tuple(rows), len(controller.groups), round_length(controller.config, len(controller.groups)), tuple(notes)
    )


def _used(parameter: nn.Parameter) -> str:
    uses = GRAPH_USES.get(parameter)
    if uses is None:
        return ""
    said = ", ".join(sorted(uses.named))
    return f"{said}; full gradient for {', '.join(sorted(uses.whole))}" if uses.whole else said


def _products(controller: Controller, parameter: nn.Parameter, state: SubnetState | None) -> str:
    kind = controller.config.frozen_products
    if kind is None:
        return ""
    if state is None:
        return "dense: no subnet"
    if state.products is None:
        return f"dense: {why_unpacked(state.shape, state.whole_cols, kind)}"
    uses = GRAPH_USES.get(parameter)
    others = set() if uses is None else uses.unpacked | uses.whole
    said = kind if state.stored is None else f"{kind}, instead of W"
    return f"{said}; dense for {', '.join(sorted(others))}" if others else said


def _notes(controller: Controller, rows: list[WeightReport]) -> list[str]:
    notes = []
    config = controller.config
    scored = [
        [s for s in controller.members(g) if config.scored_by(s.whole_cols)] for g in range(len(controller.groups))
    ]
    if any(scored):
        sizes = [sum(_product(state.weight.shape) for state in states) for states in scored]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        notes.append(
            f"while group {largest}, the largest, is profiled, its importance, uncertainty and gradient (float32) "
            f"hold up to {3 * 4 * sizes[largest] / 1e9:.3g} GB"
        )
    for start, text in (
        (
            "outside the repeated blocks",
            "frozen outside the repeated blocks (a classification head? name it in trainable)",
        ),
        ("tied to an embedding", "left dense and frozen because tied to an embedding"),
    ):
        names = [row.name for row in rows if row.why.startswith(start) and row.trained == "frozen"]
        if names:
            notes.append(f"{text}: {', '.join(names)}")
    dense = [row.name for row in rows if "full gradient for" in row.used]
    if dense:
        notes.append(
            "used in ways that no pass rewrites, so trained exactly, but at the cost of a full gradient: "
            f"{listed(dense)}"
        )
    experts = [row.name for row in rows if row.kind == EXPERTS and row.trained == "frozen"]
    if experts:
        notes.append(f"experts left dense: frozen: {listed(experts)}")
    ran = [state.name for state in controller.states if state.ran_outside]
    if ran:
        notes.append(f"ran outside a rewritten graph (exact, but uncompiled): {', '.join(ran)}")
    if controller.left_out:
        notes.append(
            f"{controller.left_out} profiled weight-steps left out of the importance (gradients not finite or altered)"
        )
    return notes


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
