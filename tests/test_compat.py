"""Every private or young torch name that losia_fx needs is in losia_fx/_compat.py, and is still there in torch.

So is every difference between versions of torch; a test here fails when it is one no longer.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import memory, sizevars
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen import cpp
from torch._inductor.dependencies import WeakDep
from torch._inductor.lowering import lowerings
from torch._inductor.scheduler import SchedulerNode
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils._sympy.functions import FloorDiv, ModularIndexing
from torch.utils.checkpoint import checkpoint

from losia_fx import _compat
from losia_fx._compat import cpp_kernels, inductor_order, inductor_pooling
from losia_fx.passes.nodes import use_of
from losia_fx.tools.requirements import release, requirements

ROOT = Path(__file__).parent.parent
COMPAT = sorted((ROOT / "losia_fx" / "_compat").glob("*.py"))
PRIVATE = ("torch._C", "torch._dynamo", "torch._guards", "torch._functorch", "torch._inductor")


def test_compiler_failed_is_what_a_backends_error_comes_in() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(_compat.CompilerFailed) as caught:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert isinstance(caught.value.inner_exception, KeyError)


def test_graph_counts() -> None:
    def broken(x: Tensor) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    before = _compat.graph_counts()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    torch.compile(broken, backend="eager")(torch.ones(2))
    graphs, breaks = (now - then for now, then in zip(_compat.graph_counts(), before, strict=True))
    assert (graphs, breaks) == (3, 1)


def test_graph_task_id_tells_backwards_apart() -> None:
    seen: list[int] = []
    assert _compat.graph_task_id() == -1
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    for tensor in (x, y):
        tensor.register_hook(lambda grad: seen.append(_compat.graph_task_id()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert len(seen) == 4
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert -1 not in seen
    assert _compat.graph_task_id() == -1


def test_is_transformed() -> None:
    seen: list[bool] = []

    def note(x: Tensor) -> Tensor:
        seen.append(_compat.is_transformed())
        return x * 2

    x = torch.ones(2)
    note(x)
    torch.func.vmap(note)(x)
    torch.func.jvp(note, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        note(torch.autograd.forward_ad.make_dual(x, x))
    note(x)
    assert seen == [False, True, True, True, False]


def test_has_gradient_hooks() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not _compat.has_gradient_hooks(x)
    for register in (x.register_hook, x.register_post_accumulate_grad_hook):
        hook = register(lambda _: None)
        assert _compat.has_gradient_hooks(x)
        hook.remove()
        assert not _compat.has_gradient_hooks(x)


def test_has_step_hooks() -> None:
    optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)])
    assert not _compat.has_step_hooks(optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    assert not _compat.has_step_hooks(optimizer)
    optimizer.register_step_pre_hook(lambda *_: None)
    assert _compat.has_step_hooks(optimizer)


def test_backend_at_work() -> None:
    """While it makes a graph, and for what the frames that break one call."""
    seen: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(_compat.backend_at_work())
        return gm.forward

    @torch._dynamo.disable(recursive=False)
    def apart(x: torch.Tensor) -> torch.Tensor:
        seen.append(_compat.backend_at_work())
        return x

    assert _compat.backend_at_work() is None
    torch.compile(lambda x: apart(x + 1) + 2, backend=backend)(torch.ones(2))
    assert len(seen) >= 3
    assert all(each is backend for each in seen)
    assert _compat.backend_at_work() is None


@pytest.mark.parametrize("throws", [False, True])
def test_joins(throws: bool, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(nn.Linear(2, 2))
        assert not _compat.joins(ddp)
        with Join([ddp], throw_on_early_termination=throws):
            assert _compat.joins(ddp) is not throws
    finally:
        dist.destroy_process_group()


def test_fake_inputs_outside_of_tracing_are_the_tensors() -> None:
    tensors = [torch.ones(2), torch.arange(3)]
    assert all(a is b for a, b in zip(_compat.fake_inputs(tensors), tensors, strict=True))


def test_fake_inputs_while_tracing_have_static_shapes() -> None:
    made: list[Tensor] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        made.extend(_compat.fake_inputs([torch.ones(2, 3)]))
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.ones(4, 5))
    (fake,) = made
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert all(type(size) is int for size in fake.shape)
    assert tuple(fake.shape) == (2, 3)


@pytest.mark.parametrize("name", ["eager", "aot_eager", "inductor"])
def test_inner_compiler(name: str) -> None:
    gm = torch.fx.symbolic_trace(lambda x: x * 2)
    compiler = _compat.inner_compiler(name)
    assert callable(compiler)
    if name == "eager":
        result = compiler(gm, [torch.ones(2)])(torch.ones(2))
        torch.testing.assert_close(result[0] if isinstance(result, tuple) else result, 2 * torch.ones(2))


def test_region_inputs_of_a_checkpoint() -> None:
    targets: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(node.target for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    def step(x: Tensor) -> Tensor:
        return checkpoint(torch.sin, x, use_reentrant=False)

    torch.compile(step, backend=backend, fullgraph=True)(torch.ones(2, requires_grad=True))
    assert 1 in [_compat.region_inputs(target) for target in targets]
    assert _compat.region_inputs(torch.relu) is None


def test_region_inputs_of_a_region_compiled_by_itself() -> None:
    nodes: list[torch.fx.Node] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.extend(gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph))
        return _compat.inner_compiler("aot_eager")(gm, inputs)

    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return torch.sin(x)

    torch.compile(lambda x: region(region(x)), backend=backend, fullgraph=True)(torch.ones(2))
    node, _ = nodes
    assert _compat.region_inputs(node.target) == 2
    assert isinstance(node.args[1], str)  # what identifies the body, before the inputs


def test_grouped_products_are_what_dynamo_writes() -> None:
    targets: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(node.target for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    x, w = torch.randn(16, 32, dtype=torch.bfloat16), torch.randn(2, 32, 16, dtype=torch.bfloat16)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    torch.compile(lambda: torch.nn.functional.grouped_mm(x, w, offs=ends), backend=backend)()
    assert targets
    assert set(targets) <= _compat.grouped_products()


def test_no_view_can_be_changed_in_place_where_a_compiler_makes_a_view() -> None:
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            return _compat.no_view(torch.nn.functional.linear(x, w))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return torch.ones(4, 5, 7), None

    def changed(x: Tensor, w: Tensor) -> Tensor:
        return Linear.apply(x.mT, w).add_(1.0)  # type: ignore[no-any-return]

    x, w = torch.randn(4, 7, 5, requires_grad=True), torch.randn(10, 7)
    y = torch.compile(changed, backend="aot_eager")(x, w)
    torch.testing.assert_close(y, x.mT @ w.t() + 1.0)
    assert torch.equal(_compat.no_view(w), w)
    assert _compat.no_view(w).data_ptr() == w.data_ptr()


def test_no_view_is_the_tensor_itself_where_it_is_no_view() -> None:
    y = torch.randn(2, 3)
    assert _compat.no_view(y) is y
    assert not _compat.no_view(y.mT)._is_view()


def compiled_seeing_joint_graphs(edit: Callable[[torch.fx.GraphModule], Any]) -> Callable[..., Any]:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        with _compat.on_joint_graph(edit):
            return _compat.inner_compiler("aot_eager")(gm, inputs)

    compiled: Callable[..., Any] = torch.compile(lambda x: torch.sin(x).sum(), backend=backend)
    return compiled


def test_on_joint_graph_shows_forward_and_backward_and_runs_what_becomes_of_them() -> None:
    """torch asks for joint_custom_pass, and names the gradients that come in tangents: both are private."""
    seen: list[list[str]] = []

    def edit(gm: torch.fx.GraphModule) -> None:
        seen.append([str(node.target) for node in gm.graph.nodes])
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default):
            node.target = torch.ops.aten.exp.default
        gm.recompile()

    before = torch._functorch.config.joint_custom_pass
    x = torch.randn(3, requires_grad=True)
    compiled_seeing_joint_graphs(edit)(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.detach().exp())
    (targets,) = seen
    assert {"aten.sin.default", "aten.cos.default"} <= set(targets)
    assert any("tangents" in target for target in targets)
    assert torch._functorch.config.joint_custom_pass is before


def test_on_joint_graph_comes_after_the_users_own_pass() -> None:
    order: list[str] = []

    def users(gm: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        order.append("user")
        made = torch.fx.GraphModule(gm, gm.graph)
        made.meta["made by"] = "user"
        return made

    x = torch.randn(3, requires_grad=True)
    with torch._functorch.config.patch(joint_custom_pass=users):
        compiled_seeing_joint_graphs(lambda gm: order.append(gm.meta.get("made by", "torch")))(x).backward()
        assert torch._functorch.config.joint_custom_pass is users
    assert order == ["user", "user"]
    torch.testing.assert_close(x.grad, x.detach().cos())


def test_plain_call_runs_hooks_and_nothing_compiled() -> None:
    module = nn.Linear(2, 2)
    called: list[str] = []
    module.register_forward_hook(lambda *_: called.append("hook"))
    _compat.install_call(module, lambda *_: called.append("installed"))
    x = torch.ones(1, 2)
    result = _compat.plain_call(module, x)
    torch.testing.assert_close(result, torch.nn.functional.linear(x, module.weight, module.bias))
    assert called == ["hook"]


def test_install_call_and_undo() -> None:
    module = nn.Linear(2, 2)
    before = sorted(module.__dict__)
    _compat.install_call(module, lambda x: "installed")
    assert module(torch.ones(1, 2)) == "installed"
    assert isinstance(copy.deepcopy(module)(torch.ones(1, 2)), Tensor)
    _compat.install_call(module, None)
    assert isinstance(module(torch.ones(1, 2)), Tensor)
    assert sorted(module.__dict__) == before
    _compat.install_call(module, None)  # twice is no error


def test_exchange_calls_and_who_runs_something_else() -> None:
    modules = [nn.Linear(2, 2) for _ in range(3)]
    calls = [lambda x, n=number: n for number in range(3)]
    places = [module.__dict__ for module in modules]
    _compat.exchange_calls(places, calls)
    assert [module(None) for module in modules] == [0, 1, 2]
    assert _compat.other_calls(places, calls) == []
    modules[1].compile(backend="eager")
    _compat.exchange_calls([modules[2].__dict__], [None])
    assert _compat.other_calls(places, calls) == [1, 2]


def test_dynamo_goes_past_an_installed_call() -> None:
    """Straight to the forward: no trace of the call in a graph, and no guard on it, so equal modules share a graph."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    for module in (Wrapped(), Wrapped(), Wrapped()):
        _compat.install_call(module.linear, lambda x: pytest.fail("called"))
        module.compile(backend=backend)
        assert module(torch.ones(1, 2)).shape == (1, 2)
    assert len(graphs) == 1
    assert [node.op for node in graphs[0].graph.nodes].count("call_function") == 1


