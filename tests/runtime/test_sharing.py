"""Graphs that serve many layers, and weights that run where no graph of ours does."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import Counter
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losia_fx
from losia_fx import LosiaWarning
from tests.support.toys import Toy, assert_subnet_gradients, batch, by_string, loss_of, plain_gradients

NAMES = ["mix", "mlp.up", "mlp.down"]


def layer_weights(model: Toy) -> list[str]:
    return [f"layers.{i}.{name}.weight" for i in range(len(model.layers)) for name in NAMES]


def own_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, LosiaWarning)]


@pytest.fixture
def caught() -> Any:
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        yield messages


def compile_blocks(model: Toy, **options: Any) -> None:
    for layer in model.layers:
        layer.compile(backend=_backend(), options=options)


def _backend() -> Any:
    from losia_fx.compile.backend import losia_backend

    return "losia" if "losia" in torch._dynamo.list_backends(()) else losia_backend


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_layers_compiled_one_by_one_with_the_string(compiler: str, caught: Any) -> None:
    model, ids = Toy(layers=4, bias=True), batch()
    expected = plain_gradients(model, ids)
    compile_blocks(model, compiler=compiler, rank_factor=0.25)
    loss_of(model, ids).backward()
    subnets = losia_fx.subnets(model)
    assert sorted(subnets) == sorted(layer_weights(model))
    assert_subnet_gradients(model, expected, tolerance=1e-4)
    for name in subnets:
        assert subnets[name].weight.grad is None
    parameters = dict(model.named_parameters())
    torch.testing.assert_close(parameters["layers.3.mix.bias"].grad, expected["layers.3.mix.bias"])
    torch.testing.assert_close(parameters["head.weight"].grad, expected["head.weight"])
    assert not own_warnings(caught)


def test_layers_compiled_one_by_one_share_one_graph() -> None:
    model, ids = Toy(layers=4), batch()
    compile_blocks(model, compiler="eager")
    torch._dynamo.utils.counters.clear()
    loss_of(model, ids).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_layers_compiled_one_by_one_on_a_transformed_model(compiler: str, caught: Any) -> None:
    model, ids = Toy(layers=3), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler=compiler, rank_factor=0.25)
    compile_blocks(model, compiler=compiler, rank_factor=0.25)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    assert len(losia_fx.subnets(model)) == 10
    assert all(not subnet.weight.requires_grad for subnet in losia_fx.subnets(model).values())
    assert not own_warnings(caught)


def test_compiled_layers_of_a_transformed_model_called_by_themselves() -> None:
    model = Toy(layers=3)
    losia_fx.transform(model, compiler="aot_eager", rank_factor=0.25)
    compile_blocks(model, compiler="aot_eager")
    x = torch.randn(2, 6, 16)
    expected = {}
    for index, layer in enumerate(losia_fx.restore(copy.deepcopy(model)).layers):  # type: ignore[union-attr,arg-type]
        twin = copy.deepcopy(layer).requires_grad_(True)
        twin(x).square().sum().backward()
        expected |= {f"layers.{index}.{name}": p.grad for name, p in twin.named_parameters()}
    for layer in model.layers:
        layer(x).square().sum().backward()
    assert_subnet_gradients(model, expected, layer_weights(model))


def test_two_transformed_models_of_one_class() -> None:
    first, second, ids = Toy(), Toy(), batch()
    expected = [plain_gradients(model, ids) for model in (first, second)]
    losia_fx.transform(first, compiler="aot_eager", seed=1, rank_factor=0.25)
    losia_fx.transform(second, compiler="aot_eager", seed=2, rank_factor=0.25)
    losses = [loss_of(model, ids) for model in (first, second)]
    for loss in losses:
        loss.backward()
    assert_subnet_gradients(first, expected[0])
    assert_subnet_gradients(second, expected[1])


def test_two_models_of_one_class_by_string() -> None:
    first, second, ids = Toy(), Toy(), batch()
    expected = [plain_gradients(model, ids) for model in (first, second)]
    compiled = [by_string(model, seed=seed, rank_factor=0.25) for seed, model in enumerate((first, second))]
    losses = [loss_of(model, ids) for model in compiled]
    for loss in losses:
        loss.backward()
    assert_subnet_gradients(first, expected[0])
    assert_subnet_gradients(second, expected[1])
    assert losia_fx.controller(first) is not losia_fx.controller(second)


def test_a_transformed_and_a_string_model_of_one_class() -> None:
    first, second, ids = Toy(), Toy(), batch()
    expected = [plain_gradients(model, ids) for model in (first, second)]
    losia_fx.transform(first, compiler="eager", rank_factor=0.5)
    compiled = by_string(second, rank_factor=0.25)
    for _ in range(2):
        first.zero_grad()
        second.zero_grad()
        loss_of(first, ids).backward()
        loss_of(compiled, ids).backward()
    assert_subnet_gradients(first, expected[0])
    assert_subnet_gradients(second, expected[1])


def test_each_model_follows_its_own_optimizer() -> None:
    first, second, ids = Toy(), Toy(), batch()
    for model in (first, second):
        losia_fx.transform(model, compiler="eager", period=1, rank_factor=0.25)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    torch.optim.SGD(second.parameters(), lr=0.1)
    before = {name: p.clone() for name, p in second.named_parameters()}
    for model in (first, second):
        loss_of(model, ids).backward()
    optimizer.step()
    assert losia_fx.controller(first).step == 1
    assert losia_fx.controller(second).step == 0
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("way", "excluded"),
    [
        ("block compile", 0),
        ("block compile", 1),
        ("graph breaks", 0),
        ("graph breaks", 1),
    ],
)
def test_a_layer_excluded_by_name_that_shares_its_graph(way: str, excluded: int) -> None:
    """Whether the graph was compiled for the layer without subnets (0) or meets it later (1)."""
    model, ids = Toy(layers=3, breaks=way == "graph breaks"), batch()
    expected = plain_gradients(model, ids)
    options: dict[str, Any] = {"exclude": (f"layers.{excluded}",), "rank_factor": 0.25, "compiler": "eager"}
    if way == "block compile":
        compile_blocks(model, **options)
    else:
        losia_fx.transform(model, **options)
    prefix = f"layers.{excluded}."
    for _ in range(2):
        model.zero_grad()
        loss_of(model, ids).backward()
        assert not [name for name in losia_fx.subnets(model) if name.startswith(prefix)]
        assert_subnet_gradients(model, expected, [n for n in layer_weights(model) if not n.startswith(prefix)])
        weight = model.layers[excluded].mix.weight
        if way == "block compile":  # requires_grad as the user set it: what has no subnet learns in full
            torch.testing.assert_close(weight.grad, expected[f"{prefix}mix.weight"])
        else:
            assert weight.grad is None


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x).tanh())


class Square(nn.Module):
    """The head has the shape of the blocks' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Part() for _ in range(2))
        self.head = Part()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.inner

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return cast(Tensor, self.head(x))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("first", ["head", "block"])
def test_a_head_that_shares_the_graph_of_a_block(first: str, compiler: str, caught: Any) -> None:
    """Its subnet has every column, so it fits no slot of theirs, nor theirs one of its."""
    model, x = Square().double(), torch.randn(3, 16, dtype=torch.float64)
    expected = plain_gradients_of_parts(model, x)
    losia_fx.transform(model, compiler=compiler, rank_factor=0.25, output_rank_factor=0.5)
    parts = [model.head, *model.layers]
    for part in parts:
        part.compile(backend=_backend(), options={"compiler": compiler})
    for part in parts if first == "head" else reversed(parts):
        part(x).square().sum().backward()
    for name, subnet in losia_fx.subnets(model).items():
        assert subnet.values.shape == ((8, 16) if name.startswith("head") else (4, 4))
        torch.testing.assert_close(subnet.values.grad, expected[name][subnet.rows][:, subnet.cols])
    assert len(own_warnings(caught)) == 1  # exact, but uncompiled


