"""Every form of a product through transform: exact gradients, the full one where profiled, and what they cost."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import losia_fx
from losia_fx.method.subnet import gather
from losia_fx.runtime.state import states_of
from tests.support.forms import BROKEN, FORMS, Form, Model

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROUNDED = 1e-2
"""bfloat16: both sides round once an op; the three-way rule is for whole models (architectures/test_experts.py)."""


def made(*forms: Form) -> tuple[Model, list[Tensor]]:
    dtype = forms[0].dtypes[0]
    torch.manual_seed(0)
    inputs = [torch.randn(form.x).to(dtype) for form in forms]
    return Model(*forms).to(dtype), inputs


def by_autograd(model: Model, inputs: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    twin = copy.deepcopy(model)
    loss = twin(inputs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def transformed(model: Model, **options: Any) -> Model:
    trainable = ["*scale", *(["*bias"] if any(layer.bias is not None for layer in model.layers) else [])]
    settings = {"rank_factor": 0.6, "trainable": trainable, "schedule": "sync", "period": 1000, **options}
    losia_fx.transform(model, **settings)
    return model


def assert_all_exact(model: Model, inputs: list[Tensor], loss: Tensor, expected: dict[str, Tensor]) -> None:
    dtype = inputs[0].dtype
    tolerance = TOLERANCE.get(dtype, ROUNDED)

    def check(actual: Tensor | None, wanted: Tensor, what: str, allowed: float = tolerance) -> None:
        assert actual is not None, what
        largest = float(wanted.abs().max())
        assert largest > 0, f"{what}: nothing to compare"
        assert float((actual.to(wanted.dtype) - wanted).abs().max()) <= allowed * largest, what

    model.zero_grad()
    actual = model(inputs)
    check(actual.detach(), loss, "loss")
    actual.backward()
    subnets, states = losia_fx.subnets(model), {state.name: state for state in states_of(model)}
    hidden = {id(subnet.values) for subnet in subnets.values()}
    for name, subnet in subnets.items():
        dense = expected[name]
        check(subnet.values.grad, gather(dense, subnet.rows, subnet.cols), name)
        assert subnet.weight.grad is None
        profile = states[name].profile
        assert profile is not None
        check(profile.grad, dense.float(), f"G of {name}", max(1e-6, tolerance))
    for name, parameter in model.named_parameters():
        if name not in subnets and id(parameter) not in hidden:
            check(parameter.grad, expected[name], name)


def is_named(form: Form) -> str:
    return form.name


class Computed(TorchDispatchMode):
    """Shapes of all that is computed anew, views and what is written in place aside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(tensor.shape))
        return result


def computed_shapes(model: Model, inputs: list[Tensor]) -> set[tuple[int, ...]]:
    """In a backward, outside of slots of profiling."""
    for state in states_of(model):
        state.profile = None
    loss = model(inputs)
    with Computed() as computed:
        loss.backward()
    return computed.shapes


def sizes_of_weight(form: Form) -> set[tuple[int, ...]]:
    """A weight's shape, an expert's, and both transposed."""
    *experts, first, second = form.weight
    return {(*experts, first, second), (*experts, second, first), (first, second), (second, first)}


@pytest.mark.parametrize("form", FORMS, ids=is_named)
def test_exact(form: Form) -> None:
    model, inputs = made(form)
    loss, expected = by_autograd(model, inputs)
    transformed(model, compiler="eager")
    for _ in range(2):
        assert_all_exact(model, inputs, loss, expected)
    (row,) = [row for row in losia_fx.report(model).weights if row.name == "layers.0.weight"]
    said, _, whole = row.used.partition("; full gradient for ")
    assert said == form.said
    assert bool(whole) == form.whole
    if not form.whole:
        assert not computed_shapes(model, inputs) & sizes_of_weight(form)
    assert [note for note in losia_fx.report(model).notes if "ran outside" in note] == []
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["products-and-more", "sliced", "einsum-3d"])
def test_a_full_gradient_is_computed_where_said(name: str) -> None:
    """So the test above would see one."""
    (form,) = [form for form in FORMS if form.name == name]
    model, inputs = made(form)
    transformed(model, compiler="eager")
    assert computed_shapes(model, inputs) & sizes_of_weight(form)


PLAIN = ("linear-3d", "addmm", "right", "left-3d", "einsum", "bmm", "bmm-left", "gathered", "grouped", "cast-to")


@pytest.mark.parametrize("form", [form for form in FORMS if form.name in PLAIN], ids=is_named)
def test_no_gradient_of_an_input_that_needs_none(form: Form) -> None:
    model, inputs = made(form)
    transformed(model, trainable=["*bias"] if form.bias else [], compiler="eager")
    computed = computed_shapes(model, inputs)
    assert losia_fx.subnets(model)["layers.0.weight"].values.grad is not None
    *several, last, width = (1, *form.x)
    assert not computed & {form.x, (*form.x[:-2], width, last), (math.prod(several) * last, width)}


@pytest.mark.filterwarnings("ignore:.*ran outside a rewritten graph")
@pytest.mark.parametrize("form", BROKEN, ids=is_named)
def test_exact_where_the_graph_breaks(form: Form) -> None:
    model, inputs = made(form)
    loss, expected = by_autograd(model, inputs)
    transformed(model, compiler="aot_eager")
    assert_all_exact(model, inputs, loss, expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.bfloat16))],
    ids=str,
)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_all_in_one_graph(compiler: str, dtype: torch.dtype) -> None:
    forms = [form for form in FORMS if dtype in form.dtypes]
    model, inputs = made(*forms)
    loss, expected = by_autograd(model, inputs)
    transformed(model, compiler=compiler)
    for _ in range(2):
        assert_all_exact(model, inputs, loss, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