def test_a_module_to_be_called_while_traced_is() -> None:
    """What is installed on it is then in another's graph; undone, the forward is again."""
    module = Wrapped()
    before = sorted(module.linear.__dict__)
    _compat.install_call(module.linear, lambda x: x * 3)
    x = torch.ones(1, 2)
    for call in (_compat.plain_call, None):
        torch._dynamo.reset()
        _compat.be_called_while_traced(module.linear, call)
        y = torch.compile(module, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(y, x * 3 if call else module.linear.forward(x))
    _compat.install_call(module.linear, None)
    assert sorted(module.linear.__dict__) == before


def test_whose_call_it_is_that_runs_what_was_installed() -> None:
    seen: list[Any] = []
    module, other = Wrapped(), Wrapped()

    @torch.compiler.disable(recursive=False)
    def call(x: Tensor) -> Tensor:
        seen.append(_compat.called_module())
        return x

    _compat.install_call(module, call)
    other.__dict__.update(module.__dict__)
    for each in (module, other):
        each(torch.ones(1, 2))
    call(torch.ones(1, 2))
    assert [one is of for one, of in zip(seen, (module, other, None), strict=True)] == [True] * 3


def test_own_code_is_counted_apart() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    own = _compat.own_code(double)
    assert own.__code__ is not double.__code__
    assert own(3) == 6


def test_ddp_ignores(tmp_path: Path) -> None:
    """DistributedDataParallel sends round no buffer that is named so."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = nn.BatchNorm1d(2)
        _compat.ddp_ignores(module, add={"running_mean", "running_var"})
        left = nn.parallel.DistributedDataParallel(module).modules_buffers
        assert [buffer is module.num_batches_tracked for buffer in left] == [True]
        _compat.ddp_ignores(module, add={"num_batches_tracked"}, remove={"running_var"})
        assert set(module._ddp_params_and_buffers_to_ignore) == {"num_batches_tracked", "running_mean"}
        _compat.ddp_ignores(module, remove={"num_batches_tracked", "running_mean"})
        assert not hasattr(module, "_ddp_params_and_buffers_to_ignore")
    finally:
        dist.destroy_process_group()


class Tells(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if _compat.is_exporting() else x - 1


def test_is_exporting() -> None:
    x = torch.zeros(1)
    assert float(Tells()(x)) == -1
    for strict in (True, False):
        assert float(torch.export.export(Tells(), (x,), strict=strict).module()(x)) == 1
    traced: Any = torch.jit.trace(Tells(), (x,), check_trace=False)  # type: ignore[no-untyped-call]
    assert float(traced(x)) == 1
    assert not _compat.is_jit_tracing()
    assert float(torch.compile(Tells(), backend="eager")(x)) == -1


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


WAYS = [_compat.compile_call, _compat.compile_own_code]


def names_of_graphs(graphs: list[str], name: str) -> Callable[..., Any]:
    """A backend that says whose graph it compiles."""

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(name)
        return gm.forward

    return backend


@pytest.mark.parametrize("way", WAYS)
def test_compile_call_counts_the_graphs_of_each_module_apart(way: Callable[..., Any]) -> None:
    graphs: list[str] = []
    x = torch.ones(1, 2)
    for index in range(12):  # more than Dynamo's limit of 8 for one code object
        module = Wrapped()
        torch.testing.assert_close(
            way(module, names_of_graphs(graphs, str(index)), recompile_limit=4)(x), module.linear(x)
        )
    assert graphs == [str(index) for index in range(12)]


@pytest.mark.parametrize("way", WAYS)
def test_compile_call_holds_a_module_to_its_limit(way: Callable[..., Any]) -> None:
    graphs: list[str] = []
    before = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for limit in (10, 3):  # Dynamo's own is 8
            call = way(Wrapped(), names_of_graphs(graphs, str(limit)), recompile_limit=limit)
            for length in range(2, 16):
                assert call(torch.ones(length, 2)).shape == (length, 2)
    assert (graphs.count("10"), graphs.count("3")) == (10, 3)
    assert torch._dynamo.config.recompile_limit == before


@pytest.mark.parametrize("way", WAYS)
def test_compile_call_knows_no_limit_of_all_modules_together(way: Callable[..., Any]) -> None:
    graphs: list[str] = []
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        for index in range(4):
            way(Wrapped(), names_of_graphs(graphs, str(index)), recompile_limit=4)(torch.ones(1, 2))
        assert torch._dynamo.config.accumulated_recompile_limit == 2
    assert graphs == [str(index) for index in range(4)]


@pytest.mark.parametrize("way", WAYS)
def test_compile_call_runs_hooks_that_came_later(way: Callable[..., Any]) -> None:
    graphs: list[str] = []
    module, x = Wrapped(), torch.ones(1, 2)
    call = way(module, names_of_graphs(graphs, "one"), recompile_limit=4)
    call(x)
    for _ in range(6):
        hook = module.linear.register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(call(x), module.linear.forward(x) + 1)
        hook.remove()
        torch.testing.assert_close(call(x), module.linear.forward(x))
    assert len(graphs) == 2


@pytest.mark.parametrize("way", WAYS)
def test_compile_call_makes_one_graph_of_a_module_of_torch(way: Callable[..., Any]) -> None:
    """Whose frame Dynamo passes over."""
    graphs: list[str] = []
    module, x = nn.Sequential(nn.Linear(2, 2), nn.GELU(), Wrapped()), torch.ones(1, 2)
    torch.testing.assert_close(way(module, names_of_graphs(graphs, "one"), recompile_limit=4)(x), module(x))
    assert graphs == ["one"]


@pytest.mark.parametrize("way", WAYS)
def test_compile_call_runs_hooks_and_takes_keywords(way: Callable[..., Any]) -> None:
    module = Wrapped()
    module.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.ones(1, 2)
    torch.testing.assert_close(way(module, names_of_graphs([], ""), recompile_limit=4)(x=x), module.linear(x) + 1)


@pytest.mark.parametrize("way", WAYS)
def test_compile_call_is_left_alone_by_an_outer_compile(way: Callable[..., Any]) -> None:
    graphs: list[str] = []
    module, x = Wrapped(), torch.ones(1, 2)

    @torch.compiler.disable(recursive=False)
    def run(x: Tensor) -> Tensor:
        result: Tensor = way(module, names_of_graphs(graphs, "inner"), recompile_limit=4)(x)
        return result

    y = torch.compile(lambda x: run(x) + 1, backend=names_of_graphs(graphs, "outer"))(x)
    torch.testing.assert_close(y, module.linear(x) + 1)
    assert graphs == ["inner", "outer"]
    assert _compat.graph_counts() == (2, 1)  # the break is where run begins


def test_ddp_group(tmp_path: Path) -> None:
    seen: list[dist.ProcessGroup | None] = []

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(_compat.ddp_group())
            assert (_compat.active_ddp() is None) == (seen[-1] is None)
            return self.linear(x)

    assert _compat.ddp_group() is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        DistributedDataParallel(Probe(), process_group=group)(torch.ones(1, 2))
    finally:
        dist.destroy_process_group()
    Probe()(torch.ones(1, 2))
    assert seen == [group, None]
    assert _compat.ddp_group() is None


def test_whole_graphs_are_not_cut_up_under_ddp() -> None:
    before = torch._dynamo.config.optimize_ddp
    with _compat.whole_graphs(under_ddp=True):
        assert torch._dynamo.config.optimize_ddp is False
    with _compat.whole_graphs(under_ddp=False):
        assert torch._dynamo.config.optimize_ddp == before
    assert torch._dynamo.config.optimize_ddp == before


def test_keep_saved_tensors_lets_a_compiled_backward_run_twice() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        with _compat.keep_saved_tensors():
            return _compat.inner_compiler("aot_eager")(gm, inputs)

    before = torch._functorch.config.donated_buffer
    compiled = torch.compile(lambda x: torch.exp(torch.sin(x)).sum(), backend=backend)
    x = torch.randn(3, requires_grad=True)
    compiled(x).backward()  # the first backward, the one that compiles, is an ordinary one
    first, x.grad = x.grad, None
    assert first is not None
    y = compiled(x)
    y.backward(retain_graph=True)
    y.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    assert torch._functorch.config.donated_buffer == before


@pytest.mark.parametrize("name", ["inductor", "aot_eager", "eager"])
def test_aot_compiler_shows_both_graphs_and_where_their_inputs_come_from(name: str) -> None:
    shown: dict[str, torch.fx.GraphModule] = {}
    backend = _compat.aot_compiler(name, lambda gm: shown.update(forward=gm), lambda gm: shown.update(backward=gm))
    x, w = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    given: list[str] = []

    def tracing(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        given.extend(node.name for node in gm.graph.find_nodes(op="placeholder"))
        return backend(gm, inputs)

    torch.compile(lambda x, w: torch.sin(torch.sin(x @ w)).sum(), backend=tracing)(x, w).backward()
    expected = torch.autograd.grad(torch.sin(torch.sin(x @ w)).sum(), w)[0]
    assert w.grad is not None
    torch.testing.assert_close(w.grad, expected)
    holders = [node for node in shown["forward"].graph.find_nodes(op="placeholder")]
    assert [given[_compat.input_index(node) or 0] for node in holders] == given
    tangents = [node for node in shown["backward"].graph.find_nodes(op="placeholder") if "tangents" in node.name]
    assert [_compat.input_index(node) for node in tangents] == [None]
    # inductor and aot_eager make the inner sin again, eager keeps it
    sines = [node for node in shown["backward"].graph.nodes if "aten.sin" in str(node.target)]
    assert len(sines) == (0 if name == "eager" else 1)


def test_one_graph_for_a_tensor_of_any_length() -> None:
    seen: list[list[Any]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append([node for node in gm.graph.nodes if node.op == "placeholder"])
        return gm

    scaled = torch.compile(lambda x, factor: x * factor, backend=backend)
    for length in (5, 7, 1000):
        x = torch.arange(float(length))
        _compat.of_any_length(x)
        assert torch.equal(scaled(x, 0.5), x / 2)
    (placeholders,) = seen
    assert len(placeholders) == 2  # a length and x: the factor is a constant


def test_second_graph_compiled_apart() -> None:
    shown: list[torch.fx.GraphModule] = []
    nothing = _compat.aot_compiler("eager", lambda gm: None, lambda gm: None)
    other = _compat.aot_compiler("eager", lambda gm: None, shown.append)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        with _compat.compiled_apart():
            fakes = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
            other(gm, [fake.detach().requires_grad_() for fake in fakes])
        compiled = nothing(gm, inputs)
        assert torch._guards.TracingContext.get().fw_metadata.num_outputs == 1
        return compiled

    x = torch.randn(3)
    y = torch.compile(torch.sin, backend=backend)(x)
    torch.testing.assert_close(y, torch.sin(x))
    assert not y.requires_grad
    (backward,) = shown
    assert any("aten.cos" in str(node.target) for node in backward.graph.nodes)


def test_compiled_call_is_that_of_module_compile() -> None:
    module = nn.Linear(2, 2)
    assert _compat.compiled_call(module) is None
    module.compile(backend="eager")
    call = _compat.compiled_call(module)
    assert call is not None
    torch.testing.assert_close(call(x := torch.ones(1, 2)), module.forward(x))
    assert isinstance(torch.compile(nn.Linear(2, 2)), _compat.OptimizedModule)


def test_runs_uncompiled_is_inlined_but_never_a_frame_of_its_own() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @_compat.runs_uncompiled
    def inner(x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_compiling() else x * 3

    def gives_up(x: Tensor) -> Tensor:
        for _ in range(1):  # Dynamo leaves a frame that breaks within a loop, and goes on with what it calls
            torch._dynamo.graph_break()
            x = inner(x)
        return x

    one = torch.ones(1)
    assert float(torch.compile(lambda x: inner(x) + 1, backend=backend, fullgraph=True)(one)) == 3
    assert float(torch.compile(gives_up, backend=backend)(one)) == 3
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*reduction")
@pytest.mark.parametrize("original", [False, True])
def test_is_flattened(tmp_path: Path, original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert not any(map(_compat.is_flattened, nn.Linear(3, 2).parameters()))
        flat = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=original, device_id=torch.device("cpu"))
        assert [_compat.is_flattened(parameter) for parameter in flat.parameters()] == [True] * (2 if original else 1)
    finally:
        dist.destroy_process_group()


def test_compile_forward_leaves_hooks_outside_and_shares_graphs() -> None:
    graphs, seen = [], []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @torch.compiler.disable
    def hook(module: nn.Module, args: Any) -> None:
        seen.append(module)

    layers = [nn.Sequential(nn.Linear(2, 2)) for _ in range(12)]
    for layer in layers:
        layer.register_forward_pre_hook(hook)
        _compat.compile_forward(layer, backend, 64, nullcontext)
    x = torch.ones(2)
    for layer in layers:
        expected = layer[0].weight @ x + layer[0].bias
        torch.testing.assert_close(layer(x), expected)
    assert seen == layers
    assert len(graphs) == 1


def test_all_gather(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        whole = torch.zeros(3)
        _compat.all_gather(whole, torch.arange(3.0), dist.group.WORLD)
        assert whole.tolist() == [0.0, 1.0, 2.0]
    finally:
        dist.destroy_process_group()
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


# -- versions ------------------------------------------------------------------------------------------------------

TORCH = requirements()[0]


def test_2_13_isolates_recompiles() -> None:
    assert (torch.__version__ >= (2, 13)) == _compat.ISOLATES_RECOMPILES
    assert release(TORCH.lowest) < (2, 13), "compile_own_code and ISOLATES_RECOMPILES can go"


@pytest.mark.skipif(_compat.ISOLATES_RECOMPILES, reason="torch 2.11 and 2.12 only")
def test_before_2_13_a_limit_is_for_all_modules() -> None:
    graphs: list[str] = []
    for index in range(12):
        torch.compile(Wrapped()._call_impl, backend=names_of_graphs(graphs, str(index)))(torch.ones(1, 2))
    assert len(graphs) == torch._dynamo.config.recompile_limit == 8


def test_2_14_writes_the_attributes_that_transpose_as_operators() -> None:
    """What losia_fx.passes.nodes reads: both, as long as the lowest torch is below 2.14."""
    seen: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(use_of(node) for node in gm.graph.find_nodes(op="call_function", target=getattr))
        seen.extend(str(node.target) for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverloadPacket))
        return gm.forward

    torch.compile(lambda w: (w.T + 1, w.mT + 1, w.H + 1, w.mH + 1), backend=backend)(torch.ones(2, 3))
    operators = ["aten.numpy_T", "aten.mT", "aten.matrix_H", "aten.mH"]
    assert seen == (operators if torch.__version__ >= (2, 14) else ["T", "mT", "H", "mH"])
    assert release(TORCH.lowest) < (2, 14), "products need not know these as attributes any longer"


def test_current_node_is_that_of_the_hook_that_runs() -> None:
    """And holds on to nothing: the graph goes with its last tensor."""
    seen: list[Any] = []
    leaf = torch.ones(2, requires_grad=True)
    result = leaf.square()
    assert result.grad_fn is not None
    result.grad_fn.register_prehook(lambda grads: seen.append(_compat.current_node()))
    result.sum().backward()
    assert seen == [result.grad_fn]
    assert _compat.current_node() is None


def test_leaves_are_found_in_a_models_output() -> None:
    from transformers.modeling_outputs import CausalLMOutput

    one, other = torch.ones(1), torch.zeros(1)
    nest = (CausalLMOutput(logits=one, hidden_states=(other,)), {"text": "x", "none": [None]})
    assert [leaf for leaf in _compat.leaves(nest) if isinstance(leaf, Tensor)] == [one, other]


def test_untraced_writes_real_tensors_in_the_midst_of_an_export() -> None:
    real = torch.zeros(3)

    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with _compat.untraced():
                real.index_copy_(0, torch.tensor([1]), torch.ones(1))
            return x + 1

    program = torch.export.export(Writing(), (torch.zeros(2),), strict=False)
    assert torch.equal(real, torch.tensor([0.0, 1.0, 0.0]))
    assert "index_copy" not in str(program.graph)
    assert torch.equal(program.module()(torch.zeros(2)), torch.ones(2))


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_int8_product_sums_in_int32(tokens: int) -> None:
    x, weight = torch.randint(-127, 128, (tokens, 64), dtype=torch.int8), torch.full((64, 8), -127, dtype=torch.int8)
    found = _compat.int8_product(x, weight)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), x.long() @ weight.long())
    # The day this one sums in int32 too, torch._int_mm can go.
    assert torch.mm(torch.full((1, 64), 127, dtype=torch.int8), weight).dtype == torch.int8


def test_settle_is_the_tensor_itself_for_every_compiler() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(_compat.settle(x, x.stride()), x)

    def double(x: Tensor) -> Tensor:
        y = x * 2
        return _compat.settle(y, y.stride()) + 1

    assert torch.equal(torch.compile(double, backend="inductor", fullgraph=True)(x), x * 2 + 1)


class _Wrapped(Tensor):
    """Twice what it holds."""

    half: Tensor
    __torch_function__ = _compat.no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = _compat.unwrapped(cls, lambda wrapped: 2 * wrapped.half, (args, kwargs or {}))
        return func(*args, **kwargs)


def test_a_tensor_that_wraps_others_has_their_form_and_no_memory() -> None:
    """_make_wrapper_subclass, the switch of __torch_function__ and torch.utils._pytree are private."""
    half = torch.ones(3, 4, dtype=torch.int8)
    made = _compat.wrapper_of(_Wrapped, half, torch.bfloat16)
    made.half = half
    assert (type(made), tuple(made.shape), made.dtype, made.device) == (_Wrapped, (3, 4), torch.bfloat16, half.device)
    with pytest.raises(RuntimeError):
        made.untyped_storage().data_ptr()
    found = torch.cat([made, made])
    assert type(found) is Tensor
    assert torch.equal(found, torch.full((6, 4), 2, dtype=torch.int8))


def test_every_name_of_it_is_tested() -> None:
    found = {
        (file.stem, node.name)
        for file in COMPAT
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    tests = Path(__file__).read_text()
    assert not [name for home, name in found if f"_compat.{name}" not in tests and f"{home}.{name}" not in tests]


def test_flatten_dense_takes_what_cat_of_flat_ones_does() -> None:
    """Of any layout, one alone too, and as wide as the widest."""
    mixed = [torch.randn(2, 3).t(), torch.ones(4, dtype=torch.bfloat16), torch.tensor(3.0, dtype=torch.float64)]
    for some in (mixed, mixed[:1], mixed[1:]):
        expected = torch.cat([each.reshape(-1) for each in some])
        found = _compat.foreach.flatten_dense(some)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


# -- reads of what Inductor writes in place ---------------------------------------------------------------------------


def resized(x: Tensor, weight: Tensor) -> Tensor:
    """Its backward writes to four buffers in place, and fuses the loop that adds them with one of another shape."""
    wide = F.interpolate(F.leaky_relu(F.conv2d(x, weight)), scale_factor=2, mode="bilinear", align_corners=False)
    return (wide + 1).square().sum()


def stale_reads(nodes: list[Any]) -> list[str]:
    """Names by which nodes of a schedule read buffers that were written in place before them."""
    real, written, found = nodes[0].scheduler.mutation_real_name, set[str](), list[str]()
    for node in nodes:
        reads = [read.name for read in node.read_writes.reads if not isinstance(read, WeakDep)]
        found += [name for name in reads if name in written and name not in node.get_buffer_names()]
        written.update(real[write.name] for write in node.read_writes.writes if write.name in real)
    return found


@pytest.mark.parametrize("mended", [pytest.param(False, marks=pytest.mark.slow), True])
def test_reads_of_a_buffer_stay_behind_the_writes_in_place(mended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not mended, torch 2.13.0 has such reads, and 2.14 has none: with 2.13, inductor_order.py goes."""
    if not mended and release(torch.__version__) != release("2.13.0"):
        pytest.skip("seen in torch 2.13.0")
    found: list[str] = []
    reorder = memory.reorder_for_peak_memory
    monkeypatch.setattr(SchedulerNode, "recompute_size_and_body", _recompute)
    monkeypatch.setattr(
        memory,
        "reorder_for_peak_memory",
        lambda nodes, *args, **kwargs: (found.extend(stale_reads(nodes)), reorder(nodes, *args, **kwargs))[1],
    )
    inductor_order.keep_reads_behind_writes.cache_clear()
    if mended:
        inductor_order.keep_reads_behind_writes()
    torch.compiler.reset()
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((2, 4, 4, 4), (4, 4, 1, 1)))
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(resized)(x, weight).backward()
    assert bool(found) == (not mended), found
    inductor_order.keep_reads_behind_writes.cache_clear()


