"""Which weights a model that is to be transformed may not hold; refused by name, before anything is changed."""

from __future__ import annotations

from losia_fx import registry
from losia_fx._compat import has_gradient_hooks, is_flattened
from losia_fx.config import LosiaConfig, matches
from losia_fx.errors import TransformError, listed

from .kinds import is_embedding, is_sharded
from .weight_plan import WeightPlan

THE_ROAD = (
    "transform the whole model first, and then shard it with fully_shard (FSDP2) or spread it with "
    "DistributedDataParallel"
)


def refuse_weights(plans: list[WeightPlan], config: LosiaConfig) -> None:
    """Raises TransformError where subnets of such weights, or beside them, would train something else unsaid."""
    # Named in exclude, a sharded weight stays frozen, as its owner has asked for; a flattened one has lost its name.
    linears = [plan for plan in plans if plan.kind is not None and not _is_excluded(plan, config)]
    learning = [plan for plan in plans if plan.trained != "frozen"]
    _refuse(
        [plan for plan in plans if is_flattened(plan.parameter)],
        f"flattened by FullyShardedDataParallel, which leaves no weights to take a subnet from: {THE_ROAD}",
    )
    _refuse(
        [plan for plan in linears if is_sharded(plan.parameter)],
        f"sharded over processes (a DTensor, as fully_shard and tensor parallel make them): {THE_ROAD}",
    )
    _refuse(
        [plan for plan in learning if plan.parameter.is_meta],
        "on the meta device, without values to train: load or initialise the model there where it is to train "
        "(to_empty() and load_state_dict(); from_pretrained without a device_map that offloads; no cpu_offload or "
        "disk_offload of accelerate's), and transform it then",
    )
    _refuse(
        [plan for plan in plans if registry.resolve(plan.parameter) is not None],
        "shared with another model that is transformed already, whose subnets they have: transform one module that "
        "holds both models, or losia_fx.restore() the other first",
    )


def refuse_renormed(plans: list[WeightPlan]) -> None:
    """Raises TransformError where an embedding's forward rewrites a weight that is to learn through a subnet: autograd
    refuses that in the midst of a step, and names no weight."""
    renormed = [
        plan
        for plan in plans
        if plan.trained == "subnet"
        and any(is_embedding(owner) and getattr(owner, "max_norm", None) is not None for _, owner, _ in plan.owners)
    ]
    _refuse(
        renormed,
        "an embedding with max_norm rewrites it in every forward, so no subnet of it can learn: leave out "
        "train_tied_head=True, or set the embedding's max_norm to None",
    )


def refuse_hooked(plans: list[WeightPlan]) -> None:
    """Raises TransformError where somebody is to be told of a weight's gradient, or to change it (a mask): there is
    none of the whole weight, and the subnet would learn past the hook."""
    hooked = [
        plan
        for plan in plans
        if plan.trained == "subnet"
        and plan.parameter not in registry.GRADIENT_HOOKS  # ours
        and has_gradient_hooks(plan.parameter)
    ]
    _refuse(
        hooked,
        "has hooks on its gradient (register_hook, register_post_accumulate_grad_hook), which its subnet would learn "
        "past: remove them, and put hooks for a gradient of the subnet's shape on "
        "losia_fx.subnets(model)[name].values after losia_fx.transform, or name the weight in exclude",
    )


def _refuse(plans: list[WeightPlan], why: str) -> None:
    if plans:
        raise TransformError(f"{listed([plan.name for plan in plans])}: {why}")


def _is_excluded(plan: WeightPlan, config: LosiaConfig) -> bool:
    return any(matches(name, config.exclude) for name, _, _ in plan.owners)