def plain_gradients_of_parts(model: Square, x: Tensor) -> dict[str, Tensor]:
    parts = {"head": model.head, **{f"layers.{index}": layer for index, layer in enumerate(model.layers)}}
    return {
        f"{name}.inner.weight": torch.autograd.grad(part(x).square().sum(), list(part.parameters()))[0]
        for name, part in parts.items()
    }


def test_a_graph_break_in_an_mlp(caught: Any) -> None:
    model, ids = Toy(layers=3, breaks=True), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    assert own_warnings(caught) == []  # broken graphs are ours all the same


def test_a_graph_break_by_string_gives_every_linear_its_subnet(caught: Any) -> None:
    """Dynamo gives up the frame of Toy.forward (a break inside its loop), so the head runs as plain Python."""
    model, ids = Toy(layers=2, breaks=True), batch()
    call = by_string(model, compiler="eager", rank_factor=0.25)
    loss_of(call, ids).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert "head.weight" in losia_fx.subnets(model) or "head.weight" in " ".join(own_warnings(caught))


def test_a_graph_break_in_an_mlp_under_checkpointing(caught: Any) -> None:
    model, ids = Toy(layers=2, breaks=True, checkpointed=True), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler="aot_eager", rank_factor=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    assert_subnet_gradients(model, expected)
    (message,) = own_warnings(caught)
    assert "6 weights" in message
    assert "layers.0.mix.weight" in message
    assert all(model_weight in str(losia_fx.report(model)) for model_weight in layer_weights(model))


