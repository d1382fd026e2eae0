"""Before any use of a model, or of one of its weights: whatever moved S or W since the last one, they agree afterwards.

``look`` is for the model, ``look_at`` for a weight that is used by itself. What a step has left unfinished is finished
first (``mend``). When values are compared is vigilance.py's, what is done about a difference agreement.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from losia_fx import registry
from losia_fx._compat import is_exporting
from losia_fx.errors import StateError, Swapped, listed
from losia_fx.method.schedule import checked_steps

from . import notices, slot, steps
from .agreement import Agreement
from .evidence import points_alike
from .owners import modes_of
from .same import same, strays
from .sharded_agreement import AnyAgreement
from .shards import reshard_all
from .state import SubnetState, own_states
from .take_in_shards import take_in_shards, was_sharded
from .train_state import TrainState

PART_LOOKS = 3
"""Uses of a weight, outside of forwards of the whole model, that compare values whatever the versions say."""


@torch.compiler.disable  # what an outer torch.compile breaks its graph for, it would compile frame by frame
def look(train: TrainState, learns: bool | None = None, shown: bool = False) -> None:
    """learns: of a forward, whether gradients are on; None for any other use, which compares values too. shown: the
    weights are evaluated or saved. Raises StateError where S and W cannot agree.
    """
    with train.lock, ordinary_tensors():
        if not steps.elsewhere(train):
            _look(train, learns, shown)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is noted of a model within torch.inference_mode() is written again outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _look(train: TrainState, learns: bool | None, shown: bool) -> None:
    agreement = train.agreement
    if agreement.waiting:
        agreement.waiting = set(strays(agreement.waiting))
        if agreement.waiting:
            return  # the weights of the loaded state are still to come; a step would say so
        agreement.remember(places=True)
    mend(train)
    agree(train, train.vigilance.compares(learns, agreement), bool(learns), shown or learns is False)
    if train.pending.rest_to_come and not steps.under_way(train):
        train.pending.rest_to_come = False
        slot.select_due(train)
    train.vigilance.looked(learns)


def agree(train: TrainState, values: bool, learns: bool, shown: bool) -> None:
    """values: whether to compare those too."""
    if moved := train.agreement.differing():
        if take_in(train):
            moved = train.agreement.differing()
        notices.warn_strange(train, strangers(train, moved))
        note(train, train.agreement.settle(moved, train.idle or all_written(train, moved)), learns, shown)
    if values:
        written = train.agreement.compare()
        notices.warn_unclear(train)
        note(train, written, learns, shown)


def all_written(train: TrainState, moved: Sequence[SubnetState]) -> bool:
    """Whether all there is was written, weights and subnets, after subnets have moved: with an average, or a copy that
    was kept, of all parameters. The weights are then right, and the numbers of the subnets of other places."""
    if not train.progress.history or len(moved) < len(train.states):
        return False
    if not all(map(all, map(train.agreement.moved, moved))):
        return False
    if not all(same(moved)):
        notices.warn_all_written(train)
    return True


def strangers(train: TrainState, moved: list[SubnetState]) -> list[SubnetState]:
    """Of a model that nothing has trained yet: the subnets that were given numbers unlike those of their places, and as
    large as weights are."""
    if not train.idle or train.copied_from is not None or train.sharded:
        return []
    written = [s for s in moved if train.agreement.moved(s) == (False, True) and not s.weight.is_meta]
    if sum(state.values.numel() for state in written) < FEWEST:
        return []
    held = torch.cat([state.block().float().flatten().cpu() for state in written])
    given = torch.cat([state.values.detach().float().flatten().cpu() for state in written])
    as_large = 0.8 < float(given.norm() / held.norm()) < 1.25
    return written if as_large and not (points_alike(held, given) or points_alike(-held, given)) else []


FEWEST = 64
"""Elements from which on it is no chance where they point."""


def take_in(train: TrainState) -> bool:
    """Follows a model that has been sharded since the last look; whether it was. All ranks have to be here."""
    if not train.sharded:
        reshard_all(train.root)  # what somebody has unsharded would pass for whole
    if not was_sharded(train.states):
        return False
    take_in_shards(train)
    return True


def note(train: TrainState, written: list[SubnetState], learns: bool, shown: bool) -> None:
    """``written``: subnets whose S somebody moved outside of a followed step."""
    if not (written or train.unsaid) or train.pending.rest_to_come or steps.under_way(train):
        return
    still = train.vigilance.still(written, modes_of(train)) if written else []
    if not (learns or shown):
        train.unsaid.update(still)
        return
    others = train.unsaid.difference(written)
    unsaid = [state for state in train.states if state in others] if others else []
    train.unsaid.clear()
    if learns:
        train.idle = False
        notices.warn_kept_by_place(train, train.left.written([*written, *unsaid]))
        if train.vigilance.moves_unseen(checked_steps(train.config)):
            notices.warn_standing(train, [*written, *unsaid])
    elif still or unsaid:
        notices.warn_averaged(train, [*still, *unsaid])


def mend(train: TrainState) -> None:
    """Finishes what was cut short: a step between the optimizer's part and ours, a subnet on its way."""
    pending = train.pending
    if not (pending.open or pending.moving):
        return
    with train.lock:
        if steps.under_way(train):
            return
        slot.finish_moves(train, train.states, again=True)
        train.write_back(list(pending.open))
        train.agreement.remember(pending.open)
        pending.open.clear()
        pending.forget_step()


