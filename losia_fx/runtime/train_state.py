"""TrainState: everything that changes about one transformed model while it trains, as plain data.

What is done with it stands elsewhere, a file an idea: look.py (S and W agree), step.py (around an optimizer's step),
measure.py (importance), slot.py (the end of a slot), owners.py (whose steps t waits for), snapshot.py (as a dict, and
back). controller.py drives them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losia_fx import registry
from losia_fx.config import LosiaConfig
from losia_fx.errors import Swapped
from losia_fx.method.fit import Fit
from losia_fx.method.transfers import numbers_of

from .agreement import Agreement
from .bases import Bases
from .kept_by_place import LeftPlaces
from .module_tree import ModuleTree
from .ranks import Ranks
from .sharded_agreement import AnyAgreement, ShardedAgreement
from .state import SubnetState
from .vigilance import FIRST_LOOKS, Vigilance
from .watch import Watches
from .write_back import WriteBack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch

UNREAD = 1000


@dataclass(frozen=True)
class Event:
    """A re-selection."""

    step: int
    """Optimizer steps completed when it happened."""
    group: int | None
    """None where all re-selected at once (schedule="all")."""
    moved: float
    """Share of the elements of these subnets that are new, 0 to 1."""
    captured: float | None
    """Share of the whole score that the new subnets hold, 0 to 1; None where nothing was scored."""


@dataclass
class Progress:
    """How far training has come: with the subnets, what a checkpoint holds."""

    generator: torch.Generator
    step: int = 0
    """t, the optimizer steps completed."""
    left_out: int = 0
    """Profiled weight-steps whose gradient could not be used."""
    events: list[Event] = field(default_factory=list)
    """The re-selections so far; ``history`` is the way to read them."""
    stepped: set[SubnetState] = field(default_factory=set)
    """Subnets that an optimizer has stepped, and another's have not been yet: the step is not complete."""
    selecting: list[int] = field(default_factory=list)
    """Groups whose slot has ended and that have not moved yet."""
    unread: list[Tensor] = field(default_factory=list)
    """Of the last events, the share that moved, 0-dim, where the host has not waited for it yet."""

    @property
    def history(self) -> list[Event]:
        """The re-selections so far. Waits for the device where it has not been asked for the last ones yet."""
        if self.unread:
            shares = numbers_of([share.view(1) for share in self.unread])
            for at, (share,) in enumerate(shares, len(self.events) - len(shares)):
                self.events[at] = replace(self.events[at], moved=share)
            self.unread.clear()
        return self.events

    def record(self, event: Event, moved: Tensor | None = None) -> Event:
        """moved: of the event, on its device, to be read when somebody asks; once in UNREAD events at the latest."""
        if moved is None or len(self.unread) == UNREAD:
            self.history  # noqa: B018  # reads those before
        if moved is not None:
            self.unread.append(moved)
        self.events.append(event)
        return event

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: between steps."""
        plain = {"step": self.step, "left_out": self.left_out, "events": self.history}
        # As bytes: the memory of a tensor that is made here is gone when a spawned process asks for it.
        return {**plain, "generator": bytes(self.generator.get_state().tolist())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(torch.tensor(list(state["generator"]), dtype=torch.uint8, device="cpu"))
        self.__init__(**{**state, "generator": generator})  # type: ignore[misc]


@dataclass
class Optimizers:
    """Those that step subnets of the model."""

    waited_for: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    """Whose steps t waits for: the optimizers that have stepped subnets lately. (One inside another steps with it.)"""
    of_last_step: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    of_this_step: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    """Those that have stepped since t counted last."""
    known: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    """Every optimizer that has been found to hold subnets: their state starts anew where a subnet moves."""
    beside: int = 0
    """Steps of other parameters of the model since a subnet of it was stepped."""
    states: weakref.WeakKeyDictionary[Optimizer, Any] = field(default_factory=weakref.WeakKeyDictionary)
    """Each one's state at its last step, itself: loading another makes a new one."""


@dataclass
class Pending:
    """What a step has begun and not ended yet; whatever cuts in, it tells the next use of the model what is left."""

    open: set[SubnetState] = field(default_factory=set)
    """Subnets that an optimizer is stepping: S may be ahead of W, whatever versions say."""
    before: dict[SubnetState, tuple[Tensor, int]] = field(default_factory=dict)
    """S before the step, and the version of W then, where either is needed after it."""
    fits: dict[SubnetState, Fit | None] = field(default_factory=dict)
    labels: Tensor | None = None
    """How often each row of the head was a label since t counted last, (out,) int64: head_rows="frequent"."""
    around: weakref.ref[Any] | None = None
    """What called the last step, if that is no Optimizer itself."""
    rest_to_come: bool = False
    """What called the last step goes on writing to S after it."""
    moving: bool = False
    """Some subnet is on its way to another place."""

    def forget_step(self) -> None:
        self.before.clear()
        self.fits.clear()


def refuse_swapped(states: Iterable[SubnetState]) -> None:
    """Raises Swapped where tensors stand in the place of parameters."""
    held = ((state.owner._parameters, (state.parameter, state.values_name)) for state in states)
    if not all(isinstance(parameters.get(key), (nn.Parameter, NoneType)) for parameters, keys in held for key in keys):
        raise Swapped("tensors stand in the place of parameters (torch.func.functional_call): call the model itself")


