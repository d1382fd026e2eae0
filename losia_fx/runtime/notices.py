"""What is said to a user while training: each once a model, each naming weights and what to do."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from losia_fx import registry
from losia_fx.errors import LosiaWarning, listed
from losia_fx.method.schedule import checked_steps

from .evidence import in_shared_memory, points_alike
from .state import SubnetState
from .train_state import TrainState

log = logging.getLogger("losia_fx")


def _warn(text: str) -> None:
    warnings.warn(f"losia_fx: {text}", LosiaWarning, stacklevel=2)


def _once(train: TrainState, what: str) -> bool:
    if what in train.told:
        return False
    train.told.add(what)
    return True


def _names(states: Sequence[SubnetState]) -> str:
    return listed([state.name for state in states])


def warn_outside(train: TrainState) -> None:
    """Weights that ran outside a rewritten graph since the last look. Heads by themselves are none: a loss that takes
    the head's weight in pieces is meant to run as it does."""
    ran = [state for state in train.states if state in registry.RAN_OUTSIDE] if registry.RAN_OUTSIDE else []
    registry.RAN_OUTSIDE.difference_update(ran)
    fresh = [state for state in ran if not state.ran_outside]
    for state in ran:
        state.ran = True
        state.ran_outside = True
    if fresh and not all(state.whole_cols for state in fresh):
        _warn(
            f"{len(fresh)} weights ran outside a rewritten graph ({_names(fresh)}); they train through their subnets "
            "all the same, but uncompiled. Usual causes: a graph break under gradient checkpointing, too many "
            "recompilations (TORCH_LOGS=graph_breaks,recompiles shows both), or calling a part of the model by itself"
        )


def warn_at_odds(train: TrainState) -> None:
    """Subnets and weights of which one was frozen, or set free, without the other."""
    found = [state for state in train.states if state in registry.AT_ODDS] if registry.AT_ODDS else []
    registry.AT_ODDS.difference_update(found)
    asleep, awake = [s for s in found if is_frozen(s)], [s for s in found if not is_frozen(s)]
    if asleep and _once(train, "asleep"):
        _warn(
            f"{len(asleep)} weights require grad ({_names(asleep)}), and their subnets do not, through which alone "
            "they learn. Have those require grad too: they are among model.named_parameters(), as "
            f"{asleep[0].name}_subnet, and go with model.requires_grad_(True)"
        )
    if awake and _once(train, "awake"):
        _warn(
            f"{len(awake)} weights were frozen ({_names(awake)}: requires_grad = False), and their subnets, through "
            f"which they learn, were not. To freeze a weight, freeze {awake[0].name}_subnet too, or its module "
            "(module.requires_grad_(False)). If the subnets are to learn, all is well"
        )


def warn_without_grad(states: Sequence[SubnetState]) -> None:
    """Weights that ran with gradients off within a forward, and have none."""
    if not registry.RAN_WITHOUT_GRAD:
        return
    silent = [state for state in states if state in registry.RAN_WITHOUT_GRAD and state.values.grad is None]
    registry.RAN_WITHOUT_GRAD.difference_update(states)
    fresh = [state for state in silent if not state.ran_without_grad]
    for state in fresh:
        state.ran_without_grad = True
    if fresh:
        _warn(
            f"{len(fresh)} weights do not learn: {_names(fresh)} ran with gradients off, under no_grad or in a "
            "torch.autograd.Function none of whose inputs asks for a gradient (reversible layers). There it helps if "
            "the input does (transformers: model.enable_input_require_grads()); else name these weights in exclude"
        )


def warn_resumed() -> None:
    _warn(
        "the optimizer goes on from an earlier run, but the subnets do not: their places were drawn anew and the "
        "moments belong to others. Load the LoSiA state too (losia_fx.load_state_dict; for a Trainer, "
        "losia_fx.LosiaCallback)"
    )


