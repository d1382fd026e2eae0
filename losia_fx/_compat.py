"""Every private or young torch name that losia_fx needs, and every difference between the versions of torch that it
runs on (2.11 and newer), with the reason; tests/test_compat.py fails when one goes.

What is there for one version's sake says which version ends it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule as OptimizedModule
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import BackendCompilerFailed as CompilerFailed
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch

__all__ = [
    "CompilerFailed",
    "OptimizedModule",
    "active_ddp",
    "aot_compiler",
    "be_called_while_traced",
    "compile_call",
    "compile_own_code",
    "compiled_apart",
    "compiled_call",
    "current_node",
    "ddp_group",
    "ddp_ignores",
    "exchange_calls",
    "fake_inputs",
    "graph_counts",
    "graph_task_id",
    "grouped_products",
    "inner_compiler",
    "input_index",
    "install_call",
    "is_exporting",
    "is_flattened",
    "is_jit_tracing",
    "keep_saved_tensors",
    "leaves",
    "not_installed",
    "on_joint_graph",
    "own_code",
    "plain_call",
    "region_inputs",
    "runs_uncompiled",
    "untraced",
    "whole_graphs",
]
# OptimizedModule is what torch.compile(module) returns, around the module. CompilerFailed is raised around whatever a
# backend raises; it is unwrapped so that users read our error and not Dynamo's.


def graph_counts() -> tuple[int, int]:
    """Graphs that Dynamo has made in this process so far, and the breaks it met."""
    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values())


def graph_task_id() -> int:
    """The number of the backward pass that is running, -1 outside of one.

    Nothing public tells two uses of a weight in one backward from two backwards of one graph (retain_graph), and only
    the first of a pass may start the full gradient anew.
    """
    return int(torch._C._current_graph_task_id())


def current_node() -> Any:
    """The node of autograd's graph whose backward, or hook before it, is running.

    A hook that held its own node would keep it, and what it has saved, for ever.
    """
    return torch._C._current_autograd_node()


def fake_inputs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` as fake tensors of the graph being compiled, with static shapes.

    Inputs that a backend appends are unknown to Dynamo: real tensors would get symbolic sizes from the inner compiler,
    and guards on those fail. Under a plain call (no tracing) the tensors themselves come back.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return list(tensors)
    return [context.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


@contextmanager
def compiled_apart() -> Iterator[None]:
    """Context for compiling a second graph in a backend call: what that notes down is not mistaken for the first's."""
    context = TracingContext.try_get()
    with tracing(TracingContext(None if context is None else context.fake_mode)):
        yield


def inner_compiler(name: str) -> Callable[..., Any]:
    """The compiler function behind a backend's name ("inductor", "aot_eager", "eager")."""
    return torch._dynamo.lookup_backend(name)


Keep = Callable[[fx.GraphModule], None]


def aot_compiler(name: str, forward: Keep, backward: Keep) -> Callable[..., Any]:
    """A backend that shows the graphs that AOTAutograd makes for the compiler ``name``, and runs them as they are.

    Both are shown when the graph is compiled; by default the backward would be when it first runs.
    inductor gets its own decompositions; it and aot_eager recompute in the backward what is cheap (the min-cut
    partition), eager keeps all that autograd keeps. torch's own backends show no graph.
    """
    partition: Callable[..., Any] = min_cut_rematerialization_partition
    options: dict[str, Any] = {}
    if name == "inductor":
        from torch._inductor.decomposition import select_decomp_table

        partition = partial(partition, compiler="inductor")
        options["decompositions"] = select_decomp_table
    elif name == "eager":
        partition = default_partition

    def shown(keep: Keep) -> Callable[..., Any]:
        def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            keep(gm)
            run: Callable[..., Any] = make_boxed_func(gm.forward)
            return run

        return compiler

    aot = aot_autograd(fw_compiler=shown(forward), bw_compiler=shown(backward), partition_fn=partition, **options)

    def compile_both(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            return aot(gm, inputs)

    return compile_both


def input_index(node: fx.Node) -> int | None:
    """Which input of the graph that AOTAutograd was given a placeholder of its graphs stands for; None for others."""
    described = node.meta.get("desc")
    return described.idx if isinstance(described, PlainAOTInput) else None


def region_inputs(target: Any) -> int | None:
    """Where the inputs of a region start in its node's args: args[0] is its body, whose placeholders they match.

    Regions are Dynamo's nodes for activation checkpointing and for torch.compiler.nested_compile_region; the second has
    a name that identifies the body as args[1]. None for any other fx target.
    """
    if target is torch.ops.higher_order.tag_activation_checkpoint:
        return 1
    return 2 if target is torch.ops.higher_order.invoke_subgraph else None


def grouped_products() -> frozenset[Any]:
    """The fx targets (x, weight, offs=...) -> y that multiply rows sorted by expert: F.grouped_mm, its older private
    name, and the operator that transformers has for dtypes which those do not take under a compiler."""
    found: set[Any] = {F.grouped_mm, torch._grouped_mm}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):  # only once transformers is imported
        packet = torch.ops.transformers.grouped_mm_fallback
        found |= {packet, packet.default}
    return frozenset(found)


