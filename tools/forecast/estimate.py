"""What a step will hold in memory and multiply: for LoSiA at any rank factor, for full fine-tuning and for LoRA.

Memory is by part, in bytes, at the time when the part is largest; FLOPs are those of the products that weights with a
subnet take part in, an optimizer step (all else is the same for every method). Not in it: what the backward needs for a
moment, and the allocator's own losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from losia_fx.config import BY_SUMS, LosiaConfig, subnet_size
from losia_fx.method.schedule import round_length
from losia_fx.method.visits import INDEX_BYTES, expected_bytes
from losia_fx.model.roles import plan_model
from losia_fx.model.weight_plan import WeightPlan
from losia_fx.runtime.packed import why_unpacked

from ..graphs.capture import Captured
from .step_cost import WeightUse, kept_columns, saved_bytes, tapped, weight_uses

PARTS = {
    "weights": "weights, dense",
    "packed": "weights in 8 bits",
    "subnets": "values that learn (S)",
    "indices": "rows and cols",
    "gradients": "gradients of what learns",
    "moments": "AdamW's two moments",
    "activations": "kept for the backward",
    "profile": "one group's I, U and G",
    "tapped": "its inputs, tapped",
}
FLOAT_BYTES, STEP_BYTES = 4, 4


@dataclass(frozen=True)
class SubnetWeight:
    """A weight that learns through a subnet."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    group: int
    head: bool
    """Every column learns."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def subnet(self, config: LosiaConfig) -> tuple[int, ...]:
        """The shape of S."""
        out, inner = self.shape[-2:]
        if self.head:
            return subnet_size(config.output_rank_factor, out), inner
        return (*self.shape[:-2], subnet_size(config.rank_factor, out), subnet_size(config.rank_factor, inner))

    def packed_bytes(self, config: LosiaConfig) -> int:
        """Of its copy in 8 bits, with a scale a row, where its frozen products take one."""
        kind = config.frozen_products
        packed = kind is not None and why_unpacked(self.shape, self.head, kind) is None
        return self.elements + FLOAT_BYTES * self.shape[0] if packed else 0

    def dense_bytes(self, config: LosiaConfig) -> int:
        """Of itself; none where it is kept in 8 bits alone."""
        return 0 if not config.keep_dense and self.packed_bytes(config) else self.elements * self.itemsize


@dataclass(frozen=True)
class StepFacts:
    """All that a forecast needs to know of a model and the step it was captured in."""

    weights: tuple[SubnetWeight, ...]
    groups: tuple[tuple[str, ...], ...]
    dense_bytes: int
    """All parameters and buffers."""
    all_elements: int
    full: tuple[tuple[int, int], ...]
    """(elements, bytes an element) of each parameter that learns in full."""
    config: LosiaConfig
    uses: tuple[WeightUse, ...]
    saved: int
    """Bytes kept for the backward, in the captured graphs."""
    saved_dense: int
    """The same where these weights learn in full."""
    kept: Mapping[str, int]
    """By weight: bytes of its inputs' columns among those that are saved."""
    tapped: Mapping[str, int]
    """By weight: bytes of x that are copied while its group is profiled."""

    @classmethod
    def of(cls, model: nn.Module, captured: Captured) -> StepFacts:
        """model: the plain one, as it was before capture(). Raises what transform() raises."""
        plans = plan_model(model, captured.config)
        tensors = [*(plan.parameter for plan in plans), *model.buffers()]
        weights = subnet_weights(plans, captured.groups)
        return cls(
            weights,
            captured.groups,
            sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            sum(plan.parameter.numel() for plan in plans),
            tuple((p.parameter.numel(), p.parameter.element_size()) for p in plans if p.trained == "full"),
            captured.config,
            weight_uses(captured.graphs),
            saved_bytes(graph.stages for graph in captured.graphs),
            saved_bytes(graph.dense for graph in captured.graphs),
            kept_columns(captured.graphs),
            tapped(captured.graphs),
        )

    def base_bytes(self, visits: int) -> int:
        """Host memory that track_delta=True takes, once every subnet has been in that many places drawn anew."""
        subnets = ((weight, weight.subnet(self.config)) for weight in self.weights)
        of_head = self._visits_of_head(visits)
        kept = sum(expected_bytes(w.shape, s, w.itemsize, of_head if w.head else visits) for w, s in subnets)
        return kept + sum(count * itemsize for count, itemsize in self.full)

    @property
    def has_head_period(self) -> bool:
        return self.config.head_period is not None and any(weight.head for weight in self.weights)

    def _visits_of_head(self, visits: int) -> int:
        """Where those of the others are that many."""
        if self.config.head_rows in ("frequent", "fixed"):
            return min(visits, 2 if self.config.head_rows == "frequent" else 1)
        return 1 + (visits - 1) * self.config.period // self.config.period_of(head=True)

    def at(self, config: LosiaConfig) -> StepFacts:
        """The same model and step at other factors: what each product keeps of x grows and shrinks with them."""
        kept = {weight.name: self._kept(weight, config) for weight in self.weights}
        change = sum(kept.values()) - sum(self.kept.values())
        return replace(self, config=config, saved=self.saved + change, kept=kept)

    def _kept(self, weight: SubnetWeight, config: LosiaConfig) -> int:
        now, then = (weight.subnet(config)[-1] for config in (self.config, config))
        return self.kept.get(weight.name, 0) * then // now


