"""Controller: follows the optimizers through torch's global step hooks, and is the only writer of training state.

An optimizer step is: keep S of a rewarming group -> (the step) -> importance from G and the W of before -> rewarm ->
W[rows, cols] = S -> count -> at the end of a slot re-select and go on to the next group.
"""

from __future__ import annotations

import itertools
import logging
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from . import snapshot
from .attach import RAN_BLIND, RAN_OUTSIDE, watch
from .base_history import FullBases, keep_places, remember_base
from .blocks import plain_name
from .config import LosiaConfig
from .errors import LosiaError, LosiaWarning, OptimizerError, StateError, listed
from .host import numbers_of
from .kernels import update_importance, write_back
from .localize import (
    Fit,
    Selection,
    fit_from,
    measure_fit,
    score_of,
    select_experts,
    select_rows,
    select_subnet,
    share_moved,
)
from .optimizers import (
    adopt_subnets,
    follow_optimizers,
    found_inf,
    grad_scale,
    has_stepped,
    live_optimizers,
    owned_states,
    restart_state,
    weights_without_subnet,
)
from .schedule import ends_slot, profiled_groups, rewarm_factor, slot_groups
from .state import COPIES, Profile, SubnetState, states_of
from .taps import drop_taps

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

log = logging.getLogger("losia_fx")

CONTROLLER = "_losia_controller"
"""Attribute of a model's root module: its Controller."""

CONTROLLERS: weakref.WeakSet[Controller] = weakref.WeakSet()


@dataclass(frozen=True)
class Event:
    """A re-selection."""

    step: int
    """Optimizer steps completed when it happened."""
    group: int
    moved: float
    """Share of the group's subnet elements that are new, 0 to 1."""
    captured: float | None
    """Share of the group's whole score that the new subnets hold, 0 to 1; None where nothing was scored."""


@dataclass(frozen=True)
class Role:
    """What is planned for a parameter."""

    trained: str
    """"subnet", "full" or "frozen"."""
    why: str
    kind: str | None
    """Of linear weight (losia_fx.weights.kind_of)."""


class Choice(NamedTuple):
    """A selection, the sum of the whole score that it was made by, and the share of S that moves: 0-dim float32."""

    selection: Selection
    total: Tensor
    moved: Tensor


