"""The graph passes: graph in, graph out; no training state, no I/O."""

from losia_fx.config import LosiaConfig
from losia_fx.plan import SubnetPlan

from .base import (
    GraphPass,
    Observer,
    PassPipeline,
    copy_graph_module,
    graph_modules,
    placeholders,
    region_of,
)
from .insert_localization import InsertLocalization
from .joint.loosen_views import LoosenViews
from .joint.remake_inputs import RemakeInputs
from .joint.sink_gathers import SinkGathers
from .match_linear import Uses, find_uses, plan_subnets
from .products import Product, find_products
from .subnet_rewrite import CALL, PRODUCT, SubnetRewrite, outputs_may_learn


def default_pipeline(plan: SubnetPlan, config: LosiaConfig) -> PassPipeline:
    """What losia_fx runs on every graph: the rewrite, and the localization where the config profiles anything."""
    passes: list[GraphPass] = [SubnetRewrite(plan)]
    if config.profiles:
        passes.append(InsertLocalization(plan))
    return PassPipeline(tuple(passes))


__all__ = [
    "CALL",
    "PRODUCT",
    "GraphPass",
    "InsertLocalization",
    "LoosenViews",
    "Observer",
    "PassPipeline",
    "Product",
    "RemakeInputs",
    "SinkGathers",
    "SubnetRewrite",
    "Uses",
    "copy_graph_module",
    "default_pipeline",
    "find_products",
    "find_uses",
    "graph_modules",
    "outputs_may_learn",
    "placeholders",
    "plan_subnets",
    "region_of",
]