def subnet_weights(plans: Sequence[WeightPlan], groups: Sequence[Sequence[str]]) -> tuple[SubnetWeight, ...]:
    number = {name: index for index, names in enumerate(groups) for name in names}
    return tuple(
        SubnetWeight(p.name, tuple(p.parameter.shape), p.parameter.element_size(), number[p.name], p.whole_cols)
        for p in plans
        if p.trained == "subnet"
    )


@dataclass(frozen=True)
class MethodCost:
    """One way of fine-tuning: what learns, its memory by part (keys of PARTS), and its FLOPs an optimizer step."""

    name: str
    trained: int
    memory: Mapping[str, int]
    flops: Mapping[str, int]
    """"forward", "input gradients", "weight gradients", and what profiling takes on average over a round."""

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def all_flops(self) -> int:
        return sum(self.flops.values())


def losia(facts: StepFacts) -> MethodCost:
    config = facts.config
    shapes = {weight.name: weight.subnet(config) for weight in facts.weights}
    size = {weight.name: math.prod(shapes[weight.name]) * max(FLOAT_BYTES, weight.itemsize) for weight in facts.weights}
    full = sum(count * itemsize for count, itemsize in facts.full)
    tensors = len(size) + len(facts.full)
    memory = {
        "weights": facts.dense_bytes - sum(w.elements * w.itemsize - w.dense_bytes(config) for w in facts.weights),
        "packed": sum(weight.packed_bytes(config) for weight in facts.weights),
        "subnets": sum(size.values()),
        "indices": INDEX_BYTES * sum(_indices(shape) for shape in shapes.values()),
        "gradients": sum(size.values()) + full,
        "moments": 2 * (sum(size.values()) + full) + STEP_BYTES * tensors,
        "activations": facts.saved,
        "profile": 0,
        "tapped": 0,
    }
    weight_gradients = sum(_share(use, shapes[use.weight]) for use in facts.uses)
    flops = {**_common(facts), "weight gradients": weight_gradients, "profiling": 0}
    if config.profiles:
        at_once = config.schedule in ("sync", "all")
        group = None if at_once else profiled_group(facts)
        profiled = [weight for weight in _scored(facts) if group in (None, weight.group)]
        narrow = sum(weight.elements * min(FLOAT_BYTES, weight.itemsize) for weight in profiled)
        memory["profile"] = narrow + sum(_kept_of_importance(weight, config) for weight in profiled)  # G of a batch
        names = {weight.name for weight in profiled}
        memory["tapped"] = sum(size for name, size in facts.tapped.items() if name in names)
        flops["profiling"] = _profiling(facts)
    trained = sum(math.prod(shape) for shape in shapes.values()) + sum(count for count, _ in facts.full)
    return MethodCost("LoSiA", trained, memory, flops)


def _scored(facts: StepFacts) -> list[SubnetWeight]:
    """Those whose importance slots measure."""
    return [weight for weight in facts.weights if facts.config.scored_by(weight.head)]


def _kept_of_importance(weight: SubnetWeight, config: LosiaConfig) -> int:
    """Bytes of I and U; sums are next to nothing."""
    return 0 if config.scored_by(weight.head) in BY_SUMS else 2 * FLOAT_BYTES * weight.elements


