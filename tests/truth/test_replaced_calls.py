"""Calls that take the place of a transformed model's own: compile, export, jit, functional_call, a patched forward."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import losia_fx
from losia_fx import LosiaError, TransformError
from tests.support.toys import Toy, batch, fingerprint, tiny_llama
from tests.support.twin import (
    Twin,
    assert_one,
    assert_subnets,
    backward,
    close,
    logits,
    loss_of,
    refused,
    subnets_of,
    twins,
    values_of,
    warned,
    zero,
)

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")


def sgd(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1, momentum=0.9)


def trains(model: nn.Module, twin: Twin, steps: int = 3) -> None:
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(steps):
        zero(model, twin)
        backward(model, twin)
        mine.step()
        expected.step()
    assert_one(model, twin)


# -- compile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"backend": "eager"}, {"backend": "losia"}, {"mode": "max-autotune"}])
@pytest.mark.parametrize("when", ["before the first forward", "in training"])
def test_compiling_a_transformed_model_in_place_is_refused(when: str, options: dict[str, Any]) -> None:
    model, twin = twins()
    if when == "in training":
        trains(model, twin)
    before = fingerprint(model)
    refused(lambda: model.compile(**options), model, "compile", error=TransformError)
    assert fingerprint(model) == before
    trains(model, twin)


def test_a_copy_refuses_it_too_and_a_restored_model_does_not() -> None:
    model, _ = twins()
    twin = copy.deepcopy(model)
    with pytest.raises(TransformError):
        twin.compile(backend="eager")
    losia_fx.restore(model)
    model.compile(backend="eager")
    ids = batch()
    loss_of(model, ids).backward()
    assert model.head.weight.grad is not None


def test_the_refusal_does_not_show_on_other_models() -> None:
    """Neither on the class, nor on a plain model of it, nor on a part of a transformed one."""
    model, twin = twins()
    plain = Toy(layers=1)
    plain.compile(backend="eager")
    loss_of(plain, batch()).backward()
    model.layers[0].compile(backend="aot_eager")
    trains(model, twin)


@pytest.mark.parametrize("first", ["evaluation", "training"])
def test_a_part_that_is_compiled_after_the_transformation_is_so_in_evaluation(first: str) -> None:
    """Whichever comes first; in training the subnets' own compiler runs. Gone is it only by the user's hand."""
    model, twin = twins()
    graphs: list[torch.fx.GraphModule] = []
    model.layers[0].compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    ids = batch()
    if first == "training":
        backward(model, twin)
        torch.optim.SGD(values_of(model), lr=0.0).step()
    for _ in range(2):
        with torch.no_grad():
            close(logits(model(ids)), logits(twin(ids)).detach(), 1e-12, "logits")
        assert len(graphs) == 1


def test_a_part_that_is_compiled_after_it_and_called_by_itself_trains_beside_the_model() -> None:
    """An auxiliary loss, in the first step after."""
    model, twin = twins()
    model.layers[0].compile(backend="aot_eager")
    x, ids = torch.randn(2, 5, model.layers[0].mix.in_features, dtype=torch.float64), batch()
    (loss_of(model, ids) + model.layers[0](x).square().mean()).backward()
    weights = {name.removeprefix("layers.0."): w for name, w in twin.weights().items() if name.startswith("layers.0.")}
    (loss_of(twin, ids) + functional_call(twin.plain.layers[0], weights, (x,)).square().mean()).backward()
    for name, subnet in subnets_of(model).items():
        close(subnet.values.grad, twin.values[name].grad, 1e-12, name)


def test_a_model_compiled_before_is_trained_through_its_subnets() -> None:
    plain = Toy(layers=1).double()
    twin_of = copy.deepcopy(plain)
    plain.compile(backend="eager")
    model = losia_fx.transform(plain, compiler="eager", rank_factor=0.25, output_rank_factor=0.25, schedule="static")
    trains(model, Twin(twin_of, subnets_of(model)))


class Biased(nn.Module):
    """Stands around a model, with something of its own that could learn."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.bias = nn.Parameter(torch.zeros(40, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(ids) + self.bias
        return found


CALLERS: dict[str, Any] = {
    "the model": lambda model: lambda ids: loss_of(torch.compile(model, backend="eager"), ids),
    "a model around it": lambda model: lambda ids: loss_of(torch.compile(Biased(model), backend="aot_eager"), ids),
    "a function": lambda model: torch.compile(lambda ids: loss_of(model, ids), backend="aot_eager"),
}


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
@pytest.mark.parametrize("what", CALLERS)
def test_another_compiler_around_a_call_of_the_model(what: str, copied: bool) -> None:
    """Its graph breaks there: the weights would be frozen in it, and what else there is would learn alone."""
    model, twin = twins()
    model = copy.deepcopy(model) if copied else model
    call = CALLERS[what](model)
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(3):
        zero(model, twin)
        ids = batch()
        call(ids).backward()
        loss_of(twin, ids).backward()
        mine.step()
        expected.step()
    assert_one(model, twin)