def test_a_graph_break_under_checkpointing_profiles_exactly() -> None:
    model, ids = Toy(layers=1, breaks=True, checkpointed=True), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, output_rank_factor=0)
    loss_of(model, ids).backward()
    for state in losia_fx.controller(model).states:
        assert state.profile is not None
        assert state.profile.grad is not None
        torch.testing.assert_close(state.profile.grad, expected[state.name], rtol=1e-4, atol=1e-6)


def test_the_recompile_limit_reached(caught: Any) -> None:
    model = Toy(layers=2)
    compiled = torch.compile(
        model, backend=_backend(), options={"compiler": "eager", "rank_factor": 0.25}, dynamic=False
    )
    torch._dynamo.config.recompile_limit, limit = 2, torch._dynamo.config.recompile_limit
    try:
        for length in (4, 5, 6, 7, 8):
            ids = batch(2, length)
            expected = plain_gradients(_plain_twin(model), ids)
            model.zero_grad()
            loss_of(compiled, ids).backward()
            assert_subnet_gradients(model, expected)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    finally:
        torch._dynamo.config.recompile_limit = limit
    (message,) = own_warnings(caught)
    assert "layers.0.mix.weight" in message


def _plain_twin(model: Toy) -> Toy:
    twin = Toy(layers=len(model.layers))
    own = twin.state_dict()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    return twin


def test_calling_a_part_of_the_model(caught: Any) -> None:
    model = Toy(layers=2, bias=True)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    twin = _restored_copy(model)
    x = torch.randn(3, 5, 16)
    twin.layers[1].mlp(x).square().sum().backward()
    model.layers[1].mlp(x).square().sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert_subnet_gradients(model, expected, ["layers.1.mlp.up.weight", "layers.1.mlp.down.weight"])
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    (message,) = own_warnings(caught)
    assert "layers.1.mlp.up.weight" in message
    assert "layers.1.mlp.down.weight" in message
    assert "layers.0" not in message


def _restored_copy(model: Toy) -> Toy:
    twin = losia_fx.restore(copy.deepcopy(model))
    assert isinstance(twin, Toy)
    return twin.requires_grad_(True)


