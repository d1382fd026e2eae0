"""Which weights of a model get a subnet, which train in full, which stay frozen, and why. Nothing is changed here."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from losia_fx.config import LosiaConfig, matches
from losia_fx.errors import ConfigError, LosiaWarning, TransformError, listed

from .blocks import block_of, find_blocks, find_heads, plain_name
from .kinds import adapters_in, is_embedding, kind_of, reparametrised
from .refusals import refuse_hooked, refuse_renormed, refuse_weights
from .weight_plan import WeightPlan

ADAPTER = "adapter of PEFT's: name it in trainable to train it, or merge_and_unload() the adapters first"


def plan_model(root: nn.Module, config: LosiaConfig) -> list[WeightPlan]:
    """What transform() does with every parameter, in the order of named_parameters().

    Raises TransformError for a model without linears, one in which none would learn, weights that cannot be trained
    where they are (refusals.py) or a float8 weight that would; ConfigError for patterns that match nothing.
    """
    plans = judge_weights(root, config)
    refuse_weights(plans, config)
    linears = [plan for plan in plans if plan.kind is not None]
    if not linears:
        raise TransformError(f"{type(root).__name__} has no linear layer: there is nothing to train through subnets")
    if not any(plan.trained == "subnet" for plan in plans):
        reasons = "; ".join(sorted({plan.why for plan in linears}))
        raise TransformError(f"no linear weight of {type(root).__name__} would learn: {reasons}")
    refuse_renormed(plans)
    refuse_hooked(plans)
    refuse_float8(plans)
    _warn_of_adapters(plans)
    _warn_of_frozen([plan for plan in plans if plan.trained == "subnet"])
    return plans


def refuse_float8(plans: Iterable[WeightPlan]) -> None:
    """Raises TransformError where a float8 weight is to learn.

    W[rows, cols] = S would round the updates away, and what a layer multiplies with is such a weight times a scale that
    only the layer knows.
    """
    found = [plan for plan in plans if plan.trained != "frozen" and _is_float8(plan.parameter)]
    if found:
        dtypes = ", ".join(sorted({str(plan.parameter.dtype).removeprefix("torch.") for plan in found}))
        raise TransformError(
            f"float8 weights cannot learn: {listed([plan.name for plan in found])} ({dtypes}). Dequantise the model "
            "(transformers: FineGrainedFP8Config(dequantize=True)), or name them in exclude: they stay frozen then"
        )


def judge_weights(root: nn.Module, config: LosiaConfig, everywhere: bool = False) -> list[WeightPlan]:
    """A WeightPlan for every parameter. ``everywhere``: linears outside the repeated blocks learn too.

    Raises ConfigError for patterns that match nothing.
    """
    heads = {id(weight) for head in find_heads(root) if (weight := head._parameters.get("weight")) is not None}
    blocks = find_blocks(root)
    plans = [_judge(plan, config, blocks, heads, everywhere) for plan in _parameters(root)]
    _freeze_adapters(plans, adapters_in(root))
    _check_patterns(config, plans, [plan for plan in plans if plan.kind is not None])
    return plans


def _parameters(root: nn.Module) -> list[WeightPlan]:
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((plain_name(name), module, key))
    return [WeightPlan(plain_name(name), p, owners[id(p)], "frozen", "") for name, p in root.named_parameters()]


def _judge(plan: WeightPlan, config: LosiaConfig, blocks: list[str], heads: set[int], everywhere: bool) -> WeightPlan:
    plan.kind = next((k for _, owner, key in plan.owners if (k := kind_of(owner, key, plan.parameter))), None)
    plan.whole_cols = id(plan.parameter) in heads
    named = matches(plan.name, config.trainable)
    if named is not None and plan.parameter.is_floating_point():
        plan.trained, plan.why = "full", f"named in trainable: {named!r}"
    elif plan.kind is not None:
        refusal = _refusal(plan, config, blocks, everywhere)
        plan.trained, plan.why = ("frozen", refusal) if refusal else ("subnet", _role(plan, blocks))
    elif any(reparametrised(owner, key) for _, owner, key in plan.owners):
        plan.why = "part of a reparametrised weight (weight norm or the like): left dense; name it in trainable"
    else:
        plan.why = f"{'bias' if plan.name.endswith('bias') else 'no linear weight'}; name it in trainable to train it"
    return plan


def _freeze_adapters(plans: list[WeightPlan], adapters: set[int]) -> None:
    """A subnet of an adapter would be a part of a part; what is not named in trainable stays as it is."""
    for plan in plans:
        if id(plan.parameter) in adapters and plan.trained != "full":
            plan.trained, plan.why, plan.outside = "frozen", ADAPTER, False


def _warn_of_adapters(plans: list[WeightPlan]) -> None:
    names = [plan.name for plan in plans if plan.why == ADAPTER and plan.parameter.requires_grad]
    if names:
        warnings.warn(
            f"losia_fx: {listed(names)}: adapters of PEFT's, which required grad, are frozen: the subnets are in the "
            "weights that they adapt. Name them in trainable to train them too, or merge_and_unload() them first",
            LosiaWarning,
            stacklevel=4,
        )


def _warn_of_frozen(learning: list[WeightPlan]) -> None:
    """Whoever has frozen all of them, as PEFT does, wants them to learn now; whoever has frozen some may not."""
    frozen = [plan.name for plan in learning if not plan.parameter.requires_grad]
    if 0 < len(frozen) < len(learning):
        warnings.warn(
            f"losia_fx: {len(frozen)} of the {len(learning)} weights that get subnets did not require grad "
            f"({listed(frozen)}), and learn from now on. Name them in exclude to leave them frozen",
            LosiaWarning,
            stacklevel=4,
        )


def _role(plan: WeightPlan, blocks: list[str]) -> str:
    if plan.whole_cols:
        return "output head: rows only"
    block = next((block_of(name, blocks) for name in _module_names(plan)), None)
    return f"{plan.kind} of block {block}" if block else str(plan.kind)


def _module_names(plan: WeightPlan) -> list[str]:
    return [name for name, _, _ in plan.owners]


def _refusal(plan: WeightPlan, config: LosiaConfig, blocks: list[str], everywhere: bool) -> str | None:
    """Why a linear weight gets no subnet, or None."""
    names = _module_names(plan)
    excluded = next((hit for name in names if (hit := matches(name, config.exclude))), None)
    targeted = config.target is None or any(matches(name, config.target) for name in names)
    no_head = plan.whole_cols and config.output_rank_factor == 0
    plan.chosen = excluded is not None or no_head or not targeted
    checks = [
        (excluded is not None, f"named in exclude: {excluded!r}"),
        (_is_tied(plan) and not config.train_tied_head, "tied to an embedding: left dense; train_tied_head trains it"),
        (plan.parameter.dim() not in (2, 3), f"stored as {_stored(plan.parameter)}"),
        (not plan.parameter.is_floating_point(), f"stored as {_stored(plan.parameter)}"),
        (not _is_plain(plan), f"type {type(plan.parameter).__name__}: left dense"),
        (no_head, "output head, and output_rank_factor is 0"),
    ]
    for refused, why in checks:
        if refused:
            return why
    inside = plan.whole_cols or any(block_of(name, blocks) for name in names)
    plan.outside = bool(blocks) and not inside
    if config.target is not None:
        return None if targeted else "not named in target"
    if plan.outside and not everywhere:
        return "outside the repeated blocks; name it in trainable to train it in full, or in target"
    return None


def _is_plain(plan: WeightPlan) -> bool:
    return type(plan.parameter) is nn.Parameter and type(plan.parameter.data) is torch.Tensor


def _is_float8(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.element_size() == 1


def _is_tied(plan: WeightPlan) -> bool:
    return any(is_embedding(owner) for _, owner, _ in plan.owners)


def _stored(parameter: nn.Parameter) -> str:
    own = "" if type(parameter) is nn.Parameter else f" ({type(parameter).__name__})"
    return f"{parameter.dim()}-D {str(parameter.dtype).removeprefix('torch.')}{own}: left dense"


def _check_patterns(config: LosiaConfig, plans: list[WeightPlan], linears: list[WeightPlan]) -> None:
    """Raises ConfigError at a pattern that matches nothing: a slip of the pen would train something else unsaid."""
    modules = [name for plan in linears for name in _module_names(plan)]
    parameters = [plan.name for plan in plans]
    _must_match("target", config.target or (), modules, "linear weight")
    _must_match("exclude", config.exclude, modules, "linear weight")
    _must_match("trainable", config.trainable, parameters, "parameter")


def _must_match(option: str, patterns: Iterable[str], names: list[str], what: str) -> None:
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            some = ", ".join(names[:3])
            raise ConfigError(f"{option} pattern {pattern!r} matches no {what}; there are {len(names)}, such as {some}")
