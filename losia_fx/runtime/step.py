"""One optimizer step of a model, around the optimizer's own part.

S and W agree -> (the step) -> importance from G and the W of before -> rewarm -> W[rows, cols] = S -> t counts -> at
the end of a slot re-select and go on to the next group. Wherever that is cut short, the next use of the model finds in
``TrainState.pending`` what is left to do. Which steps are whose is in step_hooks.py and steps.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.optim import Optimizer

from losia_fx._compat import graph_task_id
from losia_fx.errors import LosiaError
from losia_fx.method.schedule import checked_steps, reselecting_groups
from losia_fx.ops.localization import drop_taps

from . import labels, look, notices, owners, slot
from .carry import take_in_gradients
from .measure import add_importance, fit_gradients
from .optimizers import found_inf
from .same import same
from .state import SubnetState
from .steps import Followed
from .take_in_shards import was_sharded
from .train_state import TrainState
from .write_back import rewarm, rewarm_share, undo_write_back


def is_rehearsal(optimizer: Optimizer, mine: Sequence[SubnetState]) -> bool:
    """Whether a step only makes the optimizer's state, as torch.distributed.checkpoint has it do: no backward came
    before it, its rate is 0 and so are its gradients."""
    if any(float(group.get("lr", 1.0)) != 0.0 for group in optimizer.param_groups):
        return False
    if any(state.profile is not None and state.profile.grad is not None for state in mine):
        return False
    return all(state.values.grad is not None and not state.values.grad.any() for state in mine)


def before(train: TrainState, optimizer: Optimizer, mine: Sequence[SubnetState], within: bool) -> None:
    """``mine``: this optimizer's subnets, which no optimizer around it has begun. ``within``: the gradients are made,
    or changed, within the step."""
    with train.lock:
        train.optimizers.beside = 0
        train.check_tree()
        train.watches.install()
        if train.agreement.waiting:
            look.check_weights(train)
            look.look(train, learns=True)
        look.mend(train)
        if not train.agreement.stands and was_sharded(train.states):
            look.take_in(train)  # around the model: it had whole weights in its forward, whose memory is gone
        # At the end of a slot the host waits for the device anyhow; of many short slots, once in a while.
        checked = (train.progress.step + 1) % checked_steps(train.config) == 0
        values = checked or train.agreement.vigilant or train.agreement.shows_a_write()
        look.agree(train, values, learns=True, shown=False)
        if optimizer not in train.optimizers.known:
            owners.meet(train)
        owners.notice_loaded(train, optimizer, mine)
        if optimizer in train.optimizers.of_this_step and not train.progress.stepped.isdisjoint(mine):
            _drop_silent_owners(train)
        train.optimizers.waited_for.add(optimizer)
        if train.vigilance.step_seen:
            notices.warn_of_copies(train, mine)
        for state in mine:
            state.learned = state.learned or state.values.grad is not None
            if state.profile is not None or state.rewarm_from is not None:
                train.pending.before[state] = (state.values_here.detach().clone(), state.weight_here._version)
        if not within:
            _fit(train, [optimizer], mine)
            take_in_gradients(train, mine, [optimizer])
        train.pending.open.update(mine)


def _drop_silent_owners(train: TrainState) -> None:
    """An optimizer steps again before t has counted: it waited for others, which have fallen out of use."""
    used = train.optimizers.of_this_step
    train.optimizers.waited_for.difference_update([each for each in train.optimizers.waited_for if each not in used])
    _advance(train, late=True)


def after(train: TrainState, followed: Followed) -> None:
    """Our part of a step that an optimizer has made, with those within it."""
    mine, optimizers, around = followed.states, followed.optimizers, followed.around
    with train.lock:
        owners.note_states(train, optimizers)
        # What called the step from one of its own goes on after it, unseen: nothing moves before the next use.
        # Nor does what is due since a step that was given up, while a backward reads where the subnets are.
        late = bool(train.progress.selecting) and graph_task_id() >= 0
        train.pending.rest_to_come = around is not None or late
        train.pending.around = None if around is None else weakref.ref(around)
        if any(found_inf(each) for each in optimizers):
            train.pending.forget_step()
            train.pending.open.difference_update(mine)
            return
        with _all_or_not_counted(train):
            if followed.within:
                _fit(train, optimizers, mine)
                take_in_gradients(train, mine, optimizers)
            _finish(train, mine)
            now = train.optimizers.of_this_step
            now.add(optimizers[0])
            complete = train.progress.stepped.issuperset(owners.waited_for(train))
            if complete and all(each in now for each in train.optimizers.of_last_step):
                _advance(train)


def by_hand(train: TrainState) -> None:
    """A step that no optimizer made: S has been moved, and its gradient is still there, or is gone already."""
    with train.lock:
        train.pending.rest_to_come = False
        train.optimizers.beside = 0
        train.check_tree()
        mine = [state for state in train.states if state.values.grad is not None]
        if not mine:  # some updates free a gradient as soon as they have used it (LOMO)
            mine = [state for state, still in zip(train.states, same(train.states), strict=True) if not still]
        if not mine:
            raise LosiaError(
                "losia_fx.stepped: no subnet has a gradient, and none has moved since its last use. Call it after the "
                "parameters were moved, and before the next forward"
            )
        for state in mine:
            state.learned = True
            last = train.by_hand.pop(state, None)
            if last is None:
                last = state.here(state.block()).detach().to(state.values.dtype)
            train.pending.before[state] = (last, state.weight_here._version)
        notices.warn_kept_by_place(train, train.left.written(mine))
        train.pending.open.update(mine)
        with _all_or_not_counted(train):
            _fit(train, (), mine)
            take_in_gradients(train, mine, ())
            _finish(train, mine)
            train.optimizers.waited_for.clear()
            train.optimizers.of_this_step.clear()
            _advance(train)
        rewarmed = [s for s in train.states if rewarm_share(s, train.config, train.progress.step) < 1.0]
        train.by_hand = {state: state.values_here.detach().clone() for state in rewarmed}


@contextmanager
def _all_or_not_counted(train: TrainState) -> Iterator[None]:
    """A step that is cut short in our part of it is mended at the next use, and does not count."""
    try:
        yield
    except BaseException:
        train.progress.stepped.clear()
        train.optimizers.of_this_step.clear()
        raise


def _fit(train: TrainState, optimizers: Sequence[Optimizer], mine: Sequence[SubnetState]) -> None:
    """Notes how each profiled subnet's gradient, as the optimizer sees it, follows from its G."""
    profiled = [s for s in mine if s.profile is not None and s.group not in train.progress.selecting]
    if (ranks := train.ranks.group()) is not None:
        for state in profiled:
            assert state.profile is not None
            state.profile.average_ranks(state.weight, ranks)
    train.pending.fits.update(fit_gradients(mine, profiled, optimizers))