def _profiling(facts: StepFacts) -> int:
    """A step's part: every group is profiled in one slot of each round, or in the end of it."""
    config = facts.config
    slots = 1 if config.schedule == "all" else max(1, len(facts.groups))
    found = 0
    for head in (False, True):
        names = {weight.name for weight in _scored(facts) if weight.head == head}
        period = config.period_of(head)
        steps = min(config.profile_steps or period, period)
        found += sum(use.flops for use in facts.uses if use.weight in names) * steps // (period * slots)
    return found


def full_fine_tuning(facts: StepFacts) -> MethodCost:
    """The same weights in full, as the plain graph would train them."""
    full = sum(count * itemsize for count, itemsize in facts.full)
    learns = sum(weight.elements * weight.itemsize for weight in facts.weights) + full
    memory = dict.fromkeys(PARTS, 0)
    memory |= {"weights": facts.dense_bytes, "gradients": learns, "activations": facts.saved_dense}
    memory["moments"] = 2 * learns + STEP_BYTES * (len(facts.weights) + len(facts.full))
    trained = sum(weight.elements for weight in facts.weights) + sum(count for count, _ in facts.full)
    flops = {**_common(facts), "weight gradients": sum(use.flops for use in facts.uses), "profiling": 0}
    return MethodCost("full fine-tuning", trained, memory, flops)


def lora(facts: StepFacts, rank: int) -> MethodCost:
    """Adapters A (r, in) and B (out, r), float32, on the same weights: x is kept whole, and x A^T beside it."""
    adapters = sum(math.prod(weight.shape[:-2]) * rank * sum(weight.shape[-2:]) for weight in facts.weights)
    full = sum(count * itemsize for count, itemsize in facts.full)
    learns = FLOAT_BYTES * adapters + full
    memory = dict.fromkeys(PARTS, 0)
    memory |= {"weights": facts.dense_bytes, "subnets": FLOAT_BYTES * adapters, "gradients": learns}
    memory["moments"] = 2 * learns + STEP_BYTES * (2 * len(facts.weights) + len(facts.full))
    memory["activations"] = facts.saved_dense + sum(use.tokens * rank * use.itemsize for use in facts.uses)
    thin = sum(2 * use.tokens * rank * (use.inner + use.outer) for use in facts.uses)
    common = _common(facts)
    flops = {name: count + thin for name, count in common.items()}
    return MethodCost(f"LoRA r={rank}", adapters + sum(count for count, _ in facts.full), memory,
                  {**flops, "weight gradients": thin, "profiling": 0})  # fmt: skip


def profiled_group(facts: StepFacts) -> int:
    """The group that holds most while it is profiled."""
    scored = _scored(facts) or facts.weights
    sizes = [sum(w.elements for w in scored if w.group == group) for group in range(len(facts.groups))]
    return max(range(len(sizes)), key=sizes.__getitem__)


@dataclass(frozen=True)
class RoundFit:
    """T*L against the optimizer steps of a run."""

    groups: int
    period: int
    round_steps: int
    steps: int | None
    fitting_period: int | None
    """The longest period at which every group moves once; None where the steps are fewer than the groups."""

    @property
    def fits(self) -> bool:
        return self.steps is None or self.round_steps <= self.steps

    @classmethod
    def of(cls, config: LosiaConfig, groups: int, steps: int | None) -> RoundFit:
        # all groups share one slot of a synchronous round, and it is over after that
        slots = 1 if config.schedule in ("sync", "all") else max(1, groups)
        needed = config.period if config.schedule == "sync" else round_length(config, groups)
        longest = None if steps is None or steps < slots else steps // slots
        return cls(groups, config.period, needed, steps, longest)


def _common(facts: StepFacts) -> dict[str, int]:
    products = sum(use.flops for use in facts.uses)
    return {"forward": products, "input gradients": products}


def _share(use: WeightUse, subnet: tuple[int, ...]) -> int:
    """FLOPs of dL/dS: those of dL/dW, for the subnet's rows and columns alone."""
    return 2 * use.tokens * math.prod(subnet[-2:])


def _indices(subnet: tuple[int, ...]) -> int:
    return math.prod(subnet[:-2]) * sum(subnet[-2:])