def leaves(value: Any) -> list[Any]:
    """What stands in ``value``, a nest of containers: of lists, dictionaries, and what else (transformers' outputs) is
    registered as one."""
    found: list[Any] = tree_leaves(value)
    return found


def no_view(y: torch.Tensor) -> torch.Tensor:
    """``y``, of which nobody else knows, in a form that an autograd.Function may return and its user change in place.

    The compilers' decomposition of F.linear ends in a view where x is not contiguous; the kernel's never does.
    """
    if not y._is_view():
        return y
    owned: torch.Tensor = torch.ops.aten._unsafe_view.default(y, y.shape)
    return owned


def plain_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What calling ``module`` does when nothing is compiled: hooks and forward."""
    return type(module)._call_impl(module, *args, **kwargs)


Function = TypeVar("Function", bound=Callable[..., Any])


def runs_uncompiled(function: Function) -> Function:
    """``function``, which Dynamo may inline but never compiles as a frame of its own.

    Where Dynamo gives up on a frame it goes on with the functions called from there; compiled, ours would take its
    "is a compiler at work" branch in eager runs too. torch.compiler.disable would break the graphs that inline it.
    """
    skip_code(function.__code__)
    return function


ISOLATES_RECOMPILES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""torch.compile can count the graphs of one call apart from those of others: 2.13 and newer."""


@runs_uncompiled
def compile_call(module: nn.Module, backend: Callable[..., Any], recompile_limit: int) -> Callable[..., Any]:
    """``plain_call`` of the module, compiled.

    The limit is raised and held apart from that of other modules: the code that is compiled here, Module._call_impl,
    is the same for all modules of a process, and so would be its limit of 8 graphs.
    """
    if not ISOLATES_RECOMPILES:
        return compile_own_code(module, backend, recompile_limit)
    limits: dict[str, Any] = {"recompile_limit": recompile_limit, "isolate_recompiles": True}  # not in the overloads
    compiled: Callable[..., Any] = torch.compile(MethodType(type(module)._call_impl, module), backend=backend, **limits)
    return compiled


@runs_uncompiled
def compile_own_code(module: nn.Module, backend: Callable[..., Any], recompile_limit: int) -> Callable[..., Any]:
    """compile_call for torch 2.11 and 2.12; ends with 2.13, where torch.compile isolates and takes the limit.

    Dynamo counts graphs by code object, so every module gets one of its own. It cannot be a new _call_impl: Dynamo
    passes over that frame, as torch's, and counts the ones that it calls. (So it does with frames that a graph break
    leaves: those share their count with other modules.)
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self)._call_impl(self, *args, **kwargs)

    compiled = torch.compile(MethodType(own_code(call), module), backend=backend)

    @runs_uncompiled
    def limited(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=recompile_limit):
            return compiled(*args, **kwargs)

    return limited


_CALL = "_compiled_call_impl"


def install_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Makes ``module(...)`` run ``call``, as Module.compile does: same object, not in copies. None undoes it."""
    if call is None:
        module.__dict__.pop(_CALL, None)
    else:
        module.__dict__[_CALL] = call


_IMPL = "_call_impl"


def be_called_while_traced(module: nn.Module, really: bool) -> None:
    """Has Dynamo, where another's graph calls ``module``, look at what was installed: of a module whose _call_impl is
    the class's it takes the forward at once. really: False undoes it."""
    if really:
        module.__dict__[_IMPL] = partial(type(module)._call_impl, module)
    else:
        module.__dict__.pop(_IMPL, None)


