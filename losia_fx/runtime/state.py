"""SubnetState: everything that changes about one weight's subnet, and where a weight's state is found at run time.

The state lives on the module that owns W: S as an nn.Parameter, so that optimizers, clipping, zero_grad, DDP and .to()
see it, rows and cols as non-persistent buffers, and the SubnetState itself as a plain attribute. So a deepcopy or a
pickle of the module carries it along.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from losia_fx import registry
from losia_fx.config import LosiaConfig, subnet_size
from losia_fx.errors import StateError
from losia_fx.method.factored import Means
from losia_fx.method.subnet import BlockWriter, gather, numbers_of_some
from losia_fx.method.visits import BaseHistory
from losia_fx.plan import SubnetFacts

from .packed import PackedWeight
from .profile import Profile
from .quantised_weight import QuantisedWeight
from .shards import Shards, local

ATTRIBUTE = "_losia_subnets"
"""Of an owner module: its SubnetStates by the name of the weight within it."""


class _Agreement(Protocol):
    """losia_fx.runtime.agreement.Agreement, which is about these states."""

    def is_ahead(self, state: SubnetState) -> bool: ...


class SubnetState:
    """One weight's subnet. Made and removed by transform, changed by the controller alone."""

    def __init__(self, owner: nn.Module, parameter: str, name: str, config: LosiaConfig, whole_cols: bool) -> None:
        self.owner, self.parameter, self.name = owner, parameter, name
        self.values_name, self.rows_name, self.cols_name = (
            f"{parameter}_subnet{part}" for part in ("", "_rows", "_cols")
        )
        self.whole_cols = whole_cols
        self.group = 0
        self.profile: Profile | None = None
        self.rewarm_from: int | None = None
        self.ran_outside = self.ran_without_grad = False
        self.ran = False
        """A graph or a module used the weight with gradients on, since the slot began."""
        self.learned = False
        """A step found a gradient on S, since the slot began."""
        self.part_looks = 0
        """Uses by a part of the model called by itself that have compared S with W."""
        self.pending: tuple[Tensor, Tensor] | None = None
        """Where S is moving to: rows and cols, until every part of the move is done."""
        self.visits: tuple[Tensor, Tensor] | None = None
        """How many subnets each row and each column was in before the present one, int64: importance "visits"."""
        self.means: Means | None = None
        """Of S.grad^2 by rows and columns, of S's dtype: carry_moments."""
        self.label_counts: Tensor | None = None
        """Of the head: how often each row was a label in the steps that have counted, (out,) int64."""
        self.agreement: _Agreement | None = None
        """What knows whether S and W agree (agreement.agreement_of); None of a copy without a controller."""
        self.ahead, self.at_copy = False, cast("list[float] | None", None)
        """Of a copy not used yet: S was newer than W when it was made, and some of S then."""
        self.writer = BlockWriter()
        self.hooks: list[RemovableHandle] = []
        self.base: BaseHistory | None = None
        self.shards: Shards | None = None
        """Under FSDP2: what this process has of W and S."""
        self.shape = tuple(self.weight.shape)
        """Of W."""
        out_features, in_features = self.shape[-2:]
        factor = config.output_rank_factor if whole_cols else config.rank_factor
        self.size = (subnet_size(factor, out_features), in_features if whole_cols else subnet_size(factor, in_features))
        self.packed = PackedWeight.asked_for(config, self.shape, whole_cols)
        """W in 8 bits, where its frozen products are computed so; None elsewhere."""
        self._enlist()
        registry.place(self.weight, self)

    def _enlist(self) -> None:
        # On the CPU, whatever torch.set_default_device says: the host reads it in every graph.
        self.number = registry.enter(self)
        self.handle = torch.tensor([self.number], device="cpu")

    # -- the tensors, always read from the module: .to() and load_state_dict may replace them ---------------------

    @property
    def weight(self) -> nn.Parameter:
        return self._parameter(self.parameter)

    @property
    def values(self) -> nn.Parameter:
        return self._parameter(self.values_name)

    def held(self, key: str) -> nn.Parameter | None:
        """The parameter of the owner that optimizers and checkpoints know; None where there is none."""
        if self.shards is not None:
            return self.shards.held(key)
        return cast("nn.Parameter | None", self.owner.__dict__.get("_parameters", {}).get(key))

    def _parameter(self, key: str) -> nn.Parameter:
        parameter = self.owner._parameters.get(key) if self.shards is None else self.shards.held(key)
        if parameter is None:
            raise StateError(
                f"{self.name}: {key} is no parameter of its module any more: pruning, weight norm or another "
                "parametrization took its place. Call losia_fx.restore(model) before such a change, and transform "
                "again after it"
            )
        return parameter

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` is W."""
        return self.owner.__dict__.get("_parameters", {}).get(self.parameter) is weight

    @property
    def values_in_use(self) -> nn.Parameter:
        """S as graphs take it: under FSDP2, in a forward or backward, whole."""
        values = self.owner._parameters[self.values_name]
        assert values is not None
        return values

    @property
    def stored(self) -> QuantisedWeight | None:
        """W, where that is kept in 8 bits alone."""
        weight = self.held(self.parameter) if self.packed is not None and self.packed.instead else None
        return weight if isinstance(weight, QuantisedWeight) else None

    @property
    def weight_here(self) -> Tensor:
        """W as far as this process has it: all of it, but under FSDP2 its rows."""
        return self.weight if self.shards is None else local(self.weight)

    @property
    def values_here(self) -> Tensor:
        """S as far as this process has it."""
        return self.values if self.shards is None else local(self.values)

    @property
    def portion(self) -> slice:
        """Of S's first dimension, what this process has."""
        return slice(None) if self.shards is None else self.shards.values_portion.inside

    def here(self, block: Tensor) -> Tensor:
        """Of a tensor of S's shape what lies where S does."""
        return block if self.shards is None else block[self.portion]

    @property
    def registered(self) -> bool:
        """Whether the owner has the subnet: that of a copy which is still being made has no parameters yet."""
        return self.values_name in self.owner.__dict__.get("_parameters", {})

    @property
    def rows(self) -> Tensor:
        buffer = self.owner._buffers[self.rows_name]
        assert buffer is not None
        return buffer

    @property
    def cols(self) -> Tensor:
        buffer = self.owner._buffers[self.cols_name]
        assert buffer is not None
        return buffer

    def written(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """W, rows, picked cols and S: what a write-back takes."""
        parameters, buffers = self.owner._parameters, self.owner._buffers
        cols = None if self.whole_cols else buffers[self.cols_name]
        found = (parameters[self.parameter], buffers[self.rows_name], cols, parameters[self.values_name])
        return cast("tuple[Tensor, Tensor, Tensor | None, Tensor]", found)

    @property
    def facts(self) -> SubnetFacts:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return SubnetFacts(self.name, tuple(self.weight.shape), *self.size, self.whole_cols, dtype, self.products)

    @property
    def products(self) -> str | None:
        """What the frozen products are computed in; None for what the model does."""
        return None if self.packed is None else self.packed.kind

    @property
    def whole(self) -> bool:
        """Whether the owner has W, S, rows and cols: not where they have been taken off in part."""
        parameters, buffers = self.owner._parameters, self.owner._buffers
        there = (parameters.get(self.parameter), parameters.get(self.values_name))
        places = (buffers.get(self.rows_name), buffers.get(self.cols_name))
        return all(tensor is not None for tensor in (*there, *places))

    def inputs(self) -> tuple[Tensor, ...]:
        """What a rewritten graph takes for this weight: S, rows and (unless every column learns) cols."""
        values, rows = self.values_in_use, self.rows
        return (values, rows) if self.whole_cols else (values, rows, self.cols)

    def packed_inputs(self) -> tuple[Tensor, Tensor]:
        """W in 8 bits and its scales, as W is now."""
        assert self.packed is not None
        return self.packed.of(self.weight, self.name)

    @property
    def picked_cols(self) -> Tensor | None:
        """cols, or None where every column learns."""
        return None if self.whole_cols else self.cols

    # -- birth and death ------------------------------------------------------------------------------------------

    def register(self, rows: Tensor, cols: Tensor) -> None:
        """Puts S, rows and cols onto the owner module. rows (r,) or (E, r) and cols (c,) or (E, c), sorted int64."""
        weight = self.weight
        rows, cols = rows.to(weight.device), cols.to(weight.device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        values = nn.Parameter(gather(weight.detach(), rows, None if self.whole_cols else cols).to(dtype))
        self.owner.register_parameter(self.values_name, values)
        self.owner.register_buffer(self.rows_name, rows, persistent=False)
        self.owner.register_buffer(self.cols_name, cols, persistent=False)
        self.owner.__dict__.setdefault(ATTRIBUTE, {})[self.parameter] = self

    def unregister(self) -> None:
        self.owner._parameters.pop(self.values_name, None)
        for buffer in (self.rows_name, self.cols_name):
            self.owner._buffers.pop(buffer, None)
            self.owner._non_persistent_buffers_set.discard(buffer)
        states = self.owner.__dict__.get(ATTRIBUTE, {})
        states.pop(self.parameter, None)
        if not states:
            self.owner.__dict__.pop(ATTRIBUTE, None)
        for hook in self.hooks:
            hook.remove()
        self.writer, self.packed = BlockWriter(), None
        registry.leave(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("number", "handle", "agreement", "writer")}
        if self.agreement is not None:  # else a copy itself, that nobody has used
            kept |= {"ahead": self.agreement.is_ahead(self), "at_copy": numbers_of_some(self.values)}
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's owner module may not have its parameters yet: it is entered under its weight when first asked for.
        self.__dict__.update(state)
        self.agreement, self.writer = None, BlockWriter()
        self._enlist()
        registry.COPIES.add(self)

    # -- localization ---------------------------------------------------------------------------------------------

    @property
    def profiling(self) -> bool:
        return self.profile is not None

    def begin_use(self) -> None:
        assert self.profile is not None
        if self.shards is None:
            self.profile.begin_use(self.values.grad)
        else:
            self.shards.begin_use(self.profile)

    def accumulate(self, grad: Tensor, expert: int | Tensor | None, owned: bool) -> None:
        profile = self.profile
        assert profile is not None
        if self.shards is not None:
            profile.unreduced = profile = profile.unreduced or Profile()
        profile.accumulate(self.weight, grad, expert, owned)

    @torch.no_grad()
    def take_gradient(self, grad: Tensor) -> None:
        """Adds a gradient of all of W: its block to S.grad, and the whole to G while the subnet is being profiled.
        A subnet that was told not to learn takes none."""
        values = self.values_in_use
        if not values.requires_grad:
            return
        if self.profiling:
            self.begin_use()
            self.accumulate(grad, None, owned=False)
        block = self.block_of(grad).to(values.dtype)
        values.grad = block if values.grad is None else values.grad.add_(block)

    # -- the subnet moves -----------------------------------------------------------------------------------------

    def write_back(self) -> None:
        """W[rows, cols] = S. To be called with gradients off."""
        if (stored := self.stored) is not None:
            stored.write(self.rows, self.cols, self.values)
        else:
            self.writer.write(*self.written())

    @torch.no_grad()
    def move_to(self, rows: Tensor, cols: Tensor) -> None:
        """Makes rows and cols the subnet's, in place: graphs and optimizers keep their tensors. May be done again."""
        self.rows.copy_(rows)
        self.cols.copy_(cols)
        self.values_here.copy_(self.here(self.block()))

    def block(self) -> Tensor:
        """W[rows][:, cols], a copy: in W's dtype, of a W in 8 bits in float32; under FSDP2 of all ranks."""
        if (stored := self.stored) is not None:
            return stored.block(self.rows, self.cols)
        return self.block_of(self.weight) if self.shards is None else self.shards.block()

    def as_held(self, values: Tensor) -> Tensor:
        """``values``, of S's shape or of the part of it here, as W can hold them: what ``block`` gives of them."""
        stored = self.stored
        return values.to(self.weight.dtype) if stored is None else stored.held(values, self.rows)

    def block_of(self, full: Tensor) -> Tensor:
        """full[rows][:, cols] of a tensor of W's shape, a copy."""
        return gather(full, self.rows, self.picked_cols)

    @torch.no_grad()
    def reload(self) -> None:
        """After weights were loaded: S = W[rows][:, cols], but kept where it already rounds to it.

        So the order of loading weights and LoSiA state does not matter, and S keeps the bits that W cannot hold.
        """
        registry.place(self.weight, self)
        self.gather_anew()
        if self.base is not None:
            self.base.loaded(self.weight)

    @torch.no_grad()
    def gather_anew(self) -> None:
        """S = W[rows][:, cols], where it does not round to it already."""
        found, values = self.here(self.block()), self.values_here
        values.copy_(torch.where(self.as_held(values) == found, values, found.to(values.dtype)))


def own_states(module: nn.Module) -> dict[str, SubnetState]:
    """The states of the weights that ``module`` itself holds, by the weight's name within it."""
    states: dict[str, SubnetState] = module.__dict__.get(ATTRIBUTE, {})
    return states


def states_of(module: nn.Module) -> list[SubnetState]:
    """The states of all subnets in ``module``, in the order of its modules."""
    return [state for owner in module.modules() for state in own_states(owner).values()]


def find(weight: Tensor) -> SubnetState | None:
    """registry.find: what is entered there is a SubnetState."""
    return cast("SubnetState | None", registry.find(weight))


def resolve(weight: Tensor) -> SubnetState | None:
    """registry.resolve: what is entered there is a SubnetState."""
    return cast("SubnetState | None", registry.resolve(weight))