@dataclass(eq=False)
class TrainState:
    """A transformed model in training: its subnets by group, how far it is, and what is under way."""

    root: nn.Module
    config: LosiaConfig
    by_string: bool
    """Made by backend="losia" alone."""
    progress: Progress
    states: list[SubnetState] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    """Weight names by group, the head first."""
    bases: Bases | None = None
    """What the weights were before training; None where that is not tracked."""
    watches: Watches = field(default_factory=Watches)
    required_grad: dict[str, tuple[nn.Parameter, bool]] = field(default_factory=dict)
    """Every parameter, by name, and its requires_grad before the transformation."""
    copied_from: int | None = None
    """Number of the TrainState that this one was copied from."""

    def __post_init__(self) -> None:
        """What is not carried over to a copy."""
        self.number = registry.number(self)
        self.lock = threading.RLock()
        """Whoever sees to S and W: one thread may evaluate or save while another trains."""
        self.ranks = Ranks()
        self.optimizers = Optimizers()
        self.pending = Pending()
        self.write_back = WriteBack(self.compiles)
        self.vigilance = Vigilance()
        self.left = LeftPlaces()
        self.told: set[str] = set()
        """Of notices.py, what has been said once."""
        self.resumed = False
        """A LoSiA state was loaded."""
        self.put_back = False
        """It was since t counted last."""
        self.idle_groups: set[int] = set()
        """Of which nothing had a gradient before that was last looked at."""
        self.copies_moved = False
        """A copy of this model was trained, and its subnets have moved."""
        self.unsaid: set[SubnetState] = set()
        """Whose S was found written by a use that neither shows nor trains it: what the next one does decides what
        there is to say."""
        self.idle = True
        """Nothing has trained these subnets since the model was made or copied: what S says comes from W alone."""
        self.by_hand: dict[SubnetState, Tensor] = {}
        """S at the end of a step that was made by hand, where the next one is rewarmed."""
        self._agreement: AnyAgreement | None = None
        self._tree: ModuleTree | None = None

    def __getstate__(self) -> tuple[dict[str, Any], list[SubnetState]]:
        """Of a copy: nothing of the step under way, nor of optimizers."""
        names = ("root", "config", "by_string", "progress", "states", "groups", "bases", "watches", "required_grad")
        return {**{name: getattr(self, name) for name in names}, "copied_from": self.number}, list(self.unsaid)

    def __setstate__(self, state: tuple[dict[str, Any], list[SubnetState]]) -> None:
        fields, unsaid = state
        self.__init__(**fields)  # type: ignore[misc]
        self.unsaid.update(unsaid)
        registry.COPIES.difference_update(self.states)

    @property
    def agreement(self) -> AnyAgreement:
        """Of a copy made when first asked for: its modules have no parameters yet when its state is made."""
        if self._agreement is None:
            refuse_swapped(self.states)  # torch.func.functional_call of a copy that was never used
            self._agreement = Agreement(self.states)
            self._agreement.averaged = self.copied_from is not None
            self.unsaid.update(self._agreement.behind)
        return self._agreement

    def remember_base(self, optimizer: Optimizer, mine: Sequence[SubnetState]) -> None:
        """Where bases are tracked: keeps what ``optimizer``, whose subnets are ``mine``, is about to change."""
        if self.bases is not None:
            self.bases.before_step(self.root, optimizer, self.states, mine)

    def set_groups(self, states: list[SubnetState], groups: list[list[str]]) -> None:
        """Takes over the subnets of the model, named by group. S and W agree as they are now."""
        self.states, self.groups = states, groups
        number = {name: index for index, names in enumerate(groups) for name in names}
        for state in states:
            state.group = number[state.name]
        self._agreement, self._tree = Agreement(states), None
        self.vigilance.first_looks = FIRST_LOOKS

    def follow_shards(self, agreement: ShardedAgreement, groups: Sequence[ProcessGroup]) -> None:
        """FSDP2 has sharded the model over the ranks of these groups: what was whole may go."""
        self._agreement = agreement
        self.required_grad.clear()
        self.ranks.shard(self.states, self.progress.generator, groups)

    def members(self, group: int) -> list[SubnetState]:
        return [state for state in self.states if state.group == group]

    @property
    def sharded(self) -> bool:
        """Whether fully_shard has cut the model over processes, and that has been taken in."""
        return bool(self.states) and self.states[0].shards is not None

    @property
    def head(self) -> int | None:
        """The group of the output head; None where none learns."""
        return next((state.group for state in self.states if state.whole_cols), None)

    def others(self) -> Iterable[nn.Parameter]:
        """The parameters that have no subnet and are none."""
        known = {id(p) for s in self.states for p in (s.owner._parameters.get(n) for n in (s.parameter, s.values_name))}
        return (parameter for parameter in self.root.parameters() if id(parameter) not in known)

    def check_tree(self) -> None:
        """Raises StateError where the model is not built any more as it was transformed."""
        if self._tree is None:
            self._tree = ModuleTree(self.root, self.states)
        self._tree.check()

    @property
    def compiles(self) -> bool:
        """Whether passes over whole weights around a step are compiled."""
        return self.config.compiler == "inductor"