_recompute = SchedulerNode.recompute_size_and_body


def test_the_inductor_that_losia_compiles_with_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SchedulerNode, "recompute_size_and_body", _recompute)
    inductor_order.keep_reads_behind_writes.cache_clear()
    _compat.inner_compiler("inductor")
    assert SchedulerNode.recompute_size_and_body is not _recompute
    inductor_order.keep_reads_behind_writes.cache_clear()


# -- the strides that Inductor keeps ----------------------------------------------------------------------------------


def test_strides_are_kept_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sizevars, cpp):
        for name in ("stride_at", "simplify_index_in_vec_range", "stride_at_vec_range"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))  # back again after the test
    before = cpp.stride_at_vec_range
    x, y = sympy.symbols("x y", integer=True, nonnegative=True)
    indices = [FloorDiv(x, 16) * n + ModularIndexing(x, 1, 16) * 3 + y for n in range(1, 140)]
    expected = [before(index, x, 8) for index in indices]
    assert before.cache_info().maxsize < len(indices)
    cpp_kernels.keep_strides()
    assert [cpp.stride_at_vec_range(index, x, 8) for index in indices] == expected
    assert [cpp.stride_at_vec_range(index, x, 8) for index in indices] == expected
    assert cpp.stride_at_vec_range.cache_info().hits == len(indices)