def warn_put_back(train: TrainState, states: Sequence[SubnetState]) -> None:
    if _once(train, "put back"):
        _warn(
            f"the state that the optimizer has loaded is of before {len(states)} subnets moved ({_names(states)}): its "
            "moments belong to other places of their weights. Load the LoSiA state of the same moment too "
            "(losia_fx.load_state_dict)"
        )


def warn_perhaps_put_back(train: TrainState, states: Sequence[SubnetState], step: int) -> None:
    """``step``: of the last move among them."""
    if _once(train, "put back"):
        _warn(
            "the optimizer has loaded a state, and the LoSiA state was not loaded with it. If it is of before step "
            f"{step}, or of another model, its moments belong to other places of {len(states)} weights, whose subnets "
            f"have moved since ({_names(states)}): load the LoSiA state of the same moment too, then "
            "(losia_fx.load_state_dict)"
        )


def say_left_out(train: TrainState, state: SubnetState) -> None:
    """A step's gradient cannot be scored; said of the first, the report counts the others."""
    first = _once(train, "left out")
    log.log(
        logging.WARNING if first else logging.DEBUG,
        "losia_fx: step %d: %s: gradient left out of the importance: not finite, or changed otherwise than by a factor "
        "or a clip. losia_fx.report(model) counts them",
        train.progress.step,
        state.name,
    )


def warn_kept(train: TrainState, group: int | None) -> None:
    """A slot has ended without a score. group: None of all."""
    if _once(train, "kept"):
        who = "all groups keep their" if group is None else f"group {group} keeps its"
        _warn(
            f"{who} subnets: no step of the slot gave a gradient to score by. Where the loop changes gradients "
            "otherwise than by a factor or a clip (averages over processes by hand, noise, projections), average them "
            "by DistributedDataParallel; where an optimizer frees them within a step that is given a closure, call it "
            'without; or choose places without them: losia_fx.transform(model, importance="random")'
        )


