"""Every private or young torch name that losia_fx needs, and every difference between the versions of torch that it
runs on (2.11 and newer), with the reason; tests/test_compat.py fails when one goes.

What is there for one version's sake says which version ends it.
"""

from torch._dynamo import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed as CompilerFailed

from .backends import backend_at_work
from .calls import (
    ISOLATES_RECOMPILES,
    be_called_while_traced,
    called_module,
    compile_call,
    compile_forward,
    compile_own_code,
    compiled_call,
    exchange_calls,
    has_step_hooks,
    install_call,
    other_calls,
    own_code,
    plain_call,
    runs_uncompiled,
)
from .graphs import (
    aot_compiler,
    compiled_apart,
    current_node,
    draw_as_eager,
    fake_inputs,
    graph_counts,
    graph_task_id,
    grouped_products,
    has_gradient_hooks,
    inner_compiler,
    input_index,
    is_exporting,
    is_jit_tracing,
    is_transformed,
    keep_saved_tensors,
    leaves,
    no_view,
    of_any_length,
    on_joint_graph,
    region_inputs,
    untraced,
)
from .parallel import (
    active_ddp,
    all_gather,
    ddp_group,
    ddp_ignores,
    is_flattened,
    joins,
    whole_graphs,
)
from .products import int8_product, settle
from .subclasses import no_torch_function, unwrapped, wrapper_of

__all__ = [
    "ISOLATES_RECOMPILES",
    "CompilerFailed",
    "OptimizedModule",
    "active_ddp",
    "all_gather",
    "aot_compiler",
    "backend_at_work",
    "be_called_while_traced",
    "called_module",
    "compile_call",
    "compile_forward",
    "compile_own_code",
    "compiled_apart",
    "compiled_call",
    "current_node",
    "ddp_group",
    "ddp_ignores",
    "draw_as_eager",
    "exchange_calls",
    "fake_inputs",
    "graph_counts",
    "graph_task_id",
    "grouped_products",
    "has_gradient_hooks",
    "has_step_hooks",
    "inner_compiler",
    "input_index",
    "install_call",
    "int8_product",
    "is_exporting",
    "is_flattened",
    "is_jit_tracing",
    "is_transformed",
    "joins",
    "keep_saved_tensors",
    "leaves",
    "no_torch_function",
    "no_view",
    "of_any_length",
    "on_joint_graph",
    "other_calls",
    "own_code",
    "plain_call",
    "region_inputs",
    "runs_uncompiled",
    "settle",
    "untraced",
    "unwrapped",
    "whole_graphs",
    "wrapper_of",
]
# OptimizedModule is what torch.compile(module) returns, around the module. CompilerFailed is raised around whatever a
# backend raises; it is unwrapped so that users read our error and not Dynamo's.