def test_a_compiled_training_step() -> None:
    model, twin = twins()
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())

    @torch.compile(backend="eager")
    def step(ids: Tensor) -> None:
        mine.zero_grad()
        loss_of(model, ids).backward()
        mine.step()

    for number in range(1, 4):
        zero(model, twin)
        ids = batch()
        step(ids)
        loss_of(twin, ids).backward()
        expected.step()
        assert losia_fx.controller(model).step == number
    assert_one(model, twin)


def test_one_graph_around_a_call_of_the_model_is_refused() -> None:
    model, twin = twins()
    whole = torch.compile(Biased(model), backend="eager", fullgraph=True)
    refused(lambda: whole(batch()), model, "losia_fx", "fullgraph=True", error=torch._dynamo.exc.Unsupported)
    trains(model, twin)


def test_regional_compilation_of_accelerate() -> None:
    utils = pytest.importorskip("accelerate.utils")
    model, twin = twins(Toy(layers=2).double())
    around = utils.compile_regions(model, backend="aot_eager")
    mine, expected = sgd(values_of(model)), sgd(twin.parameters())
    for _ in range(3):
        ids = batch()
        zero(model, twin)
        with warned():
            loss = loss_of(around, ids)
        close(loss, loss_of(twin, ids), 1e-9, "loss")
        loss.backward()
        loss_of(twin, ids).backward()
        mine.step()
        expected.step()
    assert_one(model, twin)


# -- export and tracing --------------------------------------------------------------------------------------------


def changed(model: nn.Module, twin: Twin, seen: bool = True) -> None:
    """S written; and seen by a forward, or left for whoever comes next."""
    with torch.no_grad():
        for values in (values_of(model), twin.parameters()):
            torch._foreach_mul_(values, -1.5)
        if seen:
            model(batch())


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seen", [False, True])
def test_export(seen: bool, strict: bool, gradients: bool) -> None:
    """The plain forward: no operator of ours, the plain values; whether or not the model has run before."""
    model, twin = twins()
    if seen:
        trains(model, twin)
    changed(model, twin)
    ids = batch()
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(model, (ids,), strict=strict)
    assert "losia" not in str(exported.graph)
    with torch.no_grad():
        close(exported.module()(ids), twin(ids), 1e-9, "logits of the exported program")
    trains(model, twin)


def test_an_exported_program_is_a_plain_one(tmp_path: Any) -> None:
    """Saved, loaded where losia_fx means nothing, with dynamic shapes."""
    model, twin = twins()
    dims = {"ids": {0: torch.export.Dim("size", min=2, max=8), 1: torch.export.Dim("length", min=2, max=32)}}
    exported = torch.export.export(model, (batch(),), strict=False, dynamic_shapes=dims)
    torch.export.save(exported, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for shape in ((2, 6), (3, 9)):
        ids = batch(*shape)
        with torch.no_grad():
            close(program(ids), twin(ids), 1e-9, "logits")


def test_export_of_a_transformers_model() -> None:
    model, twin = twins(tiny_llama(layers=1))
    model.config.use_cache = twin.plain.config.use_cache = False
    changed(model, twin)
    ids = batch()
    exported = torch.export.export(model, (ids,), strict=False)
    assert "losia" not in str(exported.graph)
    with torch.no_grad():
        close(logits(exported.module()(ids)), logits(twin(ids)), 1e-5, "logits")


@pytest.mark.parametrize("gradients", [True, False])
def test_jit_trace(gradients: bool) -> None:
    model, twin = twins()
    changed(model, twin)
    ids = batch()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (ids,))
    assert "losia" not in str(traced.inlined_graph)
    with torch.no_grad():
        for size in (2, 3):
            ids = batch(size)
            close(traced(ids), twin(ids), 1e-9, "logits")
    trains(model, twin)


def exported(model: nn.Module, ids: Tensor) -> Any:
    return torch.export.export(model, (ids,), strict=False).module()


def traced(model: nn.Module, ids: Tensor) -> Any:
    return torch.jit.trace(model, (ids,))


def fx_traced(model: nn.Module, ids: Tensor) -> Any:
    return torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("make", [exported, traced, fx_traced])
