"""transform and restore: a model gets its subnets, its controller and its compiled call, and loses them again."""

from __future__ import annotations

import functools
import logging
import warnings
from collections import Counter
from typing import Any, NoReturn

import torch
from torch import nn

from losia_fx import registry
from losia_fx._compat import (
    CompilerFailed,
    OptimizedModule,
    be_called_while_traced,
    compile_call,
    compile_forward,
    compiled_call,
    install_call,
    is_exporting,
    is_jit_tracing,
    is_transformed,
    leaves,
    plain_call,
    whole_graphs,
)
from losia_fx.compile.backend import LosiaBackend
from losia_fx.config import LosiaConfig
from losia_fx.errors import LosiaError, LosiaWarning, Swapped, TransformError, listed
from losia_fx.model.blocks import find_blocks, group_names
from losia_fx.model.kinds import EXPERTS
from losia_fx.model.roles import ADAPTER, plan_model
from losia_fx.model.weight_plan import WeightPlan
from losia_fx.ops.first_order import watch_functions
from losia_fx.runtime import labels, notices
from losia_fx.runtime.attach import attach, detach
from losia_fx.runtime.choose import random_selection
from losia_fx.runtime.controller import Controller, Role, controller_of, find_controller
from losia_fx.runtime.expected import say_expected
from losia_fx.runtime.functional import call_with_others
from losia_fx.runtime.in_8_bits import is_asked_for, keep_in_8_bits, make_dense
from losia_fx.runtime.look import follow_before_copy, look
from losia_fx.runtime.outside import asking_for_gradients, asking_where_learning
from losia_fx.runtime.ranks import forget_indices, keep_indices_at_home
from losia_fx.runtime.shards import is_block_of_shards
from losia_fx.runtime.state import SubnetState, states_of
from losia_fx.runtime.train_state import TrainState
from losia_fx.runtime.watch import CALL, put_first, refuse_shallow, traced_call
from losia_fx.runtime.wrappers import refuse_join, refuse_wrappers

log = logging.getLogger("losia_fx")

RUNS_ITSELF = "losia_fx compiles a transformed model by itself: leave fullgraph=True out of what is around it"
"""What a graph of another compiler's breaks for, where the model is called."""

RECOMPILE_LIMIT = 64
"""Training meets more shapes (lengths, batch sizes, train and eval) than Dynamo's default of 8 graphs a function."""


def transform(model: nn.Module, config: LosiaConfig | None = None, **options: Any) -> nn.Module:
    """Makes ``model`` train through subnets, compiled; returns the same object.

    Call it before an optimizer, DistributedDataParallel or a Trainer sees the model. Only the subnets and what
    ``trainable`` names learn; every other parameter is frozen. options: fields of LosiaConfig, on top of ``config``.
    Names in state_dict(), save_pretrained() and load_state_dict() stay the model's own. Under no_grad the original
    forward runs.

    Raises ConfigError for an option that cannot be, TransformError for a model without linears, one that is transformed
    already, one with float8 weights that would learn, or frozen_products that the machine cannot compute; either leaves
    the model as it was.

    >>> model = losia_fx.transform(model, rank_factor=1 / 8, period=50)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    """
    if not isinstance(model, nn.Module):
        raise TransformError(f"transform needs a torch.nn.Module, not {type(model).__name__}")
    settings = LosiaConfig.of(config, options)
    _refuse(model)
    plans = plan_model(model, settings)
    controller = Controller(model, settings)
    try:
        _put_on(controller, plans)
    except BaseException:
        _take_off(controller)
        raise
    frozen = [plan for plan in plans if plan.trained == "frozen"]
    _warn_frozen([plan.name for plan in frozen if plan.outside and plan.kind != EXPERTS])
    _warn_frozen_experts([plan for plan in frozen if plan.kind == EXPERTS])
    _say_frozen([plan for plan in plans if plan.kind is not None and plan.why != ADAPTER])  # those are named already
    return model


@torch.inference_mode(False)  # what is made here is to learn, wherever transform is called
def _put_on(controller: Controller, plans: list[WeightPlan]) -> None:
    model, settings = controller.root, controller.config
    controller.train.required_grad = {plan.name: (plan.parameter, plan.parameter.requires_grad) for plan in plans}
    controller.roles = {plan.name: Role(plan.trained, plan.why, plan.kind) for plan in plans}
    for plan in plans:
        plan.parameter.requires_grad_(plan.trained == "full")
        if plan.trained == "subnet":
            _, owner, key = plan.owners[0]
            state = SubnetState(owner, key, plan.name, settings, plan.whole_cols)
            controller.states.append(state)
            first = random_selection(state, controller.train.progress.generator)
            attach(state, first.rows, first.cols)
            _refuse_shared(state, plan)
            controller.watch([name for name, _, _ in plan.owners])
    states = controller.states
    if settings.frozen_products is not None:
        say_expected(states, settings.frozen_products)
    _keep_in_8_bits(controller.train)
    heads = [state.name for state in states if state.whole_cols]
    controller.set_groups(states, group_names([state.name for state in states], heads, find_blocks(model)))
    keep_indices_at_home(model, states)
    model.__dict__["compile"] = functools.partial(_refuse_compile, type(model).__name__)
    call = CompiledCall(model, settings)
    put_first(model, CALL, call)
    install_call(model, call)
    be_called_while_traced(model, traced_call)