class Controller:
    """The schedule of one model's subnets.

    step: optimizer steps completed. groups: weight names by group, the head first. active: the group being profiled,
    or None. history: the re-selections so far. left_out: profiled weight-steps whose gradient could not be used.
    """

    def __init__(self, root: nn.Module, config: LosiaConfig, by_string: bool = False) -> None:
        self.root, self.config, self.by_string = root, config, by_string
        self.required_grad: dict[str, bool] = {}
        """requires_grad of every parameter before the transformation."""
        self.roles: dict[str, Role] = {}
        """By parameter name, as planned."""
        root.__dict__[CONTROLLER] = self
        self.step = 0
        self.history: list[Event] = []
        self.left_out = 0
        self.full = FullBases()
        self.states: list[SubnetState] = []
        self.groups: list[list[str]] = []
        self.generator = torch.Generator().manual_seed(config.seed)
        self.hooks: list[RemovableHandle] = []
        self._watched: tuple[set[nn.Module], set[nn.Module]] = (set(), set())
        self.ranks: ProcessGroup | None = None
        """The processes over which DistributedDataParallel averages S.grad: G must be averaged over the same."""
        self._loaded = False
        """A state came in, and no step has been taken from it yet."""
        self._forget_step()
        self._enlist()

    def _enlist(self) -> None:
        follow_optimizers(before_step, after_step)
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        CONTROLLERS.add(self)

    def _forget_step(self) -> None:
        self._stepped: set[SubnetState] = set()
        self._before: dict[SubnetState, Tensor] = {}
        self._fits: dict[SubnetState, Fit | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        gone = ("_optimizers", "_stepped", "_before", "_fits", "generator", "ranks")
        kept = {key: value for key, value in self.__dict__.items() if key not in gone}
        return {**kept, "generator": self.generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generator = torch.Generator()
        self.generator.set_state(state["generator"])
        self.ranks = None
        COPIES.difference_update(self.states)
        self._forget_step()
        self._enlist()

    def leave(self) -> None:
        """Lets go of the model: no step is followed any more."""
        CONTROLLERS.discard(self)
        for hook in self.hooks:
            hook.remove()
        self.states, self.groups = [], []
        self.root.__dict__.pop(CONTROLLER, None)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As losia_fx.state_dict(model); accelerator.register_for_checkpointing(controller) takes it from here."""
        return snapshot.collect(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As losia_fx.load_state_dict(model, state)."""
        snapshot.check(self, state)
        snapshot.apply(self, state)

    def resume(self, step: int, left_out: int, history: Sequence[Sequence[Any]], stepped: set[SubnetState]) -> None:
        """Goes on from ``step``; the subnets have been brought back already."""
        self.step, self.left_out = step, left_out
        self.history = [Event(*event) for event in history]
        self._forget_step()
        self._stepped = stepped
        self._loaded = True

    @property
    def stepped(self) -> frozenset[SubnetState]:
        """Subnets that an optimizer has stepped, and another's have not been yet: the step is not complete."""
        return frozenset(self._stepped)

    def check_weights(self) -> None:
        """Raises StateError where the model's weights are not those that the loaded state belongs to."""
        if strays := snapshot.strays(self.states):
            raise StateError(
                f"{listed(strays)}: the weights do not hold the subnets of the LoSiA state that was loaded. Load the "
                "model's weights of the same checkpoint as well (in either order)"
            )

    # -- what the schedule says -----------------------------------------------------------------------------------

    def set_groups(self, states: list[SubnetState], groups: list[list[str]]) -> None:
        """Takes over the subnets of the model, named by group, and opens the slot under way."""
        self.states, self.groups = states, groups
        number = {name: index for index, names in enumerate(groups) for name in names}
        for state in states:
            state.group = number[state.name]
        self._open_slot()

    def watch(self, names: Iterable[str]) -> None:
        """Has the modules of these names, and those right around them, look after weights that no graph runs."""
        modules = {plain_name(name): found for name, found in self.root.named_modules(remove_duplicate=False)}
        owners, around = self._watched
        new_owners = dict.fromkeys(modules[name] for name in names if modules[name] not in owners)
        parents = [modules[name.rpartition(".")[0]] for name in names if name]
        new_around = dict.fromkeys(parent for parent in parents if parent not in around)
        self.hooks += watch(new_owners, new_around)
        owners.update(new_owners)
        around.update(new_around)

    @property
    def active(self) -> int | None:
        """The group being profiled; None where none is, or (sync) where all are."""
        groups = profiled_groups(self.config, len(self.groups), self.step)
        return groups[0] if len(groups) == 1 else None

    def members(self, group: int) -> list[SubnetState]:
        return [state for state in self.states if state.group == group]

    def _open_slot(self) -> None:
        profiled = profiled_groups(self.config, len(self.groups), self.step)
        for state in self.states:
            if state.group not in profiled:
                state.profile = None
            elif state.profile is None:
                state.profile = Profile()

    # -- around an optimizer's step -------------------------------------------------------------------------------

    def before(self, optimizer: Optimizer, mine: list[SubnetState], closure: bool) -> None:
        """``mine``: this optimizer's subnets. ``closure``: the gradients are made within the step."""
        if optimizer not in self._optimizers:
            # Others may own subnets too and step after this one: t waits for all of them.
            others = [each for each in live_optimizers() if owned_states(each, self.states)]
            self._check_moments([each for each in others if each not in self._optimizers])
            self._optimizers.update(others)
        if self._loaded:
            self.check_weights()
            self._loaded = False
        for state in mine:
            if self._rewarm_share(state) < 1.0:
                self._before[state] = state.values.detach().clone()
        if not closure:
            self._fits.update(self._fit(optimizer, mine))

    def _check_moments(self, fresh: list[Optimizer]) -> None:
        """Warns of optimizers, seen for the first time, that were resumed where the subnets were not."""
        resumed = self._loaded or self.step > 0 or self.by_string  # by string, moments of W come along
        if not resumed and any(has_stepped(each, s.values) for each in fresh for s in owned_states(each, self.states)):
            warnings.warn(
                "losia_fx: the optimizer goes on from an earlier run, but the subnets do not: their places were drawn "
                "anew and the moments belong to others. Load the LoSiA state too (losia_fx.load_state_dict; for a "
                "Trainer, losia_fx.LosiaCallback)",
                LosiaWarning,
                stacklevel=2,
            )

    def after(self, optimizer: Optimizer, mine: list[SubnetState], closure: bool) -> None:
        if found_inf(optimizer):
            self._before.clear()
            self._fits.clear()
            return
        if closure:
            self._fits.update(self._fit(optimizer, mine))
        for state in mine:
            self._update_importance(state)
            self._rewarm(state)
        self._write_back(mine)
        self._stepped.update(mine)
        if self._stepped.issuperset(self._owned()):
            self._advance()

    def _owned(self) -> Iterable[SubnetState]:
        """The subnets that some live optimizer steps: t counts once all of them have been."""
        return (state for optimizer in self._optimizers for state in owned_states(optimizer, self.states))

    def _advance(self) -> None:
        last, self.step = self.step, self.step + 1
        self._forget_step()
        drop_taps(int(state.handle) for state in self.states)
        if ends_slot(self.config, last):
            for group in slot_groups(self.config, len(self.groups), last):
                if self._reselect(group) is None:
                    self._keep(group)
            for state in self.states:
                state.profile = None
        self._open_slot()

    # -- importance -----------------------------------------------------------------------------------------------

    def _fit(self, optimizer: Optimizer, mine: list[SubnetState]) -> dict[SubnetState, Fit | None]:
        """How each profiled subnet's gradient, as the optimizer sees it, follows from its G."""
        profiled = [(state, state.profile) for state in mine if state.profile is not None]
        if self.ranks is not None:
            for state, profile in profiled:
                profile.average_ranks(state.weight, self.ranks)
        pairs, found = {}, []
        for state, profile in profiled:
            seen, grad = state.values.grad, profile.grad
            if seen is None:
                continue
            if grad is None:  # S.grad outlived its G: it was not zeroed since the last step
                grad = torch.zeros_like(state.weight, dtype=torch.float32)
            pairs[state] = (seen, state.block_of(grad))
            # One pass, in G's own width; a nan anywhere is both the least and the most.
            finite = torch.isfinite(torch.stack(grad.aminmax())).all()
            found.append(torch.cat([measure_fit(*pairs[state]), finite.float().unsqueeze(0)]))
        if not found:
            return {}
        fits: dict[SubnetState, Fit | None] = {}
        unknown = {}
        for state, (*numbers, whole) in zip(pairs, numbers_of(found), strict=True):  # the device waits once
            fits[state] = fit_from(numbers) if whole else None
            if whole and fits[state] is None:
                unknown[state] = numbers
        factors = [fit.factor for fit in fits.values() if fit is not None]
        if factors and unknown:
            # A gradient that is zero throughout says nothing of the factor: its neighbours do.
            fits |= {state: fit_from(numbers, factors[0]) for state, numbers in unknown.items()}
            # Nor does one that is clipped throughout, but it has to be measured with theirs: the device waits again.
            clipped = [state for state, (_, largest, *_) in unknown.items() if largest and fits[state] is None]
            again = numbers_of([measure_fit(*pairs[state], factors[0]) for state in clipped])
            fits |= {state: fit_from(measured, factors[0]) for state, measured in zip(clipped, again, strict=True)}
        scale = grad_scale(optimizer)  # a fused optimizer unscales inside its step
        return {s: fit and Fit(fit.factor / scale, fit.limit and fit.limit / scale) for s, fit in fits.items()}

    def _update_importance(self, state: SubnetState) -> None:
        profile = state.profile
        if profile is None or state not in self._fits:
            return
        fit = self._fits.pop(state)
        grad, profile.grad = profile.grad, None
        if fit is None or grad is None:
            self.left_out += 1
            log.warning("losia_fx: step %d: %s: gradient left out of the importance", self.step, state.name)
            return
        if profile.importance is None or profile.uncertainty is None:
            profile.importance = torch.zeros_like(grad, dtype=torch.float32)
            profile.uncertainty = torch.zeros_like(grad, dtype=torch.float32)
        update_importance(
            profile.importance,
            profile.uncertainty,
            state.weight,
            grad,
            fit.factor,
            fit.limit,
            self.config.importance,
            (self.config.beta1, self.config.beta2),
            self._compiles,
        )

    @property
    def _compiles(self) -> bool:
        return self.config.compiler == "inductor"

    # -- the subnets move -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _write_back(self, states: Sequence[SubnetState]) -> None:
        """S into W, a block at a time: blocks of one kind share their compiled form."""
        for _, block in itertools.groupby(states, key=lambda state: (state.group, state.whole_cols)):
            members = list(block)
            write_back(
                [state.weight for state in members],
                [state.rows for state in members],
                [state.picked_cols for state in members],
                [state.values for state in members],
                self._compiles,
            )

    def _rewarm_share(self, state: SubnetState) -> float:
        if state.rewarm_from is None:
            return 1.0
        return rewarm_factor(self.config, self.step - state.rewarm_from + 1)

    @torch.no_grad()
    def _rewarm(self, state: SubnetState) -> None:
        before = self._before.pop(state, None)
        if before is not None:
            state.values.copy_(before + self._rewarm_share(state) * (state.values - before))
        elif state.rewarm_from is not None:
            state.rewarm_from = None

    def select(self, group: int) -> Event:
        """Re-selects the subnets of ``group`` now, from the importance gathered so far (or at random, if so set).

        S is in W already; rows and cols are changed in place, S is gathered anew, its optimizer state starts afresh and
        its learning rate is rewarmed. Raises LosiaError for a group that does not exist or has not been profiled.
        """
        if not 0 <= group < len(self.groups):
            raise LosiaError(f"group {group} does not exist: there are {len(self.groups)}, counted from 0")
        self._optimizers.update(live_optimizers())  # before the first step none is known
        event = self._reselect(group)
        if event is None:
            raise LosiaError(f"group {group} is not being profiled, or no step yet: there is nothing to select by")
        return event

    @torch.no_grad()
    def _reselect(self, group: int) -> Event | None:
        members = self.members(group)
        choices = {state: choice for state in members if (choice := self._choose(state)) is not None}
        asked = [torch.stack([c.total, c.selection.captured, c.moved]) for c in choices.values()]
        found = dict(zip(choices, numbers_of(asked), strict=True))  # the device waits once
        if self.config.importance != "random":  # what has no score stays
            found = {state: numbers for state, numbers in found.items() if numbers[0] > 0}
        if not found:
            return None
        self._move({state: choices[state].selection for state in found})
        total, inside = (sum(numbers[part] for numbers in found.values()) for part in (0, 1))
        moved = sum(numbers[2] * state.values.numel() for state, numbers in found.items())
        elements = sum(state.values.numel() for state in members)
        return self._record(Event(self.step, group, moved / elements, inside / total if total > 0 else None))

    def _choose(self, state: SubnetState) -> Choice | None:
        """None where nothing was measured. All on the device: whether there is any score is not known yet."""
        profile = state.profile
        if self.config.importance == "random":
            selection = state.random_selection(self.generator)
            total = torch.zeros_like(selection.captured)
        elif profile is None or profile.importance is None or profile.uncertainty is None:
            return None
        else:
            score = score_of(self.config.importance, profile.importance, profile.uncertainty)
            selection, total = self._select(state, score), score.sum()
        return Choice(selection, total, share_moved((state.rows, state.cols), (selection.rows, selection.cols)))

    @staticmethod
    def _select(state: SubnetState, score: Tensor) -> Selection:
        if score.dim() == 3:
            return select_experts(score, (state.rows, state.cols))
        return select_rows(score, state.size[0]) if state.whole_cols else select_subnet(score, *state.size)

    def _move(self, selections: Mapping[SubnetState, Selection]) -> None:
        keep_places({state: (selection.rows, selection.cols) for state, selection in selections.items()})
        for state, selection in selections.items():
            state.write_back()
            state.move_to(selection.rows, selection.cols)
            for optimizer in self._optimizers:
                restart_state(optimizer, state.values)
            state.rewarm_from = self.step

    def _keep(self, group: int) -> None:
        warnings.warn(
            f"losia_fx: group {group} keeps its subnets: no step of its slot gave a gradient to score by",
            LosiaWarning,
            stacklevel=2,
        )
        self._record(Event(self.step, group, 0.0, None))

    def _record(self, event: Event) -> Event:
        self.history.append(event)
        log.info("step %d: group %d re-selected, %.0f%% new", event.step, event.group, 100 * event.moved)
        return event


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
    return next((found for found in list(CONTROLLERS) if states.intersection(found.states)), None)


@torch.compiler.disable
def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Global hook before every optimizer step of the process."""
    if COPIES and (orphans := owned_states(optimizer, list(COPIES))):
        raise OptimizerError(
            f"{orphans[0].name}: its module was copied out of a transformed model, and no controller follows the copy: "
            "its subnet would train without ever reaching the weight. Copy the whole model, or restore it first"
        )
    for controller in list(CONTROLLERS):
        warn_of_weights(controller)
        mine = _checked(controller, optimizer)
        remember_base(controller, optimizer, mine)
        if mine:
            closure = _has_closure(args, kwargs)
            if not closure:
                warn_of_blind_weights(mine)
            controller.before(optimizer, mine, closure)


@torch.compiler.disable
def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Global hook after every optimizer step of the process."""
    for controller in list(CONTROLLERS):
        mine = owned_states(optimizer, controller.states)
        if mine:
            controller.after(optimizer, mine, _has_closure(args, kwargs))


def _has_closure(args: Any, kwargs: Any) -> bool:
    return any(callable(value) for value in (*args, *kwargs.values()))


def _checked(controller: Controller, optimizer: Optimizer) -> list[SubnetState]:
    """This optimizer's subnets, after a look at whether it can train them."""
    if controller.by_string:
        adopt_subnets(optimizer, controller.states)
    missing = weights_without_subnet(optimizer, controller.states)
    if missing:
        raise OptimizerError(
            f"{type(optimizer).__name__} holds {missing[0].name} and {len(missing) - 1} more transformed weights, but "
            "not their subnets, so nothing of them would learn: it was made before losia_fx.transform. Make it "
            "afterwards, from model.parameters()"
        )
    mine = owned_states(optimizer, controller.states)
    if mine and isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            "LBFGS moves the subnets several times within a step while the forward reads the dense weights: "
            "use an optimizer that updates once a step, such as AdamW"
        )
    return mine


def warn_of_weights(controller: Controller) -> None:
    """One warning for the weights that ran outside a rewritten graph since the last look."""
    ran = [state for state in controller.states if state in RAN_OUTSIDE] if RAN_OUTSIDE else []
    RAN_OUTSIDE.difference_update(ran)
    outside = [state for state in ran if not state.ran_outside]
    for state in outside:
        state.ran_outside = True
    if outside:
        warnings.warn(
            f"losia_fx: {len(outside)} weights ran outside a rewritten graph ({listed([s.name for s in outside])}); "
            "they train through their subnets all the same, but uncompiled. Usual causes: a graph break under gradient "
            "checkpointing, too many recompilations (TORCH_LOGS=graph_breaks,recompiles shows both), or calling a part "
            "of the model by itself",
            LosiaWarning,
            stacklevel=2,
        )


def warn_of_blind_weights(states: list[SubnetState]) -> None:
    """One warning for the weights that ran with gradients off within a forward, and have none."""
    blind = [state for state in states if state in RAN_BLIND and state.values.grad is None]
    RAN_BLIND.difference_update(states)
    fresh = [state for state in blind if not state.ran_blind]
    for state in fresh:
        state.ran_blind = True
    if fresh:
        warnings.warn(
            f"losia_fx: {len(fresh)} weights do not learn: {listed([s.name for s in fresh])} ran with gradients off, "
            "under no_grad or in a torch.autograd.Function none of whose inputs asks for a gradient (reversible "
            "layers). There it helps to name the input embedding in trainable; else name these weights in exclude",
            LosiaWarning,
            stacklevel=2,
        )
