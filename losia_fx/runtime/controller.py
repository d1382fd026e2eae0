"""Controller: the schedule of one model's subnets, and the only writer of its training state.

An optimizer step is: S and W agree -> (the step) -> importance from G and the W of before -> rewarm ->
W[rows, cols] = S -> count -> at the end of a slot re-select and go on to the next group. Wherever that is cut short,
the next use of the model finds what is left to do. Which steps are whose is in step_hooks.py.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losia_fx._compat import compiled_call, not_installed
from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaError, StateError, listed
from losia_fx.method.kernels import update_importance, write_back
from losia_fx.method.localize import (
    Fit,
    Selection,
    fit_from,
    fits_from,
    measure_clip,
    measure_fit,
    score_of,
    select_experts,
    select_rows,
    select_subnet,
    share_moved,
)
from losia_fx.method.schedule import ends_slot, profiled_groups, rewarm_factor, slot_groups
from losia_fx.method.subnet import scatter
from losia_fx.method.transfers import numbers_of
from losia_fx.model.blocks import plain_name
from losia_fx.ops.localization import drop_taps
from losia_fx.runtime import notices, registry, snapshot, step_hooks, steps

from .agreement import Agreement, Torn
from .attach import Watch, watch
from .bases import Bases
from .module_tree import ModuleTree
from .optimizers import (
    found_inf,
    grad_scale,
    has_stepped,
    inner_optimizers,
    live_optimizers,
    note_made_state,
    outermost,
    owned_states,
    restart_states,
)
from .ranks import Ranks
from .state import Profile, SubnetState, states_of

log = logging.getLogger("losia_fx")

CONTROLLER = "_losia_controller"
"""Attribute of a model's root module: its Controller."""