def warn_not_carried(train: TrainState, optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    if _once(train, f"not carried: {kind}"):
        _warn(
            f"carry_moments=True: {kind} keeps no step, exp_avg and exp_avg_sq of its parameters, or its groups have "
            "no betas: its state of a subnet that moves starts anew"
        )


def warn_corrected(train: TrainState, optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    if _once(train, f"corrected: {kind}"):
        _warn(
            f"{kind} keeps averages of the parameters, which its eval() divides by a count of all steps and puts in "
            "their place. Those of subnets that move start anew, and what is put there will be too small: let no "
            'subnet move, transform(model, schedule="static"), or do not call its eval()'
        )


def warn_apart(train: TrainState, optimizers: Sequence[Optimizer]) -> None:
    for kind in dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers):
        if _once(train, f"apart: {kind}"):
            _warn(
                f"{kind} keeps tensors for the subnets beside its state, which were not there before its first step: "
                "of those that move they are left as they are, and are of the old places. Have it keep them in "
                "optimizer.state, or make them in its constructor: then they are made anew; or let no subnet move, "
                'transform(model, schedule="static")'
            )


def warn_standing(train: TrainState, written: Sequence[SubnetState]) -> None:
    if _once(train, "standing"):
        _warn(
            f"{len(written)} subnets ({_names(written)}) are moved by something that is no optimizer step of theirs (a "
            "step written by hand, an optimizer of flat or master copies). The weights follow, but t stands still: no "
            "slot ends and no subnet moves to another place. Call losia_fx.stepped(model) after each such step, before "
            "the gradients are zeroed; moments of your own are then yours to zero where a subnet moves "
            "(help(losia_fx.stepped)). Without gradients to choose by (evolution strategies), all is well as it is"
        )


def warn_averaged(train: TrainState, written: Sequence[SubnetState]) -> None:
    """S was written from elsewhere and is now evaluated or saved: where it has been in several places, the average of
    what it held is that of no weight."""
    origin = registry.numbered(train.copied_from)
    moved = train.progress.history or (origin is not None and origin.progress.history)
    if moved and _once(train if origin is None else origin, "averaged"):
        _warn(
            f"{len(written)} subnets ({_names(written)}) were written from outside of a step, and have been elsewhere "
            "in their weights before. An average of them that was begun before they moved mixes different weights: "
            "average the weights by name instead (model.state_dict(), or torch.optim.swa_utils.AveragedModel and "
            "ema_pytorch, which do; not what copies weights that are frozen, as diffusers' EMAModel does). For values "
            "of this very place all is well"
        )


def warn_all_written(train: TrainState) -> None:
    if _once(train, "all written"):
        _warn(
            f"all {len(train.states)} weights and their subnets were written from outside of a step, and subnets have "
            "moved before: where the two hold different numbers, the weights count. An average or a copy that is kept "
            "of all parameters is of other places in its subnets: keep it of the weights by name (model.state_dict())"
        )


def warn_unclear(train: TrainState) -> None:
    """S and W were found to differ, with nothing to tell by which of the two was written."""
    found, train.agreement.unclear = train.agreement.unclear, []
    if found and _once(train, "unclear"):
        _warn(
            f"{len(found)} weights ({_names(found)}) and their subnets hold different numbers: a few elements of the "
            "one or the other were written through .data, and nothing tells of which. Where whole rows or columns "
            "differ the weight counts, else the subnet. Write within torch.no_grad() instead, and not through .data"
        )


def warn_of_copies(train: TrainState, stepped: Sequence[SubnetState]) -> None:
    """Before a step with no forward of this model since the last: gradients that point where the weights do, as only
    a difference of weights of two places does."""
    if not train.copies_moved or "copies" in train.told:
        return
    held = [state for state in stepped if state.values.grad is not None and state.values.numel() >= 24]
    given = [s for s in held if s.values.grad is not None and points_alike(s.values.grad, s.values)]
    if given and _once(train, "copies"):
        _warn(
            f"{len(given)} subnets ({_names(given)}) were given gradients that are no gradients, but differences of "
            "weights, and a copy of this model has moved its subnets to other places while it was trained. If they "
            "were taken by position (Reptile), they are of different weights: let no subnet move, "
            'transform(model, schedule="static"), or write the differences of whole weights, by name'
        )


def warn_kept_by_place(train: TrainState, written: Sequence[SubnetState]) -> None:
    if written and _once(train, "kept by place"):
        _warn(
            f"{len(written)} subnets ({_names(written)}) were written with numbers of the places in their weights that "
            "they have left: whatever keeps these by parameter (master copies, slow weights, an anchor) is to make "
            "them anew from the parameters when a subnet moves, when losia_fx.controller(model).history grows. "
            "Or keep them of whole weights (losia_fx.subnets(model)[name].weight), or let no subnet move: "
            'transform(model, schedule="static")'
        )


def warn_shared_memory(train: TrainState, moving: Iterable[SubnetState]) -> None:
    held = [state for state in moving if in_shared_memory(state)]
    if held and _once(train, "shared memory"):
        _warn(
            f"{len(held)} subnets ({_names(held)}) move in memory that processes share (share_memory(), or a model "
            "that was an argument of a spawned process). If another process trains them too, it goes on with moments "
            "of other places, and counts steps of its own: let no subnet move there, "
            'transform(model, schedule="static"), or train a copy.deepcopy(model) in each'
        )


def warn_by_place(train: TrainState) -> None:
    if _once(train, "by place"):
        _warn(
            "a state dict holds the numbers of subnets without their weights. They are right only where every subnet "
            "still is where it was when they were taken: load model.state_dict(), or a delta file "
            "(losia_fx.save_delta, losia_fx.load_delta), which know the places"
        )


def warn_strange(train: TrainState, states: Sequence[SubnetState]) -> None:
    if states and _once(train, "by place"):
        _warn(
            f"{len(states)} subnets ({_names(states)}) of a model that has not been trained were given numbers that "
            "are nothing like those at their places. If they were saved from a model whose subnets had moved, they are "
            "of other weights: load model.state_dict(), or a delta file (losia_fx.save_delta, losia_fx.load_delta), "
            "which know the places. If they are meant for these places, all is well"
        )


def warn_silent(train: TrainState, owned: Iterable[SubnetState]) -> None:
    """At a slot's end: subnets that are in use and do not learn: no gradient reaches them, or no optimizer (``owned``:
    those that one steps)."""
    stepped, steps = set(owned), checked_steps(train.config)
    by_group = {group: train.members(group) for group in range(len(train.groups))}
    warn_at_odds(train)
    # While others learn, what is frozen was frozen on purpose; but for heads: resize_token_embeddings freezes their S.
    asleep = {s for s in train.states if is_frozen(s) and not s.whole_cols}
    if not any(state.learned for state in train.states):
        asleep.clear()
    quiet = [s for s in train.states if not (s.learned or s.ran_without_grad or s in asleep)]
    idle = {group for group, members in by_group.items() if not any(state.learned for state in members)}
    deaf = [s for s in quiet if s in stepped and (s.ran or s.group in idle)]
    ownerless = [s for s in quiet if s not in stepped and s.ran]
    for state in train.states:
        state.ran = state.learned = False
    if deaf and "asleep" not in train.told and _once(train, "deaf"):
        _warn(
            f"{len(deaf)} weights have had no gradient in the last {steps} steps: {_names(deaf)}. "
            "Nothing of them learns. Where a loss takes a weight by hand, take losia_fx.dense(model, name) instead; a "
            "part that another compiler runs, or that this loss has no use for, is named in exclude; one that is "
            "frozen or skipped for a while needs nothing"
        )
    train.idle_groups = idle
    warn_unowned(train, ownerless, steps)


def is_frozen(state: SubnetState) -> bool:
    return not state.values.requires_grad


def warn_unowned(train: TrainState, ownerless: Sequence[SubnetState], steps: int) -> None:
    """``ownerless``: weights that are in use, and whose subnets no optimizer steps."""
    if ownerless and "standing" not in train.told and _once(train, "ownerless"):
        frozen = sum(map(is_frozen, ownerless))
        _warn(
            f"{len(ownerless)} weights are in use, and no optimizer has stepped their subnets in the last "
            f"{steps} steps: {_names(ownerless)}. Make the optimizer from model.parameters(), or "
            "name these weights in exclude"
            + (
                f". {frozen} of the subnets were frozen after losia_fx.transform: for a while, that needs nothing; "
                "where PEFT did it, which freezes what it finds, transform the model that get_peft_model returns"
                if frozen
                else ""
            )
        )


def warn_retired(kind: str, count: int) -> None:
    """An optimizer goes on after restore()."""
    _warn(
        f"{kind} steps {count} subnets that losia_fx.restore has taken off their model: that does not learn by them "
        "any more. Make the optimizer anew, from the parameters that are to learn (of a Trainer: a new Trainer)"
    )


def warn_lists(states: Sequence[SubnetState]) -> None:
    """backend="losia": lists of parameters made before the first forward hold weights in the place of their subnets."""
    weights = {id(state.weight): state for state in states}
    hidden = {id(state.values) for state in states}
    for holder in gc.get_referrers(states[0].weight) if states else ():
        if type(holder) not in (list, tuple) or not any(entry is states[0].weight for entry in holder):
            continue
        ids = {id(entry) for entry in holder}
        held = [state for key, state in weights.items() if key in ids]
        if held and not ids & hidden and all(isinstance(entry, nn.Parameter) for entry in holder):
            _warn(
                f"a list of parameters that was made before the first forward holds {len(held)} "
                f"weights ({_names(held)}) whose subnets learn in their "
                "place: clipping gradients over it leaves them out. Take model.parameters() after the first forward, "
                "or at each step"
            )
            return
