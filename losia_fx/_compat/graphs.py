"""Dynamo's and AOTAutograd's graphs, fakes and configs, autograd's running backward, and what traces a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch.utils._pytree import tree_leaves


def graph_counts() -> tuple[int, int]:
    """Graphs that Dynamo has made in this process so far, and the breaks it met."""
    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values())


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is at work on what is called."""
    return bool(torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0)


def has_gradient_hooks(leaf: torch.Tensor) -> bool:
    """Whether somebody is to be told of the gradients that come to it, or to change them."""
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)


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


def of_any_length(tensor: Tensor) -> None:
    """Has torch.compile make one graph for all lengths of ``tensor`` (n,), from the first call on; of nothing else.

    There is no public way but dynamic=True, which makes variables of the floats among the arguments as well.
    """
    torch._dynamo.maybe_mark_dynamic(tensor, 0)


@contextmanager
def compiled_apart() -> Iterator[None]:
    """Context for compiling a second graph in a backend call: what that notes down is not mistaken for the first's."""
    context = TracingContext.try_get()
    with tracing(TracingContext(None if context is None else context.fake_mode)):
        yield


def inner_compiler(name: str) -> Callable[..., Any]:
    """The compiler function behind a backend's name ("inductor", "aot_eager", "eager")."""
    if name == "inductor":
        from .inductor_order import keep_reads_behind_writes  # imports all of Inductor
        from .inductor_pooling import divide_by_what_is_pooled

        keep_reads_behind_writes()  # until torch 2.14, which does so itself
        divide_by_what_is_pooled()
    return torch._dynamo.lookup_backend(name)


def draw_as_eager() -> None:
    """From now on, in this process, Inductor's graphs draw the random numbers that eager mode does: by default they
    have a generator of their own, and with dropout that is another model."""
    torch._inductor.config.fallback_random = True


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