def exchange_calls(places: Iterable[dict[str, Any]], calls: Iterable[Callable[..., Any] | None]) -> None:
    """As ``install_call``, of many modules, given by their __dict__, whose calls will be exchanged again soon: None is
    left standing in the place, where Module's own None is."""
    for place, call in zip(places, calls, strict=True):
        place[_CALL] = call


def not_installed(calls: Mapping[nn.Module, Callable[..., Any]]) -> list[nn.Module]:
    """The modules that run something else than what ``install_call`` gave them."""
    return [module for module, call in calls.items() if module.__dict__.get(_CALL) is not call]


def ddp_group() -> ProcessGroup | None:
    """The processes of the DistributedDataParallel whose forward is under way; None outside of one."""
    ddp = active_ddp()
    return None if ddp is None else ddp.process_group


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own, by which Dynamo tells frames and counts their graphs."""
    assert isinstance(function, FunctionType)
    code, defaults = function.__code__.replace(), function.__defaults__
    own = FunctionType(code, function.__globals__, function.__name__, defaults, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is under way; None outside of one."""
    found: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return found


def ddp_ignores(module: nn.Module, add: Collection[str] = (), remove: Collection[str] = ()) -> None:
    """Parameters and buffers, by name, that a DistributedDataParallel made around ``module`` later leaves alone.

    Documented in DistributedDataParallel, but experimental: the names are an attribute of the module.
    """
    names = set(getattr(module, _DDP_IGNORES, ()))
    names = (names | set(add)) - set(remove)
    if names:
        setattr(module, _DDP_IGNORES, sorted(names))
    elif hasattr(module, _DDP_IGNORES):
        delattr(module, _DDP_IGNORES)


_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def whole_graphs(under_ddp: bool) -> AbstractContextManager[Any]:
    """Context in which Dynamo cuts no graph up for DistributedDataParallel's buckets.

    The pieces are compiled with stand-ins for the parameters, in which no subnet can be found; and what is reduced is
    the subnets' gradients, which are small.
    """
    return torch._dynamo.config.patch(optimize_ddp=False) if under_ddp else nullcontext()


@contextmanager
def keep_saved_tensors() -> Iterator[None]:
    """Context for compiling: the backward may run twice (retain_graph), as it may without a compiler.

    AOTAutograd otherwise lets it reuse the memory of what the forward saved. A graph compiled without that has None for
    the list of such tensors, which the check before a backward that retains its graph (2.11 to 2.15) takes for some: an
    empty list is what it understands.
    """
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is not None and metadata.bw_donated_idxs is None:
        metadata.bw_donated_idxs = []


@contextmanager
def on_joint_graph(edit: Callable[[fx.GraphModule], Any]) -> Iterator[None]:
    """Context for compiling: ``edit`` is shown the graph of forward and backward together, before it is cut in two.

    What is saved for the backward is decided by the cut, so whatever is to change that has to come before it. The
    compilers' caches do not know of it: it must follow from the graph alone (see tests/ops/test_version.py).
    """
    config = torch._functorch.config
    others = config.joint_custom_pass

    def edited(gm: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        gm = others(gm, inputs) if callable(others) else gm
        edit(gm)
        return gm

    with config.patch(joint_custom_pass=edited):
        yield


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What runs instead of the module's own call: that of Module.compile(), or what ``install_call`` put there."""
    found: Callable[..., Any] | None = module._compiled_call_impl
    return found


def is_exporting() -> bool:
    """Whether torch.export (strict or not), torch.onnx or torch.jit is tracing: what is made has no training in it.

    By the flag itself: below 2.13 Dynamo takes torch.compiler.is_exporting() for true in every torch.compile.
    """
    return torch.compiler._is_exporting_flag or is_jit_tracing()


@contextmanager
def untraced() -> Iterator[None]:
    """Context in the midst of an export: real tensors are written for good, and nothing of it shows in the program."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def is_jit_tracing() -> bool:
    return bool(torch._C._get_tracing_state())


def is_flattened(parameter: nn.Parameter) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) keeps it flattened: as a part of others, or made of others.

    Where it keeps the original parameters nothing else tells them from any other.
    """
    return bool(getattr(parameter, "_fsdp_flattened", False))
