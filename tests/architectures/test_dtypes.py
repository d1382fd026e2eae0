"""Every dtype, autocast, GradScaler and dropout: the gradients of the plain model under the same seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import losia_fx
from losia_fx.method.importance import importance_of
from losia_fx.method.subnet import gather
from losia_fx.runtime.state import states_of
from tests.support import toys
from tests.support.forms import FORMS, Model

SEED = 5
Context = Callable[[], AbstractContextManager[Any]]


def plain(model: nn.Module, batch: Any, context: Context = nullcontext) -> tuple[Tensor, dict[str, Tensor]]:
    twin = copy.deepcopy(model).requires_grad_(True)
    loss = run(twin, batch, context)
    return loss, {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def run(model: nn.Module, batch: Any, context: Context = nullcontext, scale: float = 1.0) -> Tensor:
    torch.manual_seed(SEED)
    with context():
        out = model(batch)
        loss = out if out.dim() == 0 else F.cross_entropy(out.flatten(0, -2).float(), batch.flatten())
    (loss * scale).backward()
    return loss.detach()


def assert_same(model: nn.Module, expected: dict[str, Tensor], tolerance: float, scale: float = 1.0) -> None:
    for name, subnet in losia_fx.subnets(model).items():
        actual = subnet.values.grad
        assert actual is not None, name
        assert actual.dtype == subnet.values.dtype == torch.promote_types(subnet.weight.dtype, torch.float32)
        wanted = gather(expected[name], subnet.rows, subnet.cols).to(actual.dtype)
        assert wanted.any(), f"{name}: nothing to compare"
        assert float((actual / scale - wanted).abs().max()) <= tolerance * float(wanted.abs().max()), name
        assert subnet.weight.grad is None


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtype(dtype: torch.dtype, compiler: str) -> None:
    model, ids = toys.Toy(bias=True).to(dtype), toys.batch()
    loss, expected = plain(model, ids)
    losia_fx.transform(model, rank_factor=0.4, compiler=compiler)
    torch.testing.assert_close(run(model, ids), loss, rtol=TOLERANCE[dtype], atol=0)
    assert_same(model, expected, TOLERANCE[dtype])


class Mixed(nn.Module):
    """A block of each dtype, the next one's input cast on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(toys.VOCABULARY, 16)
        dtypes = (torch.bfloat16, torch.float64, torch.float16, torch.float32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()).to(dtype) for dtype in dtypes)
        self.out = nn.Linear(16, toys.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x.to(layer[0].weight.dtype))
        return self.out(x)


@pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_mixed_dtypes(compiler: str) -> None:
    model, ids = Mixed(), toys.batch()
    _, expected = plain(model, ids)
    losia_fx.transform(model, rank_factor=0.4, compiler=compiler)
    run(model, ids)
    assert_same(model, expected, TOLERANCE[torch.bfloat16])
    kinds = [subnet.values.dtype for subnet in losia_fx.subnets(model).values()]
    assert kinds == [torch.float32, torch.float64, torch.float32, torch.float32]


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "compiler"),
    [
        (torch.float64, "eager"),
        pytest.param(torch.float32, "aot_eager", marks=pytest.mark.slow),
        pytest.param(torch.float32, "eager", marks=pytest.mark.slow),
        pytest.param(torch.float64, "aot_eager", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_autocast_with_every_form(dtype: torch.dtype, compiler: str) -> None:
    """Autocast lets float64 be: so do we."""
    forms = [form for form in FORMS if torch.float64 in form.dtypes]
    model = Model(*forms).to(dtype)
    inputs = [torch.randn(form.x, dtype=dtype) for form in forms]
    loss, expected = plain(model, inputs, autocast)
    losia_fx.transform(model, rank_factor=0.6, trainable=["*scale"], compiler=compiler)
    tolerance = 1e-9 if dtype == torch.float64 else TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(run(model, inputs, autocast), loss, rtol=tolerance, atol=0)
    assert_same(model, expected, tolerance)
    for layer, form in zip(model.layers, forms, strict=True):
        wanted = expected[f"layers.{forms.index(form)}.scale"]
        assert float((layer.scale.grad - wanted).abs().max()) <= tolerance * float(wanted.abs().max()), form.name


def test_gradscaler() -> None:
    """Importance goes by the unscaled gradient; a skipped step is no step, and leaves nothing behind."""
    model, ids = toys.Toy().half(), toys.batch()
    losia_fx.transform(model, rank_factor=0.4, schedule="sync", period=3, beta1=0.0, beta2=0.0, compiler="aot_eager")
    values = [subnet.values for subnet in losia_fx.subnets(model).values()]
    optimizer = torch.optim.SGD(values, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    controller = losia_fx.controller(model)

    def step(spoil: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(toys.loss_of(model, ids)).backward()
        if spoil:
            values[0].grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()

    before = [v.detach().clone() for v in values]
    step(spoil=True)
    assert controller.step == 0
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, values, strict=True))
    dense = copy.deepcopy(model)
    losia_fx.restore(dense)
    weights = {name: subnet.weight.detach().clone() for name, subnet in losia_fx.subnets(model).items()}
    expected = toys.plain_gradients(dense, ids)
    step(spoil=False)
    assert controller.step == 1
    assert controller.left_out == 0
    for state in states_of(model):
        assert state.profile is not None
        assert state.profile.importance is not None
        wanted = importance_of("mixed", weights[state.name], expected[state.name])
        error = float((state.profile.importance - wanted).abs().max())
        assert error <= 2e-2 * float(wanted.abs().max()), state.name


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(toys.VOCABULARY, 16)
        encoder = [nn.TransformerEncoderLayer(16, 2, 24, dropout=0.3, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(encoder)
        self.out = nn.Linear(16, toys.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.dropout(self.embed(ids), 0.2, self.training)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


@pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_dropout(compiler: str, training: bool) -> None:
    """The same random numbers; and in eval mode, in which torch's encoder has a path of its own, none."""
    model, ids = WithDropout().double().train(training), toys.batch()
    loss, expected = plain(model, ids)
    losia_fx.transform(model, rank_factor=0.4, compiler=compiler)
    torch.testing.assert_close(run(model, ids), loss, rtol=1e-10, atol=0)
    assert_same(model, expected, 1e-9)


class Normed(nn.Module):
    def __init__(self, norm: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(toys.VOCABULARY, 16)
        self.layers = nn.ModuleList(nn.Sequential(norm(nn.Linear(16, 16)), nn.Linear(16, 16)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_reparametrised_weights_are_left_dense_and_said(norm: Callable[..., nn.Module]) -> None:
    model, ids = Normed(norm).double().eval(), toys.batch()
    dense = Normed(norm).double().eval()
    dense.load_state_dict(model.state_dict())
    run(dense.requires_grad_(True), ids)
    losia_fx.transform(model, rank_factor=0.4, compiler="eager")
    run(model, ids)
    assert sorted(losia_fx.subnets(model)) == ["layers.0.1.weight", "layers.1.1.weight"]
    assert_same(model, {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}, 1e-10)
    normed = [row for row in losia_fx.report(model).weights if row.name.startswith(("layers.0.0.", "layers.1.0."))]
    parts = [row for row in normed if not row.name.endswith("bias")]
    assert parts
    assert all(row.trained == "frozen" and row.why.startswith("part of a reparametrised weight") for row in parts)
