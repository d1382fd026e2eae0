from passes import (
    GraphPass as GraphPass,
    InsertLocalization as InsertLocalization,
    PassPipeline as PassPipeline,
    SubnetRewrite as SubnetRewrite,
    Use as Use,
    copy_graph_module as copy_graph_module,
    default_pipeline as default_pipeline,
    find_uses as find_uses,
    graph_modules as graph_modules,
    is_linear as is_linear,
    linear_arguments as linear_arguments,
    plan_subnets as plan_subnets,
)