# -- what Inductor divides by -----------------------------------------------------------------------------------------

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "1d": lambda x: F.avg_pool1d(x.flatten(1), 2, ceil_mode=True),
    "2d": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "2d, wider than the image": lambda x: F.avg_pool2d(x, 9, ceil_mode=True),
    "2d, padded": lambda x: F.avg_pool2d(x[..., :6], 3, 2, 1, ceil_mode=True),
    "3d": lambda x: F.avg_pool3d(x[None], 2, ceil_mode=True),
}
"""Of images of 7 x 7: the last windows stick out of what they pool, or of its padding."""


@pytest.fixture
def pooling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor's own lowerings, until the test has them mended, and after it."""
    for op in (torch.ops.aten.avg_pool2d_backward.default, torch.ops.aten.avg_pool3d_backward.default):
        monkeypatch.setitem(lowerings, op, getattr(lowerings[op], "__wrapped__", lowerings[op]))
    inductor_pooling.divide_by_what_is_pooled.cache_clear()
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    inductor_pooling.divide_by_what_is_pooled.cache_clear()
    torch.compiler.reset()


def pooled_gradients(compiled: bool) -> dict[str, Tensor]:
    x = torch.arange(2 * 3 * 7 * 7.0).view(2, 3, 7, 7).sin().requires_grad_(True)

    def run(x: Tensor) -> list[Tensor]:
        return [pool(x).square().sum() for pool in POOLINGS.values()]

    losses = (torch.compile(run) if compiled else run)(x)
    gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    return dict(zip(POOLINGS, gradients, strict=True))


