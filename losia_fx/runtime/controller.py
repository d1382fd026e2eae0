"""Controller: what follows one model's training, as its user sees it; and where a model's controller is found.

The state is a TrainState, and what is done with it stands in files of their own (see train_state.py). ``transform``
makes the Controller; from then on step_hooks.py hears of every optimizer step, and those of the model's subnets go
through step.py.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from losia_fx import registry
from losia_fx._compat import compiled_call
from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaError, StateError, Torn
from losia_fx.method.schedule import profiled_groups
from losia_fx.model.blocks import plain_name

from . import look, owners, slot, snapshot, step, step_hooks
from .bases import Bases
from .module_calls import watch
from .ranks import Ranks
from .sharded_agreement import AnyAgreement
from .state import SubnetState, states_of
from .train_state import Event, Progress, TrainState

log = logging.getLogger("losia_fx")

CONTROLLER = "_losia_controller"
"""Attribute of a model's root module: its Controller."""


@dataclass(frozen=True)
class Role:
    """What is planned for a parameter."""

    trained: str
    """"subnet", "full" or "frozen"."""
    why: str
    kind: str | None
    """Of linear weight (losia_fx.model.kinds.kind_of)."""


class Controller:
    """The schedule of one model's subnets.

    step: optimizer steps completed. groups: weight names by group, the head first. active: the group being profiled,
    or None. history: the re-selections so far, an event a group, or one for all of them with schedule="all". left_out:
    profiled weight-steps whose gradient could not be used.
    """

    def __init__(self, root: nn.Module, config: LosiaConfig, by_string: bool = False) -> None:
        progress = Progress(torch.Generator().manual_seed(config.seed))
        bases = Bases() if config.track_delta else None
        self.train = TrainState(root, config, by_string, progress, bases=bases)
        self.roles: dict[str, Role] = {}
        """By parameter name, as planned."""
        root.__dict__[CONTROLLER] = self
        self._follow()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow()

    def _follow(self) -> None:
        step_hooks.follow()
        registry.TRAINED.add(self.train)
        registry.changed()

    def leave(self) -> None:
        """Lets go of the model: no step is followed any more."""
        registry.TRAINED.discard(self.train)
        registry.changed()
        self.train.watches.remove()
        self.train.states, self.train.groups = [], []
        self.root.__dict__.pop(CONTROLLER, None)

    # -- what there is to see -------------------------------------------------------------------------------------

    @property
    def root(self) -> nn.Module:
        return self.train.root

    @property
    def config(self) -> LosiaConfig:
        return self.train.config

    @property
    def step(self) -> int:
        return self.train.progress.step

    @step.setter
    def step(self, step: int) -> None:
        self.train.progress.step = step

    @property
    def history(self) -> list[Event]:
        return self.train.progress.history

    @property
    def left_out(self) -> int:
        return self.train.progress.left_out

    @property
    def states(self) -> list[SubnetState]:
        return self.train.states

    @property
    def groups(self) -> list[list[str]]:
        return self.train.groups

    @property
    def active(self) -> int | None:
        """The group being profiled; None where none is, or (sync) where all are."""
        groups = profiled_groups(self.config, len(self.groups), self.step, self.train.head)
        return groups[0] if len(groups) == 1 else None

    @property
    def bases(self) -> Bases | None:
        """What the weights were before training; None where that is not tracked (LosiaConfig.track_delta)."""
        return self.train.bases

    @bases.setter
    def bases(self, bases: Bases | None) -> None:
        self.train.bases = bases

    @property
    def sharded(self) -> bool:
        """Whether fully_shard has cut the model over processes: its state is put together by all of them."""
        look.take_in(self.train)
        return self.train.sharded

    @property
    def agreement(self) -> AnyAgreement:
        return self.train.agreement

    @property
    def ranks(self) -> Ranks:
        return self.train.ranks

    def members(self, group: int) -> list[SubnetState]:
        return self.train.members(group)

    def required_before(self) -> list[tuple[nn.Parameter, bool]]:
        """Every parameter with the requires_grad that it had before the transformation."""
        now = {plain_name(name): parameter for name, parameter in self.root.named_parameters()}
        return [
            *self.train.required_grad.values(),
            *((now[name], b) for name, (_, b) in self.train.required_grad.items() if name in now),
        ]

    # -- subnets come and move ------------------------------------------------------------------------------------

    def set_groups(self, states: list[SubnetState], groups: list[list[str]]) -> None:
        """Takes over the subnets of the model, named by group, and opens the slot under way."""
        self.train.set_groups(states, groups)
        slot.open_slot(self.train)

    def watch(self, names: Iterable[str]) -> None:
        """Has the modules of these names, and those right around them, look after weights that no graph runs."""
        modules = {plain_name(name): found for name, found in self.root.named_modules(remove_duplicate=False)}
        holders = [modules[name] for name in names]
        parents = [modules[name.rpartition(".")[0]] for name in names if name]
        fresh = [[m for m in dict.fromkeys(some) if self._is_to_watch(m)] for some in (holders, parents)]
        self.train.watches.add(watch(*fresh))

    def _is_to_watch(self, module: nn.Module) -> bool:
        """The root sees to itself, and so does what backend="losia" compiles in place."""
        compiled = self.train.by_string and compiled_call(module) is not None
        return module is not self.root and module not in self.train.watches and not compiled

    def select(self, group: int) -> Event:
        """Re-selects the subnets of ``group`` now, from the importance gathered so far (or at random, if so set).

        rows and cols are changed in place, S is gathered anew, its optimizer state starts afresh and its learning rate
        is rewarmed. Raises LosiaError for a group that does not exist or has not been profiled.
        """
        if not 0 <= group < len(self.groups):
            raise LosiaError(f"group {group} does not exist: there are {len(self.groups)}, counted from 0")
        self.check_tree()
        self.look()
        if not self.train.optimizers.known:  # before the first step
            found, _ = owners.meet_all(self.train)
            self.train.optimizers.known.update(found)
        event = slot.reselect(self.train, (group,), group)
        if event is None:
            raise LosiaError(f"group {group} is not being profiled, or no step yet: there is nothing to select by")
        return self.history[-1]  # of one that was drawn the share that moved has not been read yet

    def made_by_hand(self) -> None:
        """A step that no optimizer made: S has been moved, and its gradient is still there."""
        step.by_hand(self.train)

    # -- before a use ---------------------------------------------------------------------------------------------

    def look(self, learns: bool | None = None, shown: bool = False) -> None:
        """Before any use of the model: whatever moved S or W since the last one, they agree afterwards (look.py)."""
        look.look(self.train, learns, shown)

    def check_tree(self) -> None:
        """Raises StateError where the model is not built any more as it was transformed."""
        self.train.check_tree()

    def check_weights(self) -> None:
        """Raises StateError where the model's weights are not those that the loaded state belongs to."""
        look.check_weights(self.train)

    def settle_last(self) -> None:
        """As ``look``, before the subnets are taken off; of weights that are gone nothing is to settle."""
        if not all(state.whole for state in self.states):
            return  # a restore that failed goes on
        try:
            self.look(shown=True)
        except Torn:
            raise
        except StateError:
            log.info("losia_fx: some weights were replaced since losia_fx.transform: they stay as they are")

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As losia_fx.state_dict(model); accelerator.register_for_checkpointing(controller) takes it from here."""
        self.look(shown=True)
        return snapshot.collect(self.train)

    def sharded_state_dict(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """As losia_fx.state_dict(model, sharded=True); with ``names`` of entries, what takes in those."""
        if names is not None:
            look.take_in(self.train)
            return snapshot.empty(self.train, names)
        self.look(shown=True)
        return snapshot.collect_cut(self.train)

    @torch.inference_mode(False)  # what is kept of it is written to in training
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As losia_fx.load_state_dict(model, state)."""
        look.take_in(self.train)
        state = snapshot.spelt_out(state)
        snapshot.check(self.train, state)
        snapshot.apply(self.train, state)


def controller_of(root: nn.Module) -> Controller | None:
    """The controller that lives on ``root`` itself."""
    found: Controller | None = root.__dict__.get(CONTROLLER)
    return found


def find_controller(model: nn.Module) -> Controller | None:
    """The controller of ``model``, of a model that it wraps, or of a model that it is a part of."""
    for module in model.modules():
        if (found := controller_of(module)) is not None:
            return found
    states = set(states_of(model))
    around = next((train for train in list(registry.TRAINED) if states.intersection(train.states)), None)
    return None if around is None else controller_of(around.root)