def test_what_was_just_written_is_exported(make: Any) -> None:
    """As after a schedule-free optimizer's eval(): nothing has looked at the model since S was written."""
    model, twin = twins()
    trains(model, twin)
    changed(model, twin, seen=False)
    ids = batch()
    program = make(model, ids)
    assert make is fx_traced or "index_copy" not in str(program.graph)
    with torch.no_grad():
        close(program(ids), twin(ids), 1e-9, "logits")
    assert_subnets(model, twin)
    trains(model, twin)


def test_export_of_what_was_written_twice() -> None:
    """S and W, to different numbers: no program is made of either."""
    model, twin = twins()
    trains(model, twin)
    changed(model, twin, seen=False)
    with torch.no_grad():
        for name in subnets_of(model):
            model.get_parameter(name).mul_(2)
    refused(lambda: exported(model, batch()), model, "head.weight", "both", error=losia_fx.StateError)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export(dynamo: bool, tmp_path: Any) -> None:
    """A transformed model goes to ONNX as the plain one, by torch's own exporters."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, twin = twins(Toy(layers=1))
    changed(model, twin)
    ids = batch()
    torch.onnx.export(model, (ids,), str(tmp_path / "model.onnx"), dynamo=dynamo)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
    with torch.no_grad():
        close(torch.from_numpy(found), twin(ids), 1e-4, "logits")


def test_the_fx_graph_of_a_model() -> None:
    """symbolic_trace runs the modules by themselves: uncompiled, which is said, and exact."""
    model, twin = twins()
    traced = torch.fx.symbolic_trace(model)
    for _ in range(2):
        ids = batch()
        zero(model, twin)
        with warned():
            loss = loss_of(traced, ids)
            loss.backward()
            model(ids)  # which says what ran outside of a graph
        loss_of(twin, ids).backward()
        for name, subnet in subnets_of(model).items():
            close(subnet.values.grad, twin.values[name].grad, 1e-9, f"gradient of {name}")
        changed(model, twin)
    with torch.no_grad():
        close(traced(ids), twin(ids), 1e-9, "logits")


# -- functional_call -----------------------------------------------------------------------------------------------


def others(twin: Twin, names: Any = None) -> dict[str, Tensor]:
    """Leaves of other values for W of these names."""
    wanted = twin.values if names is None else names
    return {n: (twin.weight(n).detach() * 1.2 + 0.1).requires_grad_() for n in wanted}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("which", ["all", "one", "also others"])
def test_functional_call_with_other_weights(which: str, compiler: str) -> None:
    """The plain forward of them, with the plain, dense gradients to them; the model is as it was."""
    model, twin = twins(compiler=compiler)
    for _ in range(2):  # before anything is compiled, and after
        names = {"one": ["layers.0.mlp.up.weight"]}.get(which)
        mine = others(twin, names)
        if which == "also others":
            mine |= {n: model.get_parameter(n).detach().clone().requires_grad_() for n in ("embed.weight", "norm.bias")}
        expected = {name: value.detach().clone().requires_grad_() for name, value in mine.items()}
        ids = batch()
        loss = loss_of(lambda given, w=mine: functional_call(model, w, (given,)), ids)
        plain = loss_of(lambda given, w=expected: functional_call(twin.solid(), w, (given,)), ids)
        close(loss, plain, 1e-9, "loss")
        loss.backward()
        plain.backward()
        for name, value in mine.items():
            assert value.grad is not None, name
            close(value.grad, expected[name].grad, 1e-9, f"gradient to {name}")
        assert all(not model.get_parameter(name).requires_grad for name in twin.values)
        trains(model, twin)


def test_functional_call_with_its_own_parameters() -> None:
    """dict(named_parameters()) holds both W and S; nothing is another, so it trains as the model does."""
    model, twin = twins()
    own = dict(model.named_parameters())
    ids = batch()
    loss_of(lambda given: functional_call(model, own, (given,)), ids).backward()
    loss_of(twin, ids).backward()
    for name, subnet in subnets_of(model).items():
        close(subnet.values.grad, twin.values[name].grad, 1e-9, f"gradient of {name}")
    zero(model, twin)
    trains(model, twin)


def test_functional_call_with_copies_of_all_parameters() -> None:
    """As people take them, W and S alike: the copy of S is what W has in its place, and both get their gradients."""
    model, twin = twins()
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    mine, ids = {}, batch()
    with torch.no_grad():
        for name, subnet in subnets_of(model).items():
            key = next(k for k, p in model.named_parameters() if p is subnet.values)
            mine[name] = copies[key].mul_(1.5)
    loss = loss_of(lambda given: functional_call(model, copies, (given,)), ids)
    values = {name: value.detach().clone().requires_grad_() for name, value in mine.items()}
    bases = {name: twin.base[name].clone().requires_grad_() for name in mine}
    wholes = {name: bases[name].index_put(twin.places[name], values[name]) for name in mine}
    plain = loss_of(lambda given: functional_call(twin.plain, wholes, (given,)), ids)
    close(loss, plain, 1e-9, "loss")
    loss.backward()
    plain.backward()
    for name in mine:
        close(mine[name].grad, values[name].grad, 1e-9, f"gradient to S of {name}")
        outside = torch.ones_like(bases[name]).index_put(twin.places[name], torch.zeros((), dtype=torch.float64))
        assert copies[name].grad is not None, name
        close(copies[name].grad * outside, bases[name].grad * outside, 1e-9, f"gradient to {name} around S")
    trains(model, twin)


def test_functional_call_with_another_subnet() -> None:
    """S alone is set aside: W has it in its place meanwhile, and the gradient goes to it."""
    model, twin = twins()
    name, ids = "layers.0.mix.weight", batch()
    key = next(k for k, p in model.named_parameters() if p is subnets_of(model)[name].values)
    other = (twin.values[name].detach() * -2).requires_grad_()
    expected = other.detach().clone().requires_grad_()
    whole = twin.base[name].index_put(twin.places[name], expected)
    with torch.no_grad():
        close(functional_call(model, {key: other}, (ids,)), _plain(twin, name, whole)(ids), 1e-9, "logits")
    loss = loss_of(lambda given: functional_call(model, {key: other}, (given,)), ids)
    plain = loss_of(_plain(twin, name, whole), ids)
    close(loss, plain, 1e-9, "loss")
    loss.backward()
    plain.backward()
    close(other.grad, expected.grad, 1e-9, "gradient to the other S")
    trains(model, twin)


def _plain(twin: Twin, name: str, whole: Tensor) -> Any:
    return lambda ids: functional_call(twin.plain, {**twin.weights(), name: whole}, (ids,))


@pytest.mark.parametrize("old", [False, True])
def test_per_sample_gradients(old: bool) -> None:
    """vmap over grad, of the dense weights, as differential privacy has it."""
    model, twin = twins()
    if old:
        trains(model, twin)
    weights = {name: value.detach() for name, value in others(twin).items()}
    ids = batch(4)

    def loss(given: dict[str, Tensor], one: Tensor, module: nn.Module) -> Tensor:
        scores = functional_call(module, given, (one.unsqueeze(0),))
        return F.cross_entropy(scores[0, :-1], one[1:])

    mine = vmap(lambda one: grad(lambda w: loss(w, one, model))(weights))(ids)
    expected = vmap(lambda one: grad(lambda w: loss(w, one, twin.solid()))(weights))(ids)
    for name, value in mine.items():
        close(value, expected[name], 1e-9, name)
    trains(model, twin)


def test_an_ensemble_of_models() -> None:
    """stack_module_state and vmap over the stacked parameters: each member computes as the plain model it is."""
    made = [twins(copy.deepcopy(Toy(layers=1).double()), seed=0) for _ in range(3)]
    for model, twin in made[1:]:
        changed(model, twin)
        with torch.no_grad():
            model(batch())
    parameters, buffers = stack_module_state([model for model, _ in made])
    ids = batch()
    with torch.no_grad():
        stacked = vmap(lambda p, b: functional_call(made[0][0], (p, b), (ids,)))(parameters, buffers)
        for number, (_, twin) in enumerate(made):
            close(stacked[number], twin(ids), 1e-9, f"member {number}")


def test_an_ensemble_by_a_copy_that_was_never_used() -> None:
    """As torch's tutorial has it."""
    made = [twins(Toy(layers=1).double(), seed=0) for _ in range(3)]
    base = copy.deepcopy(made[0][0])
    parameters, buffers = stack_module_state([model for model, _ in made])
    ids = batch()
    stacked = vmap(lambda p, b: functional_call(base, (p, b), (ids,)))(parameters, buffers)
    for number, (_, twin) in enumerate(made):
        close(stacked[number], twin(ids), 1e-9, f"member {number}")
    close(base(ids), made[0][1](ids), 1e-9, "the copy itself, after that")