class Direct(Toy):
    """Uses the head's weight without calling the head."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.head.weight)


def test_a_weight_used_without_its_module() -> None:
    model, ids = Direct(), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)


def test_a_weight_used_without_its_module_outside_of_a_graph(caught: Any) -> None:
    model, ids = Direct(), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    with torch.compiler.set_stance("force_eager"):
        loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert len(own_warnings(caught)) == 1  # of the blocks; a head by itself is meant to run so, and the report says it
    assert "head.weight" in str(losia_fx.report(model)).rpartition("ran outside a rewritten graph")[2]


class Straight(torch.autograd.Function):
    """Passes a gradient on that its forward does not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 100


class Estimated(Toy):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = Straight.apply(layer(x))
        return self.head(self.norm(x))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_backward_of_the_models_own_is_traced(compiler: str) -> None:
    """Dynamo leaves it out where nothing that goes in asks for a gradient, as nothing does of a frozen model."""
    model, ids = Estimated(), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler=compiler, rank_factor=0.25)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    assert all(not subnet.weight.requires_grad for subnet in losia_fx.subnets(model).values())
    assert all(subnet.weight.grad is None for subnet in losia_fx.subnets(model).values())


class Attentive(nn.Module):
    """torch's own attention reads out_proj.weight and never calls out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)))


OUT_PROJ = [f"encoder.layers.{i}.self_attn.out_proj.weight" for i in (0, 1)]


IN_PROJ = [f"encoder.layers.{i}.self_attn.in_proj_weight" for i in (0, 1)]


@pytest.mark.parametrize("eagerly", [False, True])
def test_weights_that_their_modules_never_use_by_a_call(eagerly: bool, caught: Any) -> None:
    model, ids = Attentive(), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    assert {*OUT_PROJ, *IN_PROJ} <= set(losia_fx.subnets(model))
    with torch.compiler.set_stance("force_eager" if eagerly else "default"):
        loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    assert ("ran outside" in " ".join(own_warnings(caught))) == eagerly


class Odd(nn.Module):
    """Uses of a weight that are no product of an input with it: each alone would leave it without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x, (first, second) = self.embed(ids), (layer.weight for layer in self.layers)
        x = x + F.linear(x, torch.cat([first[:8], second[8:]])) + x * first.tanh().sum(0)
        x = F.linear(F.linear(x, first @ second), second.view(4, 4, 16).flatten(0, 1), self.layers[1].bias)
        return self.head(x)


@pytest.mark.parametrize("way", ["eager", "aot_eager", "force_eager"])
def test_whatever_is_done_with_a_weight_is_exact(way: str) -> None:
    model, ids = Odd(), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(
        model, compiler="aot_eager" if way == "aot_eager" else "eager", rank_factor=0.25, schedule="sync"
    )
    with torch.compiler.set_stance("force_eager" if way == "force_eager" else "default"):
        loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    for state in losia_fx.controller(model).states:
        assert state.profile is not None
        assert state.profile.grad is not None
        torch.testing.assert_close(state.profile.grad, expected[state.name], rtol=1e-4, atol=1e-6)
    if way != "force_eager":
        rows = {row.name: row for row in losia_fx.report(model).weights}
        assert "full gradient for" in rows["layers.0.weight"].used
        assert "layers.0.weight" in losia_fx.report(model).notes[-1]
        assert rows["head.weight"].used == "linear"


def test_force_eager_trains_through_the_subnets(caught: Any) -> None:
    model, ids = Toy(), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    with torch.compiler.set_stance("force_eager"):
        loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    assert len(own_warnings(caught)) == 1
    model.zero_grad()
    loss_of(model, ids).backward()  # and back to the graph
    assert_subnet_gradients(model, expected)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert len(own_warnings(caught)) == 1


def test_a_model_that_ran_outside_of_a_graph_can_be_freed() -> None:
    model = Toy(layers=1)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    model.layers[0](torch.randn(2, 4, 16)).sum().backward()
    weight = weakref.ref(model.layers[0].mix.weight)
    del model
    gc.collect()
    assert weight() is None


