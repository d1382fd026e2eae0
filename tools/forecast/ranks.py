"""What FSDP2 leaves each of several processes to hold, and what a step has it send: from sizes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from losia_fx.config import BY_SUMS, LosiaConfig
from losia_fx.method.fit import LARGEST
from losia_fx.method.visits import INDEX_BYTES
from losia_fx.model.blocks import find_blocks, group_names
from losia_fx.model.roles import judge_weights

from .estimate import FLOAT_BYTES, SubnetWeight, subnet_weights

SUM_BYTES = 8
"""Of a sum that a selection goes by, float64."""
HELD = {
    "weights": "its part of the weights",
    "subnets": "its part of the values that learn (S), their gradients and two moments",
    "indices": "rows and cols, whole",
    "profile": "its part of the profiled group's I, U and G",
    "unsharded": "the largest block, whole while it runs",
    "gradient": "G of the group that is profiled, whole until its backward has ended",
}
SENT = {
    "gathered": "weights and S, gathered by FSDP2",
    "reduced": "gradients of what learns, reduced by FSDP2",
    "written": "S, on its way to W",
    "profiled": "while a group is profiled: its G, and how the loop changed its gradients",
    "selected": "at the end of its slot: the sums of its selection, and the new S",
}


@dataclass(frozen=True)
class RanksForecast:
    """Of a model of which fully_shard has cut each block, and then the model, over ``ranks`` processes."""

    ranks: int
    held: Mapping[str, int]
    """Keys of HELD; bytes in a process. Activations aside, which are as in one process."""
    sent: Mapping[str, int]
    """Keys of SENT; bytes that a process gives to collectives in a step of one micro-batch, of the group for which it
    is most."""

    @classmethod
    def of(cls, model: nn.Module, config: LosiaConfig, ranks: int) -> RanksForecast:
        """model: as it was before transform(); the meta device will do."""
        plans, names = judge_weights(model, config), find_blocks(model)
        subnets = [plan.name for plan in plans if plan.trained == "subnet"]
        groups = group_names(subnets, [plan.name for plan in plans if plan.whole_cols], names)
        weights = subnet_weights(plans, groups)
        full = [plan.parameter for plan in plans if plan.trained == "full"]
        cut = _Cut(model, config, ranks, names, weights, _profiled(weights, len(groups), config), full)
        return cls(ranks, cut.held(), cut.sent())


def _profiled(weights: Sequence[SubnetWeight], groups: int, config: LosiaConfig) -> list[SubnetWeight]:
    """The most that is profiled at one time."""
    scored = [weight for weight in weights if config.scored_by(weight.head)]
    if config.schedule in ("sync", "all"):
        return scored
    return max(([w for w in scored if w.group == group] for group in range(groups)), key=_elements, default=[])


def _elements(weights: Sequence[SubnetWeight]) -> int:
    return sum(weight.elements for weight in weights)


@dataclass(frozen=True)
class _Cut:
    """A model that is cut over processes: each has a part of a tensor's first dimension, which is padded to be sent."""

    model: nn.Module
    config: LosiaConfig
    ranks: int
    blocks: Sequence[str]
    weights: Sequence[SubnetWeight]
    profiled: Sequence[SubnetWeight]
    full: Sequence[Tensor]
    """What trains in full."""

    def held(self) -> dict[str, int]:
        shapes = [weight.subnet(self.config) for weight in self.weights]
        inside = [sum(_bytes(t) for t in block) for block in self._by_block()[:-1]]
        return {
            "weights": self._parts(self.model.parameters()),
            "subnets": 4 * self._values(self.weights) + 3 * self._parts(self.full),
            "indices": INDEX_BYTES * sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes),
            "profile": FLOAT_BYTES * sum(self._kept(w) * self._part(w.shape) for w in self.profiled),
            "unsharded": max(inside, default=0),
            "gradient": FLOAT_BYTES * _elements(self.profiled),
        }

    def _kept(self, weight: SubnetWeight) -> int:
        """How many tensors of its shape: G; and I and U, which sums can stand for."""
        return 1 if self.config.scored_by(weight.head) in BY_SUMS else 3

    def sent(self) -> dict[str, int]:
        *blocks, rest = self._by_block()
        outside = [weight for weight in self.weights if not self._block_of(weight.name)]
        inside = [weight for weight in self.weights if self._block_of(weight.name)]
        # A block is gathered for its forward and again for its backward; what is outside of them stays in between.
        twice = sum(self._parts(block) for block in blocks) + self._values(inside)
        once = self._parts(rest) + self._values(outside)
        matrices = [weight for weight in self.weights if len(weight.shape) == 2]  # experts are written where they lie
        learnt = sum(math.prod(weight.subnet(self.config)) * _values_bytes(weight) for weight in self.weights)
        fitted = sum(self._fit(weight) for weight in self.profiled) + (FLOAT_BYTES * LARGEST if self.profiled else 0)
        return {
            "gathered": 2 * twice + once,
            "reduced": learnt + sum(map(_bytes, self.full)),
            "written": sum(self._part(weight.subnet(self.config)) * weight.itemsize for weight in matrices),
            "profiled": FLOAT_BYTES * _elements(self.profiled) + fitted,
            "selected": sum(self._selection(weight) for weight in self.profiled),
        }

    def _part(self, shape: Sequence[int]) -> int:
        return -(-shape[0] // self.ranks) * math.prod(shape[1:]) if shape else 1

    def _parts(self, tensors: Iterable[Tensor]) -> int:
        return sum(self._part(tensor.shape) * tensor.element_size() for tensor in tensors)

    def _values(self, weights: Iterable[SubnetWeight]) -> int:
        """Bytes of a process's parts of S."""
        return sum(self._part(weight.subnet(self.config)) * _values_bytes(weight) for weight in weights)

    def _block_of(self, name: str) -> str | None:
        return next((block for block in self.blocks if name.startswith(f"{block}.")), None)

    def _by_block(self) -> list[list[Tensor]]:
        """The parameters of each block, and at the end those of none."""
        found: dict[str | None, list[Tensor]] = {name: [] for name in (*self.blocks, None)}
        for name, parameter in self.model.named_parameters():
            found[self._block_of(name)].append(parameter)
        return list(found.values())

    def _fit(self, weight: SubnetWeight) -> int:
        """S.grad is gathered, G[rows, cols] summed, and whether G is finite."""
        block = weight.subnet(self.config)
        return self._part(block) * _values_bytes(weight) + FLOAT_BYTES * (math.prod(block) + 1)

    def _selection(self, weight: SubnetWeight) -> int:
        """Sums of rows and of columns, twice, for the candidates; the sum of the whole score; and the new S."""
        out, inner = weight.shape[-2:]
        moved = math.prod(weight.subnet(self.config)) * weight.itemsize
        if len(weight.shape) == 3:  # the rows and columns that each rank has found for its experts
            return sum(INDEX_BYTES * self._part((weight.shape[0], n)) for n in weight.subnet(self.config)[1:]) + moved
        rows = -(-out // self.ranks)
        return SUM_BYTES * ((rows if weight.head else 2 * rows + 2 * inner + 3) + 1) + moved


def _values_bytes(weight: SubnetWeight) -> int:
    """Of an element of S."""
    return max(FLOAT_BYTES, weight.itemsize)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
