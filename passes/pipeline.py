"""Every pass that losia_fx runs, in order, and the stages that a graph comes through."""

from __future__ import annotations

from collections.abc import Callable

from losia_fx.config import LosiaConfig
from losia_fx.plan import SubnetPlan

from .base import Observer, PassPipeline
from .frozen_products import FrozenProducts
from .joint.loosen_views import LoosenViews
from .joint.remake_inputs import RemakeInputs
from .joint.settle_products import SettleProducts
from .joint.sink_gathers import SinkGathers
from .localize import InsertLocalization
from .rewrite import SubnetRewrite

DYNAMO, JOINT = "dynamo", "joint"
"""The stages before any pass: the forward's graph as Dynamo gave it, and AOTAutograd's of forward and backward."""

Wanted = Callable[[LosiaConfig], bool]
"""Whether a pass is run under these options."""


def makes_joint_graphs(config: LosiaConfig) -> bool:
    """compiler="eager" runs the forward's graph as it is, and leaves the backward to autograd."""
    return config.compiler != "eager"


ForwardPass = type[SubnetRewrite] | type[InsertLocalization] | type[FrozenProducts]

FORWARD_PASSES: tuple[tuple[ForwardPass, Wanted], ...] = (
    (SubnetRewrite, lambda config: True),
    (InsertLocalization, lambda config: config.profiles),
    (FrozenProducts, lambda config: config.frozen_products is not None),
)
"""On the forward's graph, by the plan of its subnets."""

JointPass = type[SinkGathers] | type[RemakeInputs] | type[SettleProducts] | type[LoosenViews]

JOINT_PASSES: tuple[tuple[JointPass, Wanted], ...] = (
    (SettleProducts, lambda config: config.compiler == "inductor" and config.frozen_products == "int8"),
    (SinkGathers, makes_joint_graphs),
    (RemakeInputs, makes_joint_graphs),
    (LoosenViews, lambda config: config.compiler == "aot_eager"),  # Inductor needs none: it makes its own kernels
)
"""On the joint graph, before it is cut in two."""

FORWARD_STAGES = (DYNAMO, *(each.name for each, _ in FORWARD_PASSES))
JOINT_STAGES = (JOINT, *(each.name for each, _ in JOINT_PASSES))


def forward_pipeline(plan: SubnetPlan, config: LosiaConfig, observe: Observer | None = None) -> PassPipeline:
    """The passes on a graph of Dynamo's with this plan; none where nothing in it has a subnet."""
    passes = tuple(each(plan) for each, wanted in FORWARD_PASSES if plan.ports and wanted(config))
    return PassPipeline(passes, start=DYNAMO, observe=observe)


def joint_pipeline(config: LosiaConfig, observe: Observer | None = None) -> PassPipeline:
    """The passes on a joint graph."""
    return PassPipeline(tuple(each() for each, wanted in JOINT_PASSES if wanted(config)), start=JOINT, observe=observe)