@pytest.mark.parametrize("mended", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("pooling")
def test_the_gradient_of_a_mean_over_a_window_that_sticks_out(mended: bool) -> None:
    """Not mended, all of them are wrong; of the torch that has them right, inductor_pooling.py goes."""
    if mended:
        _compat.inner_compiler("inductor")
    expected, found = pooled_gradients(compiled=False), pooled_gradients(compiled=True)
    right = [name for name in POOLINGS if torch.allclose(found[name], expected[name], rtol=1e-5)]
    assert right == (list(POOLINGS) if mended else [])


def test_inductor_draws_as_eager() -> None:
    torch.compiler.reset()
    x, drawn = torch.ones(64), []
    with torch._inductor.config.patch(fallback_random=False):  # and back again
        _compat.draw_as_eager()
        for call in (F.dropout, torch.compile(F.dropout)):
            torch.manual_seed(0)
            drawn.append(call(x))
    assert torch.equal(*drawn)
    assert not torch._inductor.config.fallback_random


# -- kernels compiled together ----------------------------------------------------------------------------------------


def three_kernels(x: Tensor, weight: Tensor) -> Tensor:
    """Inductor makes one before, between and after two products."""
    return torch.mm(torch.mm(x.softmax(-1), weight).exp(), weight).log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_kernels_of_a_graph_are_compiled_in_one_go(
    together: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cpp_pybinding", "wait"):  # to be put back
        monkeypatch.setattr(AsyncCompile, name, getattr(AsyncCompile, name))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if together:
        cpp_kernels.compile_kernels_together()
    x, weight = torch.randn(8, 16), torch.randn(16, 16) / 16
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(three_kernels)(x, weight), three_kernels(x, weight))
    assert (len(list(tmp_path.rglob("*.main.cpp"))) == 1) == together


def test_what_is_more_than_one_kernel_is_left_to_torch() -> None:
    kernel = '#include <a.h>\nextern "C"  void  kernel(const float* in_ptr0, int64_t ks0)\n{\n    { in_ptr0; }\n}\n'
    alone = cpp_kernels._function_alone(kernel)
    assert alone is not None
    assert alone.startswith('extern "C"')
    assert "#include" not in alone
    for more in ("int other() { return 1; }\n" + kernel, kernel + "static int a;", kernel + kernel):
        assert cpp_kernels._function_alone(more) is None
    assert cpp_kernels._type_of("const bfloat16*") == cpp_kernels._type_of("float*") == ctypes.c_void_p
    assert cpp_kernels._type_of("const int64_t") is ctypes.c_int64
    assert cpp_kernels._type_of("std::string") is None
    code = inspect.signature(AsyncCompile.cpp_pybinding)
    assert list(code.parameters) == ["self", "argtypes", "source_code"]
    assert list(inspect.signature(AsyncCompile.wait).parameters) == ["self", "scope"]


# -- nobody else ---------------------------------------------------------------------------------------------------


def private_names(file: Path) -> Iterator[str]:
    """Dotted names of private torch modules that a file imports or reaches by attributes."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            if any(name == private or name.startswith(f"{private}.") for private in PRIVATE):
                yield f"{file.relative_to(ROOT)}:{node.lineno}: {name}"


def sources() -> list[Path]:
    return [file for folder in ("losia_fx", "passes", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]


def test_the_search_finds_what_it_should() -> None:
    found = [line for file in COMPAT for line in private_names(file)]
    assert any("torch._dynamo.exc.BackendCompilerFailed" in line for line in found)
    assert any("torch._C._current_graph_task_id" in line for line in found)


def cases() -> Iterator[Any]:
    for file in sources():
        name = f"{file.parent.name}/{file.name}"
        yield pytest.param(file, id=name)


@pytest.mark.parametrize("file", cases())
def test_no_other_module_reaches_into_torch(file: Path) -> None:
    assert file in COMPAT or not list(private_names(file))