class Blocks(Toy):
    """What comes in are the embeddings, which can be differentiated by."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _dual(call: Callable[..., Any], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        return tangent


TRANSFORMED: dict[str, Callable[[Callable[..., Any], Tensor], Tensor]] = {
    "vmap": lambda call, x: vmap(call)(x.unsqueeze(0)),
    "jvp": lambda call, x: jvp(call, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda call, x: jacrev(call)(x[:1, :2]),
    "grad": lambda call, x: grad(lambda given: call(given).square().sum())(x),
    "dual tensors": _dual,
}


@pytest.mark.parametrize("way", list(TRANSFORMED))
def test_a_call_that_torch_func_transforms(way: str) -> None:
    """Values, and what a loss of them says of the subnets."""
    model, twin = twins(Blocks(layers=1).double())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for _ in range(2):
        found, expected = (TRANSFORMED[way](call, x) for call in (model, twin))
        close(found, expected, 1e-9, "value")
        zero(model, twin)
        for value in (found, expected):
            value.square().sum().backward()
        for name, value in twin.values.items():
            mine = subnets_of(model)[name].values.grad
            assert mine is not None
            assert value.grad is not None
            close(mine, value.grad, 1e-9, name)


def test_forward_mode_derivatives() -> None:
    model, twin = twins()
    weights = {name: value.detach() for name, value in others(twin).items()}
    tangents = {name: torch.randn_like(value) for name, value in weights.items()}
    ids = batch()
    mine = jvp(lambda w: functional_call(model, w, (ids,)), (weights,), (tangents,))
    expected = jvp(lambda w: functional_call(twin.solid(), w, (ids,)), (weights,), (tangents,))
    for found, wanted in zip(mine, expected, strict=True):
        close(found, wanted, 1e-9, "value or tangent")


def test_an_inner_loop_that_is_differentiated_through() -> None:
    """Meta-learning: weights of one step on, made by gradients of gradients."""
    model, twin = twins()

    def outer(call: nn.Module) -> Tensor:
        torch.manual_seed(3)
        ids = batch(), batch()
        fast = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
        first = loss_of(lambda given: functional_call(call, fast, (given,)), ids[0])
        grads = torch.autograd.grad(first, list(fast.values()), create_graph=True)
        later = {name: value - 0.1 * g for (name, value), g in zip(fast.items(), grads, strict=True)}
        second = loss_of(lambda given: functional_call(call, later, (given,)), ids[1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(second, list(fast.values()))])

    start = others(twin)
    close(outer(model), outer(twin.solid()), 1e-9, "second derivatives")
    trains(model, twin)


def test_a_functional_call_is_not_measured() -> None:
    """What other weights cost says nothing of this one: the full gradient under way stays as it is."""
    options = {"schedule": "sync", "importance": "mixed", "period": 100}
    model, twin = twins(**options)
    backward(model, twin)
    before = losia_fx.state_dict(model)
    mine = others(twin)
    loss_of(lambda given: functional_call(model, mine, (given,)), batch()).backward()
    after = losia_fx.state_dict(model)
    assert [key for key in before if key.endswith(":grad")]
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key], key


def test_the_older_name_of_functional_call() -> None:
    model, twin = twins()
    mine, ids = others(twin), batch()
    with pytest.warns(FutureWarning):
        output = torch.nn.utils.stateless.functional_call(model, mine, (ids,))
    close(output, functional_call(twin.solid(), mine, (ids,)), 1e-9, "logits")


# -- a forward that is replaced ------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first forward", "in training"])
def test_a_forward_patched_onto_the_model(when: str) -> None:
    """As accelerate's mixed precision and fused losses do it: the instance gets another forward."""
    model, twin = twins()
    if when == "in training":
        trains(model, twin)
    original, plain = model.forward, twin.plain.forward
    model.forward = types.MethodType(lambda self, ids: original(ids) * 2, model)
    twin.plain.forward = types.MethodType(lambda self, ids: plain(ids) * 2, twin.plain)
    trains(model, twin)


def test_a_forward_patched_onto_a_part() -> None:
    """A kernel of one's own in place of a block's forward, in training; it uses the weight without its module."""
    model, twin = twins()
    trains(model, twin)

    def fused(self: nn.Module, x: Tensor) -> Tensor:
        return F.linear(F.relu(x @ self.up.weight.T), self.down.weight)

    for owner in (model, twin.plain):
        mlp = owner.layers[0].mlp
        mlp.forward = types.MethodType(fused, mlp)
    trains(model, twin)


def test_hooks_that_change_the_output_run_in_training_and_out_of_it() -> None:
    model, twin = twins()
    for owner in (model, twin.plain):
        owner.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)
    trains(model, twin)


def test_the_errors_are_of_one_family() -> None:
    assert issubclass(TransformError, LosiaError)