def _finish(train: TrainState, mine: Sequence[SubnetState]) -> None:
    """Our part of a step, after the optimizer's."""
    pending = train.pending
    for state in mine:
        # An optimizer may free the gradient within its step, and one that is given a closure makes it there, too.
        state.learned = state.learned or state.values.grad is not None or train.agreement.moved(state)[1]
        if state.profile is not None:
            _update_importance(train, state)
        if state.rewarm_from is None:
            continue
        if (share := rewarm_share(state, train.config, train.progress.step)) < 1.0:
            rewarm(state.values_here, pending.before[state][0], share)
        else:
            state.rewarm_from = None
    train.write_back(mine)
    pending.before.clear()
    train.agreement.remember(mine)
    pending.open.difference_update(mine)
    train.progress.stepped.update(mine)
    train.idle = train.agreement.averaged = False
    train.vigilance.stepped(owners.modes_of(train))
    if not pending.rest_to_come:
        slot.select_due(train)


def _update_importance(train: TrainState, state: SubnetState) -> None:
    profile = state.profile
    if profile is None or state not in train.pending.fits:
        return
    fit = train.pending.fits.pop(state)
    grad, profile.grad = profile.grad, None
    undo_write_back(state, *train.pending.before[state])
    kind = train.config.scored_by(state.whole_cols)
    if fit is not None and grad is not None and kind is not None:
        betas = (train.config.beta1, train.config.beta2)
        add_importance(profile, state.weight_here, grad, fit, kind, betas, train.compiles)
        return
    train.progress.left_out += 1
    notices.say_left_out(train, state)


def _advance(train: TrainState, late: bool = False) -> None:
    """t counts. late: the gradients of another step are there already, so nothing may move before that is made."""
    progress, optimizers = train.progress, train.optimizers
    labels.add_counted(train)
    due = reselecting_groups(train.config, len(train.groups), progress.step, train.head)
    progress.selecting += due
    progress.step += 1
    optimizers.of_last_step, optimizers.of_this_step = optimizers.of_this_step, weakref.WeakSet()
    progress.stepped.clear()
    train.put_back = False
    train.pending.forget_step()
    drop_taps(state.number for state in train.states)
    if progress.step % checked_steps(train.config) == 0:
        notices.warn_silent(train, owners.waited_for(train))
    if due and not late and not train.pending.rest_to_come:
        slot.select_due(train)
    slot.open_slot(train)
