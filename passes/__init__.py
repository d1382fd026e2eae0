"""The graph passes: graph in, graph out; no training state, no I/O."""

from .base import (
    GraphPass,
    Observer,
    PassPipeline,
    bodies,
    copy_graph_module,
    graph_modules,
    placeholders,
    region_of,
)
from .frozen_products import FrozenProducts
from .joint.loosen_views import LoosenViews
from .joint.remake_inputs import RemakeInputs
from .joint.settle_products import SettleProducts
from .joint.sink_gathers import SinkGathers
from .localize import InsertLocalization
from .match import Uses, find_uses, plan_subnets
from .pipeline import (
    DYNAMO,
    FORWARD_STAGES,
    JOINT,
    JOINT_STAGES,
    forward_pipeline,
    joint_pipeline,
    makes_joint_graphs,
)
from .products import Product
from .rewrite import SubnetRewrite, outputs_may_learn
from .rewritten import Rewritten, rewritten_from, rewritten_nodes

__all__ = [
    "DYNAMO",
    "FORWARD_STAGES",
    "JOINT",
    "JOINT_STAGES",
    "FrozenProducts",
    "GraphPass",
    "InsertLocalization",
    "LoosenViews",
    "Observer",
    "PassPipeline",
    "Product",
    "RemakeInputs",
    "Rewritten",
    "SettleProducts",
    "SinkGathers",
    "SubnetRewrite",
    "Uses",
    "bodies",
    "copy_graph_module",
    "find_uses",
    "forward_pipeline",
    "graph_modules",
    "joint_pipeline",
    "makes_joint_graphs",
    "outputs_may_learn",
    "placeholders",
    "plan_subnets",
    "region_of",
    "rewritten_from",
    "rewritten_nodes",
]
