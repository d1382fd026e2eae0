"""transform and restore: a model gets its subnets, its controller and its compiled call, and loses them again."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

from ._compat import CompilerFailed, OptimizedModule, compile_call, ddp_group, install_call, plain_call, whole_graphs
from .attach import asking_for_gradients, attach, detach
from .backend import LosiaBackend
from .blocks import find_blocks, group_names
from .config import LosiaConfig
from .controller import Controller, Role, find_controller, warn_of_weights
from .errors import LosiaError, LosiaWarning, TransformError, listed
from .plan_model import WeightPlan, plan_model
from .state import SubnetState, states_of
from .weights import EXPERTS

log = logging.getLogger("losia_fx")

CALL = "_losia_call"
"""Attribute of a transformed model: its CompiledCall."""

RECOMPILE_LIMIT = 64
"""Training meets more shapes (lengths, batch sizes, train and eval) than Dynamo's default of 8 graphs a function."""


def transform(model: nn.Module, config: LosiaConfig | None = None, **options: Any) -> nn.Module:
    """Makes ``model`` train through subnets, compiled; returns the same object.

    Call it before an optimizer, DistributedDataParallel or a Trainer sees the model. Only the subnets and what
    ``trainable`` names learn; every other parameter is frozen. options: fields of LosiaConfig, on top of ``config``.
    Names in state_dict(), save_pretrained() and load_state_dict() stay the model's own. Under no_grad the original
    forward runs.

    Raises ConfigError for an option that cannot be, TransformError for a model without linears, one that is transformed
    already or one with float8 weights that would learn; either leaves the model as it was.

    >>> model = losia_fx.transform(model, rank_factor=1 / 8, period=50)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    """
    if not isinstance(model, nn.Module):
        raise TransformError(f"transform needs a torch.nn.Module, not {type(model).__name__}")
    settings = LosiaConfig.of(config, options)
    _refuse(model)
    plans = plan_model(model, settings)
    controller = Controller(model, settings)
    controller.required_grad = {plan.name: plan.parameter.requires_grad for plan in plans}
    controller.roles = {plan.name: Role(plan.trained, plan.why, plan.kind) for plan in plans}
    states = []
    for plan in plans:
        plan.parameter.requires_grad_(plan.trained == "full")
        if plan.trained == "subnet":
            _, owner, key = plan.owners[0]
            state = SubnetState(owner, key, plan.name, settings, plan.whole_cols)
            first = state.random_selection(controller.generator)
            attach(state, first.rows, first.cols)
            controller.watch([name for name, _, _ in plan.owners])
            states.append(state)
    heads = [state.name for state in states if state.whole_cols]
    controller.set_groups(states, group_names([state.name for state in states], heads, find_blocks(model)))
    call = CompiledCall(model, settings)
    model.__dict__[CALL] = call
    install_call(model, call)
    frozen = [plan for plan in plans if plan.trained == "frozen"]
    _warn_frozen([plan.name for plan in frozen if plan.outside and plan.kind != EXPERTS])
    _warn_frozen_experts([plan for plan in frozen if plan.kind == EXPERTS])
    _say_frozen([plan for plan in plans if plan.kind is not None])
    return model


def restore(model: nn.Module) -> nn.Module:
    """Takes everything off again: the plain model, with the trained weights, as it was before transform().

    Accepts what torch.compile, DistributedDataParallel and the like made of it too; returns the model itself.
    Raises TransformError for a model that is not transformed.
    """
    controller = find_controller(model)
    if controller is None:
        raise TransformError(f"{type(model).__name__} is not transformed: there is nothing to restore")
    root = controller.root
    for state in controller.states:
        detach(state)
    parameters = dict(root.named_parameters())
    for name, required in controller.required_grad.items():
        parameters[name].requires_grad_(required)
    controller.leave()
    if root.__dict__.pop(CALL, None) is not None:
        install_call(root, None)
    return root


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

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        install_call(self.root, self)

    # An outer torch.compile would trace through, and its backend knows nothing of subnets: it calls us as we are.
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain_call(self.root, *args, **kwargs)
        if self._compiled is None:
            self._compiled = compile_call(self.root, self._backend, RECOMPILE_LIMIT)
        controller = find_controller(self.root)
        assert controller is not None
        controller.ranks = ddp_group()
        _free_input_gradients(self.root)
        try:
            with asking_for_gradients(controller.states), whole_graphs(controller.ranks is not None):
                result = self._compiled(*args, **kwargs)
        except CompilerFailed as failure:
            inner = getattr(failure, "inner_exception", None)
            if isinstance(inner, LosiaError):
                raise inner from None
            raise
        warn_of_weights(controller)
        return result


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