def check_weights(train: TrainState) -> None:
    """Raises StateError where the model's weights are not those that the loaded state belongs to."""
    if train.agreement.waiting and (found := strays(train.agreement.waiting)):
        raise StateError(
            f"{listed([state.name for state in found])}: the weights do not hold the subnets of the LoSiA state "
            "that was loaded. Load the model's weights of the same checkpoint as well (in either order)"
        )


# -- one weight by itself ---------------------------------------------------------------------------------------------


def look_at(state: SubnetState, values: bool = False, shown: bool = False) -> None:
    """Before a use of a weight that no forward of the whole model has looked at: S and W agree.

    values: whether to compare those in any case; shown: the weight is evaluated or saved.
    """
    agreement = agreement_of(state)
    alone = agreement is not None and not shown and not steps.others()
    if agreement is not None and alone and all(agreement.moved(state)):
        alone = False  # what was done to the others tells which of the two is right
    train = None if alone else train_state_of(state)
    if train is None:
        with ordinary_tensors():
            _look_at(state, None, values, shown)
        return
    with train.lock, ordinary_tensors():
        if not steps.elsewhere(train):
            _look_at(state, train, values, shown)


def follow_before_copy(module: nn.Module) -> None:
    """Before a module is copied or pickled: what was written to the subnets that it holds is in its weights. Whoever
    copies a model may take the weights from there with no use in between (quantize_dynamic)."""
    for state in () if is_exporting() else own_states(module).values():
        agreement = agreement_of(state)
        if isinstance(agreement, Agreement) and agreement.is_ahead(state):
            look_at(state, values=True)
            # Its weight's copy may have been made already: of an optimizer, before the model.
            agreement.copied_behind.add(state)


def _look_at(state: SubnetState, train: TrainState | None, values: bool, shown: bool) -> None:
    agreement = agreement_of(state) if train is None else train.agreement
    if agreement is None or agreement.waiting or not holds_parameters(state) or was_sharded([state]):
        # A copy without a controller; a state whose weights are to come; torch.func.functional_call; what only a use
        # of the whole model takes in, on every rank.
        return
    written = []
    if any(agreement.moved(state)):
        moved = [state] if train is None else _moved_with(state, train)
        written += agreement.settle(moved, agreement.averaged or (train is not None and all_written(train, moved)))
    # Of shards nothing is compared here: all ranks would have to be.
    if isinstance(agreement, Agreement) and (values or _may_have_been_written(state, agreement)):
        state.part_looks += 1
        written += agreement.compare([state])
    if train is not None:
        notices.warn_unclear(train)
        note(train, written, learns=False, shown=shown)


def _moved_with(state: SubnetState, train: TrainState) -> list[SubnetState]:
    """Whoever has written to one has often written to all: they are told of together."""
    try:
        return train.agreement.differing()
    except Swapped:
        return [state]


def holds_parameters(state: SubnetState) -> bool:
    """Whether W and S are in their places, and no tensors that torch.func.functional_call was given."""
    held = map(state.owner._parameters.get, (state.parameter, state.values_name))
    return all(isinstance(each, nn.Parameter) for each in held)


def _may_have_been_written(state: SubnetState, agreement: Agreement) -> bool:
    return agreement.vigilant or state.part_looks < PART_LOOKS or agreement.shows_a_write_to(state)


def agreement_of(state: SubnetState) -> AnyAgreement | None:
    """What knows whether the S and W of ``state`` agree; None of a copy without a controller."""
    return state.agreement if isinstance(state.agreement, AnyAgreement) else None


def train_state_of(state: SubnetState) -> TrainState | None:
    """The model in training that a subnet is of; None of a copy without a controller."""
    models: list[TrainState] = list(registry.TRAINED)
    return next((train for train in models if state in train.states), None)