def _keep_in_8_bits(train: TrainState) -> None:
    """Where that is asked for: the last thing that changes a weight, when nothing can be refused any more."""
    for state in filter(is_asked_for, train.states):
        # The dense parameter is to go, and this one may be exchanged: restore() finds it by its name.
        gone = nn.Parameter(torch.empty(0, device="cpu"))
        train.required_grad[state.name] = (gone, train.required_grad[state.name][1])
        keep_in_8_bits(state)
        state.values.data.copy_(state.block())


def _refuse_shared(state: SubnetState, plan: WeightPlan) -> None:
    if is_asked_for(state) and len(plan.owners) > 1:
        raise TransformError(
            f"{plan.name}: keep_dense=False and a weight that {len(plan.owners)} modules share "
            f"({listed([name for name, _, _ in plan.owners])}): leave it out with exclude, or drop keep_dense"
        )


def restore(model: nn.Module) -> nn.Module:
    """Takes everything off again: the plain model, with the trained weights, as it was before transform().

    A call that Module.compile() had made before transform() is there again. Accepts what torch.compile,
    DistributedDataParallel and the like made of the model too; returns the model itself.
    Raises TransformError for a model that is not transformed, or that fully_shard has sharded since.
    """
    controller = find_controller(model)
    if controller is None:
        raise TransformError(f"{type(model).__name__} is not transformed: there is nothing to restore")
    controller.settle_last()
    if controller.sharded:
        raise TransformError(
            f"{type(controller.root).__name__} is sharded: fully_shard keeps the subnets among its parameters, so they "
            "cannot be taken off. Gather the weights (get_model_state_dict of torch.distributed.checkpoint.state_dict "
            "with full_state_dict=True) and load them into a plain model"
        )
    _take_off(controller)
    return controller.root


def _take_off(controller: Controller) -> None:
    """Every part by itself may be there or not: so what failed halfway is taken off as well."""
    root, states = controller.root, controller.states
    forget_indices(root, states)
    for state in states:
        make_dense(state)
    required = controller.required_before()
    for state in states:
        registry.retire(state.held(state.values_name), root)
        detach(state)
    for parameter, before in required:
        parameter.requires_grad_(before)
    root.__dict__.pop("compile", None)
    be_called_while_traced(root, None)
    call, runs = root.__dict__.pop(CALL, None), compiled_call(root)
    if isinstance(runs, CompiledCall) and runs is call:
        install_call(root, runs.before)
    controller.leave()


def _refuse_compile(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    """What model.compile() runs on a transformed model."""
    raise TransformError(
        f"{name}.compile(): the model is compiled by losia_fx.transform already, and another compiler would leave its "
        "weights untrained. Choose one in transform(model, compiler=...), or compile after losia_fx.restore(model)"
    )


def _refuse(model: nn.Module) -> None:
    if states_of(model) or find_controller(model) is not None:
        raise TransformError(f"{type(model).__name__} is transformed already; losia_fx.restore(model) takes that off")
    wrappers = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel, OptimizedModule)
    if isinstance(model, wrappers):
        raise TransformError(f"transform the model itself, before {type(model).__name__} wraps it")


def _warn_frozen(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"losia_fx: {listed(names)}: outside the repeated blocks, so frozen. "
            "Name a classification head in trainable to train it; print(losia_fx.report(model)) shows every weight",
            LosiaWarning,
            stacklevel=3,
        )


def _warn_frozen_experts(plans: list[WeightPlan]) -> None:
    if plans:
        reasons = "; ".join(sorted({plan.why for plan in plans}))
        warnings.warn(
            f"losia_fx: experts left dense: frozen: {listed([plan.name for plan in plans])} ({reasons}). Most of a "
            "mixture of experts is in such weights, and nothing of them learns",
            LosiaWarning,
            stacklevel=3,
        )


