"""What of a model learns, how, and why the rest does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from .blocks import plain_name
from .controller import Controller
from .schedule import round_length


@dataclass(frozen=True)
class WeightReport:
    name: str
    shape: tuple[int, ...]
    trained: str
    """"subnet", "full", "frozen" or "left out" (has a subnet that no pass can reach)."""
    subnet: tuple[int, int] | None
    group: int | None
    why: str


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

    def __rich__(self) -> Group:
        table = Table(title="losia_fx: what learns", title_justify="left")
        for column in ("weight", "shape", "trained", "subnet", "group", "why"):
            table.add_column(
                column, overflow="fold", justify="right" if column in ("shape", "subnet", "group") else "left"
            )
        for weight in self.weights:
            subnet = "" if weight.subnet is None else _shape(weight.subnet)
            group = "" if weight.group is None else str(weight.group)
            table.add_row(weight.name, _shape(weight.shape), weight.trained, subnet, group, weight.why)
        totals = self.totals()
        everything = sum(totals.values())
        summary = (
            f"{totals['subnet']:,} elements learn through subnets, {totals['full']:,} in full, of {everything:,} "
            f"({100 * (totals['subnet'] + totals['full']) / everything:.2f}%); {self.groups} groups, "
            f"a round is {self.round_steps} optimizer steps"
        )
        return Group(table, summary, *self.notes)

    def __str__(self) -> str:
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
        trained, why = controller.roles.get(name, ("full" if parameter.requires_grad else "frozen", "requires_grad"))
        if state is None:
            rows.append(WeightReport(name, tuple(parameter.shape), trained, None, None, why))
            continue
        if state.left_alone is not None:
            trained, why = "left out", state.left_alone
        elif controller.by_string:
            trained, why = "subnet", "output head: rows only" if state.whole_cols else "linear"
        rows.append(WeightReport(name, tuple(parameter.shape), trained, state.size, state.group, why))
    notes += _notes(controller, rows)
    return Report(
        tuple(rows), len(controller.groups), round_length(controller.config, len(controller.groups)), tuple(notes)
    )


def _notes(controller: Controller, rows: list[WeightReport]) -> list[str]:
    notes = []
    if controller.config.profiles and controller.groups:
        sizes = [sum(_product(s.weight.shape) for s in controller.members(g)) for g in range(len(controller.groups))]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        notes.append(
            f"while group {largest}, the largest, is profiled, its importance, uncertainty and gradient (float32) hold "
            f"{3 * 4 * sizes[largest] / 1e9:.3g} GB"
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
    left = [row.name for row in rows if row.trained == "left out"]
    if left:
        notes.append(f"do not learn, although they have a subnet: {', '.join(left)}")
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