def test_a_model_can_be_freed() -> None:
    model = Toy(layers=1)
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    loss_of(model, batch()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    weight = weakref.ref(model.layers[0].mix.weight)
    del model
    gc.collect()
    assert weight() is None


def test_an_exception_in_an_eager_forward_leaves_nothing_behind() -> None:
    model = Toy()
    losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    with pytest.raises(RuntimeError):
        model.layers[0].mlp(torch.randn(2, 3))  # wrong width
    bare = torch.nn.functional.linear(torch.randn(2, 16), losia_fx.subnets(model)["layers.0.mix.weight"].weight)
    assert bare.grad_fn is None


@pytest.mark.parametrize("way", ["transform", "string"])
def test_varying_lengths_and_batch_sizes_never_end_in_eager(way: str, caught: Any) -> None:
    model = Toy(layers=1)
    shapes = [(2, 6), (3, 9), (1, 4), (4, 12), (2, 15), (5, 7), (1, 11), (6, 3), (3, 16), (2, 5), (7, 8), (1, 1 + 12)]
    assert len(set(shapes)) == 12
    call: Any = model
    if way == "transform":
        losia_fx.transform(model, compiler="eager", rank_factor=0.25)
    else:
        call = by_string(model, compiler="eager", rank_factor=0.25)
    torch._dynamo.utils.counters.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    for mode, some in ((True, shapes), (False, shapes[:2])):  # people train in eval mode too
        model.train(mode)
        for size, length in some:
            ids = batch(size, length)
            expected = plain_gradients(_plain_twin(model), ids)
            optimizer.zero_grad()
            model.zero_grad()
            loss_of(call, ids).backward()
            assert_subnet_gradients(model, expected, tolerance=1e-4)
            optimizer.step()
    assert not own_warnings(caught)
    graphs: Counter[str] = torch._dynamo.utils.counters["stats"]
    assert graphs["unique_graphs"] <= 10
    assert losia_fx.controller(model).step == 14


@torch.compiler.nested_compile_region
def run_region(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer(x)


class Regions(nn.Module):
    """Its layers are compiled by themselves, once for all of them, inside the one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = run_region(layer, x)
        return x


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_layers_that_are_regions_of_their_own(compiler: str) -> None:
    model, x = Regions(), torch.randn(4, 16)
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    losia_fx.transform(model, compiler=compiler, rank_factor=0.25, schedule="sync")
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        assert_subnet_gradients(model, expected)
        for state in losia_fx.controller(model).states:
            assert state.profile is not None
            assert state.profile.grad is not None
            torch.testing.assert_close(state.profile.grad, expected[state.name], rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


class Hidden(torch.autograd.Function):
    """As reversible layers do: runs modules, and runs them again for their gradients in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: nn.ModuleList) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layers = layers
        for layer in layers:
            x = layer(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            y = start
            for layer in ctx.layers:
                y = layer(y)
        torch.autograd.backward(y, grad)
        return start.grad, None


class Reversible(Toy):
    @torch.compiler.disable
    def run(self, x: Tensor) -> Tensor:
        return Hidden.apply(x, self.layers)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.embed(ids))))


@pytest.mark.parametrize("asks", ["nothing", "its input", "the embedding"])
def test_weights_that_run_with_gradients_off_are_said(asks: str, caught: Any) -> None:
    """In an autograd.Function that is given nothing that asks for a gradient; whatever does helps."""
    model, ids = Reversible(), batch()
    expected = plain_gradients(model, ids)
    trainable = ("embed",) if asks == "the embedding" else ()
    losia_fx.transform(model, compiler="eager", rank_factor=0.25, trainable=trainable)
    if asks == "its input":  # as transformers' enable_input_require_grads has it
        model.embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    loss_of(model, ids).backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(2):
        optimizer.step()
    said = [text for text in own_warnings(caught) if "do not learn" in text]
    assert len(said) == (asks == "nothing")
    if said:
        assert "6 weights" in said[0]
        assert "layers.0.mix.weight" in said[0]
    else:
        assert_subnet_gradients(model, expected)