def _say_frozen(linears: list[WeightPlan]) -> None:
    """How many linear weights stay frozen and why: as a warning where most do and nobody asked for it, else a log line.

    A quantised base would else be trained in its head alone.
    """
    frozen = [plan for plan in linears if plan.trained == "frozen"]
    if not frozen:
        return
    reasons = "; ".join(f"{count} x {why}" for why, count in Counter(plan.why for plan in frozen).most_common())
    said = f"{len(frozen)} of {len(linears)} linear weights stay frozen: {reasons}"
    if 2 * sum(not plan.chosen for plan in frozen) > len(linears):
        warnings.warn(f"losia_fx: {said}. print(losia_fx.report(model)) shows each", LosiaWarning, stacklevel=3)
    else:
        log.info(said)


class CompiledCall:
    """What calling a transformed model runs: the compiled call where gradients are on, the plain one where not.

    torch drops a module's compiled call from deepcopies and pickles; this object travels in the module and makes it
    again there.
    """

    def __init__(self, root: nn.Module, config: LosiaConfig, backend: LosiaBackend | None = None) -> None:
        """backend: another than the config's (losia_fx.tools.capture)."""
        self.root, self.config = root, config
        self._backend = backend or LosiaBackend(config)
        self._compiled: Any = None
        self._by_block = False
        self.before = None if root.__dict__.get(CALL) is not None else compiled_call(root)
        """The user's own Module.compile(), which restore() puts back."""

    def __getstate__(self) -> dict[str, Any]:
        for module in self.root.modules():  # all, as weights may be shared
            follow_before_copy(module)
        return {"root": self.root, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        install_call(self.root, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_exporting():
            controller = None if torch.compiler.is_dynamo_compiling() else controller_of(self.root)
            if controller is not None and not is_jit_tracing():
                controller.train.agreement.follow_beneath()
            return plain_call(self.root, *args, **kwargs)
        return self._run(*args, **kwargs)

    # An outer torch.compile would trace through, and its backend knows nothing of subnets: it calls us as we are.
    @torch.compiler.disable(recursive=False, reason=RUNS_ITSELF)
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        refuse_shallow(self.root)
        controller = controller_of(self.root)
        if controller is None:
            return plain_call(self.root, *args, **kwargs)
        train, learns = controller.train, torch.is_grad_enabled()
        if learns:
            train.check_tree()
            train.watches.install()
        try:
            look(train, learns)
        except Swapped:
            refuse_wrappers(self.root)
            return call_with_others(train, args, kwargs)
        if learns and is_transformed():  # no op of ours knows of these, and W made of S is an ordinary tensor
            return call_with_others(train, args, kwargs)
        if not learns:
            with train.watches.plain_forward():
                return plain_call(self.root, *args, **kwargs)
        if self._compiled is None:
            refuse_wrappers(self.root)
            self._compiled = compile_call(self.root, self._backend, RECOMPILE_LIMIT)
        if train.sharded and not self._by_block:
            self._by_block = True
            compile_blocks(train, self._backend)
        refuse_join(self.config)
        under_ddp = train.ranks.notice(train.states, train.progress.generator)
        labels.note(train, args, kwargs)
        _free_input_gradients(self.root)
        try:
            with asking_for_gradients(train.states), whole_graphs(under_ddp):
                result = self._compiled(*args, **kwargs)
        except CompilerFailed as failure:
            inner = getattr(failure, "inner_exception", None)
            if isinstance(inner, LosiaError):
                raise inner from None
            raise
        notices.warn_outside(train)
        notices.warn_at_odds(train)
        watch_functions(leaves(result), leaves((args, kwargs)))
        return result


def compile_blocks(train: TrainState, backend: LosiaBackend) -> None:
    """Has each module that fully_shard was called on compiled by itself: its hooks break graphs, and what breaks under
    gradient checkpointing runs uncompiled. Within those hooks the weights are whole, and may ask for their gradients.
    """
    for module in train.root.modules():
        if is_block_of_shards(module):
            inside = [state for state in train.states if state.shards is not None and state.shards.are_of(module)]
            compile_forward(module, backend, RECOMPILE_LIMIT, functools.partial(asking_where_learning, inside))


def _free_input_gradients(root: nn.Module) -> None:
    """Takes off the hook with which transformers' checkpointing makes embeddings ask for a gradient.

    It breaks the graph and brings a gradient that nobody needs. Reentrant checkpointing needs it, so there it stays.
    """
    if not getattr(root, "_require_grads_hooks", None):
        return
    functions = [module.__dict__.get("_gradient_checkpointing_func") for module in root.modules()]
    keywords = [getattr(function, "keywords", {}) for function in functions if function is not None]
    if keywords and not any(options.get("use_reentrant", True) for options in keywords):
        root.disable_input_require_grads()  # type: ignore[operator]