FIRST_LOOKS = 3
"""Looks at a model after a change of its weights or subnets that compare values, whatever the versions say."""
LATER_LOOKS = 16
"""One in so many forwards between which no step was seen compares values, once the first few were found right."""
UNSEEN_MOVES = 20
"""Forwards in a row, or a slot if that is shorter, that find S moved without a step: somebody else is stepping it."""


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
    """Of linear weight (losia_fx.model.kinds.kind_of)."""


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
        self.required_grad: dict[str, tuple[nn.Parameter, bool]] = {}
        """Every parameter, by name, and its requires_grad before the transformation."""
        self.roles: dict[str, Role] = {}
        """By parameter name, as planned."""
        root.__dict__[CONTROLLER] = self
        self.step = 0
        self.history: list[Event] = []
        self.left_out = 0
        self.bases = Bases() if config.track_delta else None
        """What the weights were before training; None where that is not tracked."""
        self.states: list[SubnetState] = []
        self.groups: list[list[str]] = []
        self.generator = torch.Generator().manual_seed(config.seed)
        self.watches: dict[nn.Module, Watch] = {}
        self.told: set[str] = set()
        """Of losia_fx.notices, what has been said once."""
        self.number = registry.number(self)
        self.copied_from: int | None = None
        """Number of the controller that this one was copied from."""
        self._selecting: list[int] = []
        """Groups whose slot has ended and that have not moved yet."""
        self._begin()

    def _begin(self) -> None:
        """What is not carried over to a copy."""
        self.lock = threading.RLock()
        """Whoever sees to S and W: one thread may evaluate or save while another trains."""
        self.ranks = Ranks()
        self._agreement: Agreement | None = None
        self._tree: ModuleTree | None = None
        self._owners: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Whose steps t waits for: the outermost optimizers that have stepped subnets lately."""
        self._lately: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those that made the last step."""
        self._now: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those that have stepped since t counted last."""
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Every optimizer that has been found to hold subnets: their state starts anew where a subnet moves."""
        self._resumed = False
        """A LoSiA state was loaded."""
        self._idle = True
        """Nothing has trained these subnets since the model was made or copied: what S says comes from W alone."""
        self._looks = FIRST_LOOKS
        self._learned: bool | None = None
        self._seen_step = True
        self._waits = 0
        """Forwards since the one after the last followed step."""
        self._usual_waits = 0
        """The most of them that a followed step has ended."""
        self._unseen_moves = 0
        self._modes: list[bool] = []
        """Of the optimizers, at the last step."""
        self._modes_of: dict[SubnetState, list[bool]] = {}
        """Those in which a subnet was found moved since then."""
        self._open: set[SubnetState] = set()
        """Subnets that an optimizer is stepping: S may be ahead of W, whatever versions say."""
        self._around: weakref.ref[Any] | None = None
        """What called the last step, if that is no Optimizer itself."""
        self._rest_to_come = False
        """What called the last step goes on writing to S after it."""
        self._moving = False
        """Some subnet is on its way to another place."""
        self._last: dict[SubnetState, Tensor] = {}
        """S at the end of a step that was made by hand, where the next one is rewarmed."""
        self._forget_step()
        step_hooks.follow()
        registry.CONTROLLERS.add(self)
        registry.changed()

    def _forget_step(self) -> None:
        self._stepped: set[SubnetState] = set()
        self._before: dict[SubnetState, tuple[Tensor, int]] = {}
        """S before the step, and the version of W then, where either is needed after it."""
        self._fits: dict[SubnetState, Fit | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        gone = ("generator", "ranks", "told", "lock")
        kept = {key: value for key, value in self.__dict__.items() if key not in gone and not _is_passing(key)}
        return {**kept, "generator": self.generator.get_state(), "copied_from": self.number}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generator = torch.Generator()
        self.generator.set_state(state["generator"])
        self.told, self._selecting = set(), []
        registry.COPIES.difference_update(self.states)
        self.number = registry.number(self)
        self._begin()

    def leave(self) -> None:
        """Lets go of the model: no step is followed any more."""
        registry.CONTROLLERS.discard(self)
        registry.changed()
        for watching in self.watches.values():
            watching.remove()
        self.states, self.groups = [], []
        self.root.__dict__.pop(CONTROLLER, None)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As losia_fx.state_dict(model); accelerator.register_for_checkpointing(controller) takes it from here."""
        self.look(shown=True)
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
        self._open.clear()
        self._selecting = []
        self.agreement.waiting = set(snapshot.strays(self.states))
        self.agreement.remember(places=True)
        self._resumed = True

    @property
    def stepped(self) -> frozenset[SubnetState]:
        """Subnets that an optimizer has stepped, and another's have not been yet: the step is not complete."""
        return frozenset(self._stepped)

    def check_weights(self) -> None:
        """Raises StateError where the model's weights are not those that the loaded state belongs to."""
        if self.agreement.waiting and (strays := snapshot.strays(self.agreement.waiting)):
            raise StateError(
                f"{listed([state.name for state in strays])}: the weights do not hold the subnets of the LoSiA state "
                "that was loaded. Load the model's weights of the same checkpoint as well (in either order)"
            )

    def settle_last(self) -> None:
        """As ``look``, before the subnets are taken off; of weights that are gone nothing is to settle."""
        if not all(state.whole for state in self.states):
            return  # a restore that failed goes on
        try:
            self.look()
        except Torn:
            raise
        except StateError:
            log.info("losia_fx: some weights were replaced since losia_fx.transform: they stay as they are")

    def required_before(self) -> list[tuple[nn.Parameter, bool]]:
        """Every parameter with the requires_grad that it had before the transformation."""
        now = {plain_name(name): parameter for name, parameter in self.root.named_parameters()}
        return [
            *self.required_grad.values(),
            *((now[name], b) for name, (_, b) in self.required_grad.items() if name in now),
        ]

    # -- S and W agree --------------------------------------------------------------------------------------------

    @property
    def agreement(self) -> Agreement:
        """Of a copy made when first asked for: its modules have no parameters yet when its controller is made."""
        if self._agreement is None:
            self._agreement = Agreement(self.states)
            self._agreement.averaged = self.copied_from is not None
        return self._agreement

    @torch.compiler.disable  # what an outer torch.compile breaks its graph for, it would compile frame by frame
    def look(self, learns: bool | None = None, shown: bool = False) -> None:
        """Before any use of the model: whatever moved S or W since the last one, they agree afterwards.

        learns: of a forward, whether gradients are on; None for any other use, which compares values too. shown: the
        weights are evaluated or saved. Raises StateError where S and W cannot agree.
        """
        with self.lock:
            if not steps.elsewhere(self):
                self._look(learns, shown)

    def _look(self, learns: bool | None, shown: bool) -> None:
        if self.agreement.waiting:
            self.agreement.waiting = set(snapshot.strays(self.agreement.waiting))
            if self.agreement.waiting:
                return  # the weights of the loaded state are still to come; a step would say so
            self.agreement.remember(places=True)
        self.mend()
        self._agree(self._compares(learns), bool(learns), shown or learns is False)
        if self._rest_to_come and not step_hooks.under_way(self):
            self._rest_to_come = False
            self._select_due()
        if learns is not None:
            self._learned = learns
        if learns:
            self._seen_step = False

    def _agree(self, values: bool, learns: bool, shown: bool) -> None:
        """values: whether to compare those too."""
        if moved := self.agreement.differing():
            self.note(self.agreement.settle(moved, self._idle), learns, shown)
        if values:
            self.note(self.agreement.compare(), learns, shown)

    def _compares(self, learns: bool | None) -> bool:
        """Whether a look is to compare values too: where a write that no version shows is likely, or would last."""
        if learns is None or self.agreement.vigilant or learns != self._learned:
            return True
        if self._looks:
            self._looks -= 1
            return True
        if self.agreement.shows_a_write():
            return True
        if not learns or self._seen_step:
            return False
        self._waits += 1  # a further micro-batch, as in the steps before; or a step that nobody tells us of
        unusual = self._waits - self._usual_waits
        return unusual > 0 and (unusual <= FIRST_LOOKS or unusual % LATER_LOOKS == 0)

    def note(self, written: list[SubnetState], learns: bool, shown: bool) -> None:
        """``written``: subnets whose S somebody moved outside of a followed step."""
        if not written or self._rest_to_come or step_hooks.under_way(self):
            return
        modes = self._read_modes()
        still = [state for state in written if self._modes_of.get(state, self._modes) == modes]
        self._modes_of.update(dict.fromkeys(written, modes))
        if learns:
            self._idle = False
            self._unseen_moves += 1
            if self._unseen_moves == min(UNSEEN_MOVES, self.config.period):
                notices.warn_standing(self, written)
        elif shown and still:
            notices.warn_averaged(self, still)

    def _read_modes(self) -> list[bool]:
        """Of optimizers that have one, the mode for training or evaluation (schedule-free): going from one into the
        other it is they that move S, as they should."""
        holders = [holder for each in self._known for holder in (each.__dict__, *each.param_groups)]
        if self._around is not None and (around := self._around()) is not None:
            holders.append(vars(around))
        return [holder["train_mode"] for holder in holders if "train_mode" in holder]

    def mend(self) -> None:
        """Finishes what was cut short: a step between the optimizer's part and ours, a subnet on its way."""
        if not (self._open or self._moving):
            return
        with self.lock:
            if not step_hooks.under_way(self):
                self._mend()

    def _mend(self) -> None:
        self._finish_moves(self.states)
        self._write_back(list(self._open))
        self.agreement.remember(self._open)
        self._open.clear()
        self._before.clear()
        self._fits.clear()

    def check_tree(self) -> None:
        """Raises StateError where the model is not built any more as it was transformed."""
        if self._tree is None:
            self._tree = ModuleTree(self.root, self.states)
        self._tree.check()

    def check_calls(self) -> None:
        for module in not_installed(self.watches):  # Module.compile() since then: it serves while gradients are off
            self.watches[module].before = compiled_call(module)
            self.watches[module].install()

    # -- what the schedule says -----------------------------------------------------------------------------------

    def set_groups(self, states: list[SubnetState], groups: list[list[str]]) -> None:
        """Takes over the subnets of the model, named by group, and opens the slot under way."""
        self.states, self.groups = states, groups
        number = {name: index for index, names in enumerate(groups) for name in names}
        for state in states:
            state.group = number[state.name]
        self.follow()
        self._open_slot()

    def follow(self) -> None:
        """Notes what S and W are now, and where in the model: both agree."""
        self._agreement, self._tree = Agreement(self.states), None
        self._looks = FIRST_LOOKS

    def watch(self, names: Iterable[str]) -> None:
        """Has the modules of these names, and those right around them, look after weights that no graph runs."""
        modules = {plain_name(name): found for name, found in self.root.named_modules(remove_duplicate=False)}
        owners = [modules[name] for name in names]
        parents = [modules[name.rpartition(".")[0]] for name in names if name]
        fresh = [[m for m in dict.fromkeys(some) if self._is_to_watch(m)] for some in (owners, parents)]
        self.watches.update((watching.module, watching) for watching in watch(*fresh))

    def _is_to_watch(self, module: nn.Module) -> bool:
        """The root sees to itself, and so does what backend="losia" compiles in place."""
        compiled = self.by_string and compiled_call(module) is not None
        return module is not self.root and module not in self.watches and not compiled

    @property
    def active(self) -> int | None:
        """The group being profiled; None where none is, or (sync) where all are."""
        groups = profiled_groups(self.config, len(self.groups), self.step)
        return groups[0] if len(groups) == 1 else None

    def others(self) -> Iterable[nn.Parameter]:
        """The parameters that have no subnet and are none."""
        known = {id(p) for s in self.states for p in (s.owner._parameters.get(n) for n in (s.parameter, s.values_name))}
        return (parameter for parameter in self.root.parameters() if id(parameter) not in known)

    def members(self, group: int) -> list[SubnetState]:
        return [state for state in self.states if state.group == group]

    def _open_slot(self) -> None:
        profiled = profiled_groups(self.config, len(self.groups), self.step)
        for state in self.states:
            if state.group in self._selecting:
                continue  # its score is still to be used
            if state.group not in profiled:
                state.profile = None
            elif state.profile is None:
                state.profile = Profile()

    # -- around an optimizer's step -------------------------------------------------------------------------------

    def is_rehearsal(self, optimizer: Optimizer, mine: list[SubnetState]) -> bool:
        """Whether a step only makes the optimizer's state, as torch.distributed.checkpoint has it do: no backward came
        before it, its rate is 0 and so are its gradients."""
        if any(float(group.get("lr", 1.0)) != 0.0 for group in optimizer.param_groups):
            return False
        if any(state.profile is not None and state.profile.grad is not None for state in mine):
            return False
        return all(state.values.grad is not None and not state.values.grad.any() for state in mine)

    def before(self, optimizer: Optimizer, mine: list[SubnetState], closure: bool) -> None:
        """``mine``: this optimizer's subnets, which no optimizer around it has begun. ``closure``: the gradients are
        made within the step."""
        with self.lock:
            self._before_step(optimizer, mine, closure)

    def _before_step(self, optimizer: Optimizer, mine: list[SubnetState], closure: bool) -> None:
        self.check_tree()
        self.check_calls()
        if self.agreement.waiting:
            self.check_weights()
            self.look(learns=True)
        self.mend()
        last_of_slot = ends_slot(self.config, self.step)  # where the host waits for the device anyhow
        values = last_of_slot or self.agreement.vigilant or self.agreement.shows_a_write()
        self._agree(values, learns=True, shown=False)
        if optimizer not in self._known:
            self._meet(optimizer)
        if optimizer in self._now:
            self._drop_silent_owners()
        self._owners.add(optimizer)
        for state in mine:
            state.notice_gradient()
            if state.profile is not None or state.rewarm_from is not None:
                self._before[state] = (state.values.detach().clone(), state.weight._version)
        if not closure:
            self._fits.update(self._fit([optimizer], mine))
        self._open.update(mine)

    def _meet(self, optimizer: Optimizer) -> None:
        """An optimizer that steps for the first time: it and all others that hold subnets are looked at."""
        found = [each for each in live_optimizers() if owned_states(each, self)]
        fresh = [each for each in found if each not in self._known]
        for each in fresh:
            note_made_state(each, owned_states(each, self))
        resumed = self._resumed or self.step > 0 or self.by_string  # by string, moments of W come along
        made = steps.step_of(self)
        if made is not None and made.around is not None:
            resumed = True  # what stands around the optimizer has kept state there before the step
        # What one around others keeps (slow copies, a gradient of SAM's first half) may come from before any step.
        steppers = [each for each in fresh if not inner_optimizers(each)]
        if not resumed and any(has_stepped(each, s) for each in steppers for s in owned_states(each, self)):
            notices.warn_resumed()
        if self.by_string and not self._known:
            notices.warn_lists(self.states)
        if not self._known:
            # Others may own subnets too and step after this one: t waits for all of them.
            self._owners.update(outermost(found))
        self._known.update(found)

    def _drop_silent_owners(self) -> None:
        """An optimizer steps again before t has counted: it waited for others, which have fallen out of use."""
        silent = [each for each in self._owners if each not in self._now]
        self._owners.difference_update(silent)
        self._advance(late=True)

    def after(
        self, optimizers: Sequence[Optimizer], mine: list[SubnetState], closure: bool, around: Any = None
    ) -> None:
        """optimizers: the outermost one and those that stepped within it. around: what called their step from
        one that goes on after it, unseen: nothing moves elsewhere before the next use."""
        with self.lock:
            self._rest_to_come = around is not None
            self._around = None if around is None else weakref.ref(around)
            self._after_step(optimizers, mine, closure)

    def _after_step(self, optimizers: Sequence[Optimizer], mine: list[SubnetState], closure: bool) -> None:
        if any(found_inf(each) for each in optimizers):
            self._before.clear()
            self._fits.clear()
            self._open.difference_update(mine)
            return
        with self._all_or_not_counted():
            if closure:
                self._fits.update(self._fit(optimizers, mine))
            self._finish(mine)
            self._now.add(optimizers[0])
            if self._stepped.issuperset(self.owned()) and all(each in self._now for each in self._lately):
                self._advance()

    @contextmanager
    def _all_or_not_counted(self) -> Iterator[None]:
        """A step that is cut short in our part of it is mended at the next use, and does not count."""
        try:
            yield
        except BaseException:
            self._stepped.clear()
            self._now.clear()
            raise

    def owned(self) -> Iterable[SubnetState]:
        """The subnets that optimizers in use step: t counts once all of them have been."""
        return itertools.chain.from_iterable(owned_states(each, self) for each in self._owners)

    def made_by_hand(self) -> None:
        """A step that no optimizer made: S has been moved, and its gradient is still there."""
        with self.lock:
            self._rest_to_come = False
            self._by_hand()

    def _by_hand(self) -> None:
        self.check_tree()
        mine = [state for state in self.states if state.values.grad is not None]
        if not mine:
            raise LosiaError(
                "losia_fx.stepped: no subnet has a gradient. Call it after the parameters were moved and before their "
                "gradients are zeroed"
            )
        for state in mine:
            before = self._last.pop(state, None)
            if before is None:
                before = state.block_of(state.weight.detach()).to(state.values.dtype)
            self._before[state] = (before, state.weight._version)
        self._open.update(mine)
        with self._all_or_not_counted():
            self._fits.update(self._fit((), mine))
            self._finish(mine)
            self._owners.clear()
            self._now.clear()
            self._advance()
        self._last = {s: s.values.detach().clone() for s in self.states if self._rewarm_share(s) < 1.0}

    def _finish(self, mine: list[SubnetState]) -> None:
        """Our part of a step, after the optimizer's."""
        for state in mine:
            state.notice_gradient()
            if state.profile is not None:
                self._update_importance(state)
            if state.rewarm_from is not None:
                self._rewarm(state)
        self._write_back(mine)
        self._before.clear()
        self.agreement.remember(mine)
        self._open.difference_update(mine)
        self._stepped.update(mine)
        self._idle = self.agreement.averaged = False
        self._seen_step, self._unseen_moves, self._modes = True, 0, self._read_modes()
        self._modes_of.clear()
        self._usual_waits, self._waits = max(self._usual_waits, self._waits), 0
        if not self._rest_to_come:
            self._select_due()

    def _advance(self, late: bool = False) -> None:
        """t counts. late: the gradients of another step are there already, so nothing may move before that is made."""
        last = self.step
        ends = ends_slot(self.config, last)
        if ends:
            self._selecting += slot_groups(self.config, len(self.groups), last)
        self.step = last + 1
        self._lately, self._now = self._now, weakref.WeakSet()
        self._forget_step()
        drop_taps(int(state.handle) for state in self.states)
        if ends:
            notices.warn_silent(self)
            if not late and not self._rest_to_come:
                self._select_due()
        self._open_slot()

    def _select_due(self) -> None:
        while self._selecting:
            group = self._selecting[0]
            if self._reselect(group) is None:
                self._keep(group)
            for state in self.members(group):
                state.profile = None
            self._selecting.pop(0)

    @torch.no_grad()
    def _unmove(self, state: SubnetState) -> None:
        """W as it was before the step, where forwards within the step (SAM's second) have seen it moved."""
        before, version = self._before[state]
        if state.weight._version != version:
            scatter(state.weight, state.rows, state.picked_cols, before.to(state.weight.dtype))

    # -- importance -----------------------------------------------------------------------------------------------

    def _fit(self, optimizers: Sequence[Optimizer], mine: list[SubnetState]) -> dict[SubnetState, Fit | None]:
        """How each profiled subnet's gradient, as the optimizer sees it, follows from its G."""
        profiled = [(s, s.profile) for s in mine if s.profile is not None and s.group not in self._selecting]
        if (ranks := self.ranks.group()) is not None:
            for state, profile in profiled:
                profile.average_ranks(state.weight, ranks)
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
        clip = measure_clip([state.values.grad for state in mine if state.values.grad is not None])
        *numbers, clipped = numbers_of([*found, clip])  # the device waits once
        measured = {state: each[:-1] for state, each in zip(pairs, numbers, strict=True) if each[-1]}
        fits = dict.fromkeys(pairs, None) | dict(
            zip(measured, fits_from(list(measured.values()), clipped), strict=True)
        )
        factors = [fit.factor for fit in fits.values() if fit is not None]
        # One that is clipped throughout says nothing of the factor and is measured with its neighbours': another wait.
        blank = [state for state, each in measured.items() if each[1] and fits[state] is None] if factors else []
        again = numbers_of([measure_fit(*pairs[state], factors[0]) for state in blank])
        fits |= {state: fit_from(each, factors[0]) for state, each in zip(blank, again, strict=True)}
        scale = math.prod(grad_scale(each) for each in optimizers)  # a fused optimizer unscales inside its step
        return {s: fit and Fit(fit.factor / scale, fit.limit and fit.limit / scale) for s, fit in fits.items()}

    def _update_importance(self, state: SubnetState) -> None:
        profile = state.profile
        if profile is None or state not in self._fits:
            return
        fit = self._fits.pop(state)
        grad, profile.grad = profile.grad, None
        self._unmove(state)
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
        """S into W, a block at a time: large blocks of one kind share their compiled form."""
        if not self._compiles:
            for state in states:
                state.write_back()
            return
        for _, block in itertools.groupby(states, key=lambda state: (state.group, state.whole_cols)):
            weights, rows, cols, values = zip(*(state.written() for state in block), strict=True)
            write_back(weights, rows, cols, values, compiled=True)

    def _rewarm_share(self, state: SubnetState) -> float:
        if state.rewarm_from is None:
            return 1.0
        return rewarm_factor(self.config, self.step - state.rewarm_from + 1)

    @torch.no_grad()
    def _rewarm(self, state: SubnetState) -> None:
        share = self._rewarm_share(state)
        if share < 1.0:
            before, _ = self._before[state]
            state.values.copy_(before + share * (state.values - before))
        else:
            state.rewarm_from = None

    def select(self, group: int) -> Event:
        """Re-selects the subnets of ``group`` now, from the importance gathered so far (or at random, if so set).

        rows and cols are changed in place, S is gathered anew, its optimizer state starts afresh and its learning rate
        is rewarmed. Raises LosiaError for a group that does not exist or has not been profiled.
        """
        if not 0 <= group < len(self.groups):
            raise LosiaError(f"group {group} does not exist: there are {len(self.groups)}, counted from 0")
        self.check_tree()
        self.look()
        if not self._known:  # before the first step
            self._known.update(each for each in live_optimizers() if owned_states(each, self))
            for each in self._known:
                note_made_state(each, owned_states(each, self))
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
        if self.bases is not None:
            self.bases.before_move({state: (found.rows, found.cols) for state, found in selections.items()})
        self._moving = True
        for state, selection in selections.items():
            state.rewarm_from = self.step
            state.pending = (selection.rows, selection.cols)
        self._finish_moves(selections)

    def _finish_moves(self, states: Iterable[SubnetState]) -> None:
        """Every part of a move may be done again, so one that was interrupted is simply made: W has all the numbers."""
        for state in states:
            if state.pending is not None:
                state.move_to(*state.pending)
                restart_states(self._known, state)
                self.agreement.remember([state], places=True)
                self._last.pop(state, None)
                state.pending = None
        self._moving = False

    def _keep(self, group: int) -> None:
        notices.warn_kept(group)
        self._record(Event(self.step, group, 0.0, None))

    def _record(self, event: Event) -> Event:
        self.history.append(event)
        log.info("step %d: group %d re-selected, %.0f%% new", event.step, event.group, 100 * event.moved)
        return event


def _is_passing(key: str) -> bool:
    """Of an attribute: whether it is about the step under way, or about optimizers, and no part of what a copy is."""
    return key.startswith("_")


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
    return next((found for found in list(registry.CONTROLLERS) if states.intersection(found.states)), None)
