"""A model whose weights are in 8 bits alone: their memory, what follows what, what is saved, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losia_fx
from losia_fx import DeltaError, StateError, TransformError
from losia_fx.method.importance import importance_of
from losia_fx.method.packing import pack
from losia_fx.runtime import expected
from losia_fx.runtime.quantised_weight import QuantisedWeight
from losia_fx.runtime.state import SubnetState
from tests.support.eight_bits import KINDS, fast
from tests.support.toy_runs import adamw, assert_same, batches, learning, train
from tests.support.toys import Toy, batch, by_string, loss_of, tiny_llama

__all__ = ["fast"]
OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "period": 2, "keep_dense": False}


def plain(dtype: torch.dtype = torch.float32, seed: int = 1, **sizes: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**{"width": 16, "inner": 32, **sizes}).to(dtype)


def made(kind: str = "int8", dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> nn.Module:
    return losia_fx.transform(plain(dtype, seed), **{**OPTIONS, "frozen_products": kind, **options})


def trained(kind: str = "int8", steps: int = 3, **options: Any) -> nn.Module:
    model = made(kind, **options)
    train(model, adamw(learning(model)), batches(steps))
    return model


def states_of(model: nn.Module) -> list[SubnetState]:
    return [state for state in losia_fx.controller(model).states if state.packed is not None]


def stored(state: SubnetState) -> QuantisedWeight:
    found = state.stored
    assert found is not None
    assert found is state.weight
    return found


def assert_agree(model: nn.Module) -> None:
    states = states_of(model)
    assert len(states) == 6
    for state in states:
        assert torch.equal(state.block(), state.as_held(state.values)), state.name
        assert state.owner._parameters[state.parameter] is stored(state)


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {state.name: stored(state).numbers.view(torch.uint8).clone() for state in states_of(model)}


# -- coming, staying, going -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_transform_puts_it_in_the_place_of_the_weight_and_frees_that(kind: str) -> None:
    model = plain(torch.bfloat16)
    gone = [weakref.ref(p) for name, p in model.named_parameters() if name.startswith("layers") and p.dim() == 2]
    packed = {n: pack(p.detach(), kind) for n, p in model.named_parameters() if n.startswith("layers") and p.dim() == 2}
    losia_fx.transform(model, **OPTIONS, frozen_products=kind)
    gc.collect()
    assert len(gone) == 6
    assert all(reference() is None for reference in gone)
    for state in states_of(model):
        weight = stored(state)
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.numbers.view(torch.uint8), packed[state.name][0].view(torch.uint8))
        assert torch.equal(weight.scales, packed[state.name][1])
        assert torch.equal(state.values, weight.block(state.rows, state.cols))
        assert state.values.dtype == torch.float32
        held = weight.numbers.untyped_storage().nbytes() + weight.scales.untyped_storage().nbytes()
        assert held == weight.numel() + 4 * weight.shape[0]
    dense = {name for name, p in model.named_parameters() if not isinstance(p, QuantisedWeight)}
    assert "head.weight" in dense
    assert "embed.weight" in dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_graphs_take_its_parts_and_nothing_of_its_size_is_kept_for_the_backward(kind: str, compiler: str) -> None:
    model = made(kind, compiler=compiler)
    mine = {part.data_ptr() for state in states_of(model) for part in state.packed_inputs()}
    large = {tuple(state.shape) for state in states_of(model)}
    kept: list[Tensor] = []
    loss_of(model, batch())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss_of(model, batch()).backward()
    of_weights = [tensor for tensor in kept if tuple(tensor.shape) in large]
    assert of_weights
    assert all(t.data_ptr() in mine or t.untyped_storage().nbytes() <= t.itemsize for t in of_weights)


@pytest.mark.parametrize("kind", KINDS)
def test_restore_gives_a_plain_weight_of_the_values(kind: str) -> None:
    model = trained(kind)
    values = {state.name: stored(state).dense() for state in states_of(model)}
    assert losia_fx.restore(model) is model
    parameters = dict(model.named_parameters())
    assert {type(parameter) for parameter in parameters.values()} == {nn.Parameter}
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    for name, value in values.items():
        assert torch.equal(parameters[name], value), name
    losia_fx.transform(model, **OPTIONS, frozen_products=kind)
    for state in states_of(model):  # a scale with room to spare is not found again: all is rounded once more
        off = ((stored(state).dense() - values[state.name]) / stored(state).scales).abs()
        assert float(off.max()) <= (0.51 if kind == "int8" else 16.1)


def test_what_is_refused_leaves_the_weights_to_the_bit() -> None:
    model = plain()
    model.layers[1].mix = model.layers[0].mix
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(TransformError, match=r"layers\.0\.mix\.weight: keep_dense=False and a weight that 2 modules"):
        losia_fx.transform(model, **OPTIONS, frozen_products="int8")
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    losia_fx.transform(model, **OPTIONS, frozen_products="int8", exclude=("*.mix",))
    assert len(states_of(model)) == 4


def test_a_machine_without_such_products_is_refused_with_the_weights_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> float:
        raise TransformError("no such product")

    monkeypatch.setattr(expected, "share_of_dense", refuse)
    model = plain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TransformError, match="no such product"):
        losia_fx.transform(model, **OPTIONS, frozen_products="int8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_by_the_string_it_is_refused() -> None:
    model = plain()
    with pytest.raises(Exception, match=r'keep_dense=False puts other parameters .* backend="losia"'):
        loss_of(by_string(model, rank_factor=0.25, frozen_products="int8", keep_dense=False), batch())
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_the_report_says_so() -> None:
    model = trained()
    said = {weight.name: weight.products for weight in losia_fx.report(model).weights if weight.products}
    assert said["layers.0.mix.weight"] == "int8, instead of W"
    assert said["head.weight"] == "dense: output head"


def test_weights_that_do_not_fit_stay_dense() -> None:
    model = plain()
    model.layers[1].mlp.up, model.layers[1].mlp.down = nn.Linear(16, 20), nn.Linear(20, 16)
    losia_fx.transform(model, **OPTIONS, frozen_products="int8")
    train(model, adamw(learning(model)), batches(5))
    assert type(model.layers[1].mlp.up.weight) is nn.Parameter
    assert len(states_of(model)) == 4


# -- running -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_model_runs_on_its_values(kind: str) -> None:
    model, ids = trained(kind), batch()
    dense = losia_fx.restore(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loss_of(model, ids), loss_of(dense, ids))
    with torch.inference_mode():
        assert torch.equal(loss_of(model, ids), loss_of(dense, ids))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_its_first_step_is_that_of_a_copy_beside_the_weight(kind: str, compiler: str) -> None:
    """The same numbers, so the same gradients: those of W itself are no part of them."""
    ids, found = batch(), []
    for keep_dense in (True, False):
        model = made(kind, keep_dense=keep_dense, compiler=compiler, seed=3)
        loss = loss_of(model, ids)
        loss.backward()
        found.append([loss, *(subnet.values.grad for subnet in losia_fx.subnets(model).values())])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_gradient_checkpointing_computes_the_same(compiler: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = plain(checkpointed=checkpointed)
        losia_fx.transform(model, **{**OPTIONS, "compiler": compiler}, frozen_products="int8")
        train(model, adamw(learning(model)), batches(3))
        found.append([subnet.values for subnet in losia_fx.subnets(model).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_step_makes_no_dense_weight(compiler: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is profiled: its products are of the numbers, and what is compared is of a subnet's rows."""
    model = plain(checkpointed=checkpointed)
    losia_fx.transform(model, **{**OPTIONS, "compiler": compiler, "schedule": "static"}, frozen_products="int8")
    optimizer = adamw(learning(model))
    train(model, optimizer, batches(1))
    made_dense: list[QuantisedWeight] = []
    monkeypatch.setattr(QuantisedWeight, "dense", lambda self, dtype=None: made_dense.append(self))
    train(model, optimizer, batches(3))
    assert not made_dense


class Also(Toy):
    """Takes one of its weights in another way, too."""

    def forward(self, ids: Tensor) -> Tensor:
        up: Any = self.layers[0].get_submodule("mlp.up").weight
        return super().forward(ids) + (self.embed(ids) @ up.t()).sum() / 100


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_product_that_stays_dense_takes_the_values(compiler: str) -> None:
    torch.manual_seed(1)
    model = losia_fx.transform(
        Also(width=16, inner=32), **{**OPTIONS, "compiler": compiler}, frozen_products="int8", exclude=("layers.1.*",)
    )
    ids, subnet = batch(), losia_fx.subnets(model)["layers.0.mlp.up.weight"]
    loss_of(model, ids).backward()
    dense = losia_fx.restore(copy.deepcopy(model))
    loss_of(dense, ids).backward()
    exact = dense.layers[0].mlp.up.weight.grad[subnet.rows][:, subnet.cols]
    assert subnet.values.grad is not None
    assert float((subnet.values.grad - exact).norm()) <= 0.1 * float(exact.norm())
    said = {weight.name: weight.products for weight in losia_fx.report(model).weights}
    assert said["layers.0.mlp.up.weight"] == "int8, instead of W; dense for matmul"


def test_a_use_outside_of_graphs_learns() -> None:
    """A part of the model called by itself: dense products of the values."""
    model, x = made(schedule="static"), torch.randn(2, 5, 16)
    part = model.get_submodule("layers.0.mlp")
    part(x).sum().backward()
    (up,) = (s for s in states_of(model) if s.name == "layers.0.mlp.up.weight")
    dense = losia_fx.restore(copy.deepcopy(model)).get_submodule("layers.0.mlp")
    dense.zero_grad()
    dense(x).sum().backward()
    exact = up.block_of(dense.up.weight.grad)  # type: ignore[union-attr,arg-type]
    assert up.values.grad is not None
    torch.testing.assert_close(up.values.grad, exact)


def test_a_use_that_no_mode_sees_learns() -> None:
    """The gradient of all of W, of which the subnet's part is taken."""
    model = made(schedule="static")
    (state, *_) = states_of(model)
    with losia_fx.runtime.outside.asking_for_gradients([state]):
        (state.weight * 2).sum().backward()
    assert torch.equal(state.values.grad, torch.full_like(state.values, 2.0))  # type: ignore[arg-type]
    assert not state.weight.requires_grad


def test_generate() -> None:
    model, ids = tiny_llama(layers=1), torch.tensor([[5, 6, 7]])
    losia_fx.transform(model, **OPTIONS, frozen_products="int8")
    found = model.generate(ids, max_new_tokens=5, do_sample=False)
    dense = losia_fx.restore(copy.deepcopy(model))
    assert torch.equal(found, dense.generate(ids, max_new_tokens=5, do_sample=False))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(subnet.values.grad is not None for subnet in losia_fx.subnets(model).values())


def test_micro_batches_add_up() -> None:
    model = made(schedule="static")
    found = []
    for each in (batches(2)[:1], batches(2)[1:], batches(2)):
        model.zero_grad()
        for ids in each:
            loss_of(model, ids).backward()
        found.append([subnet.values.grad for subnet in losia_fx.subnets(model).values()])
    for one, other, both in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one + other, both)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["mixed", "gradient", "visits"])
def test_importance_is_of_the_values_before_the_step(kind: str, importance: str) -> None:
    model = made(kind, schedule="sync", importance=importance, period=5)
    optimizer = torch.optim.SGD(learning(model), lr=0.5)
    loss_of(model, batch()).backward()
    before = {s: (s.weight.detach() + 0, s.profile.grad.clone()) for s in states_of(model)}  # type: ignore[union-attr]
    optimizer.step()
    for state, (weight, grad) in before.items():
        assert state.profile is not None
        if importance == "visits":
            assert state.profile.row_sums is not None
            torch.testing.assert_close(state.profile.row_sums, 0.15 * grad.square().sum(1))
            continue
        assert state.profile.importance is not None
        torch.testing.assert_close(state.profile.importance, 0.15 * importance_of(importance, weight, grad))


# -- S and W -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"schedule": "all", "importance": "random", "period": 1}], ids=["async", "all"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_they_agree_after_every_step_and_s_keeps_what_w_cannot(kind: str, options: dict[str, Any]) -> None:
    model = made(kind, **options)
    optimizer = torch.optim.SGD(learning(model), lr=1.0)
    for ids in batches(6):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_agree(model)
    beyond = [not torch.equal(state.values, state.block()) for state in states_of(model)]
    assert any(beyond) != bool(options)  # where it has just moved, S is what W holds
    kept = [state.values.clone() for state in states_of(model)]
    loss_of(model, batch())
    assert all(torch.equal(state.values, before) for state, before in zip(states_of(model), kept, strict=True))


def _grow(model: nn.Module) -> None:
    for state in states_of(model):
        with torch.no_grad():
            state.values.mul_(5.0)


def _move(model: nn.Module) -> None:
    for state in states_of(model):
        with torch.no_grad():
            state.values.add_(0.01)


def _move_unseen(model: nn.Module) -> None:
    for state in states_of(model):
        state.values.data.add_(0.01)


@pytest.mark.parametrize("write", [_move, _grow, _move_unseen], ids=lambda write: write.__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learns", [True, False])
def test_s_written_by_hand_is_followed(kind: str, write: Callable[[nn.Module], None], learns: bool) -> None:
    model = trained(kind, schedule="static")
    write(model)
    kept = [state.values.clone() for state in states_of(model)]
    with torch.set_grad_enabled(learns):
        loss_of(model, batch())
    assert_agree(model)
    assert all(torch.equal(state.values, before) for state, before in zip(states_of(model), kept, strict=True))


def _load(model: nn.Module, values: dict[str, Tensor]) -> None:
    model.load_state_dict(values)


def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    model.load_state_dict(values, assign=True)


def _copy(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def _copy_unseen(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data.copy_(values[name])


def _exchange_data(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data = values[name].clone()


def _exchange(model: nn.Module, values: dict[str, Tensor]) -> None:
    for state in states_of(model):
        setattr(state.owner, state.parameter, nn.Parameter(values[state.name].clone(), requires_grad=False))


WRITES = [_load, _assign, _copy, _copy_unseen, _exchange_data, _exchange]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.strip("_"))
@pytest.mark.parametrize("kind", KINDS)
def test_w_written_as_a_whole_is_followed(kind: str, write: Callable[[nn.Module, dict[str, Tensor]], None]) -> None:
    """And packed: as a model transformed with those weights has it."""
    model, other = trained(kind), plain(seed=5)
    write(model, {name: value.clone() for name, value in other.state_dict().items() if name.startswith("layers")} | {
        name: value for name, value in model.state_dict().items() if not name.startswith("layers")
    })  # fmt: skip
    loss_of(model, batch()).backward()
    losia_fx.transform(other, **OPTIONS, frozen_products=kind)
    assert_agree(model)
    for mine, fresh in zip(states_of(model), states_of(other), strict=True):
        assert torch.equal(stored(mine).numbers.view(torch.uint8), stored(fresh).numbers.view(torch.uint8))
        assert not mine.weight.requires_grad


def test_numbers_written_where_no_version_shows_it_are_followed() -> None:
    model = trained(schedule="static")
    for _ in range(5):
        loss_of(model, batch()).backward()  # the looks that compare values in any case are over
    (state, *_) = states_of(model)
    row = state.rows[len(state.rows) // 2]
    stored(state).numbers.data[row] = 0
    assert losia_fx.controller(model).agreement.shows_a_write()
    loss_of(model, batch())
    assert not state.values[len(state.rows) // 2].any()
    assert_agree(model)


def test_both_written_is_refused() -> None:
    model = trained(schedule="static")
    (state, *_) = states_of(model)
    with torch.no_grad():
        state.weight.copy_(torch.randn(state.shape))
        state.values.add_(0.5)
    with pytest.raises(StateError, match=f"{state.name}: both the weight and the values"):
        loss_of(model, batch())


def test_a_write_through_a_view_is_refused_once() -> None:
    model = trained(schedule="static")
    (state, *_) = states_of(model)
    with torch.no_grad():
        state.weight[0].zero_()
    with pytest.raises(StateError, match=f"{state.name}: was written through a view of it"):
        loss_of(model, batch())
    loss_of(model, batch()).backward()
    assert_agree(model)


def test_a_row_that_grows_takes_its_witness_along() -> None:
    """Where a subnet has every row, what tells a write to all of W is a column, which a new scale of a row writes."""
    model = made("int8", rank_factor=1.0, schedule="static")
    for state in states_of(model):
        state.cols.resize_(4).copy_(torch.arange(4))
        state.values.data = state.values.data[:, :4].clone()
    controller = losia_fx.controller(model)
    controller.agreement.remember(places=True)
    optimizer = torch.optim.SGD([state.values for state in states_of(model)], lr=1.0)
    for state in states_of(model):
        state.values.grad = -100.0 * state.values.detach()
    optimizer.step()
    before = {state: state.values.clone() for state in states_of(model)}
    for state in states_of(model):
        state.values.data.mul_(0.5)
    controller.agreement.compare()
    for state, values in before.items():
        assert torch.equal(state.values, 0.5 * values)
    assert_agree(model)


def test_a_step_that_is_left_out_changes_nothing() -> None:
    model = trained(schedule="static")
    before = numbers(model)
    optimizer = torch.optim.SGD(learning(model), lr=0.0)
    loss_of(model, batch()).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in numbers(model).items())


# -- copies and moves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_as_the_model_does(kind: str, again: Callable[[nn.Module], nn.Module]) -> None:
    model = trained(kind)
    twin = again(model)
    assert_same(model, twin)
    assert all(s.weight is not t.weight for s, t in zip(states_of(model), states_of(twin), strict=True))
    for each in (model, twin):
        train(each, torch.optim.SGD(learning(each), lr=0.1), batches(5))
        assert_agree(each)
    assert_same(model, twin)


def test_a_copy_made_when_w_had_yet_to_follow() -> None:
    model = trained(schedule="static")
    _move(model)
    twin = copy.deepcopy(model)
    loss_of(model, batch())
    loss_of(twin, batch())
    assert_same(model, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_dtype_and_back(kind: str) -> None:
    model = trained(kind)
    before, order = numbers(model), [name for name, _ in model.named_parameters()]
    for dtype in (torch.bfloat16, torch.float32):
        assert model.to(dtype) is model
        assert [name for name, _ in model.named_parameters()] == order
        assert all(state.weight.dtype == dtype and state.values.dtype == torch.float32 for state in states_of(model))
        assert all(torch.equal(value, before[name]) for name, value in numbers(model).items())
        loss_of(model, batch()).backward()
        assert_agree(model)
    train(model, adamw(learning(model)), batches(3))
    assert_agree(model)


def test_to_where_it_is_leaves_the_tensors() -> None:
    model = made()
    held = [state.weight for state in states_of(model)]
    model.to("cpu").float()
    assert all(state.weight is weight for state, weight in zip(states_of(model), held, strict=True))


def test_the_meta_device_is_refused_as_ever() -> None:
    model = made()
    model.to("meta")
    with pytest.raises(StateError):
        model.to_empty(device="cpu")


# -- what is saved -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_dense_and_a_plain_models(kind: str, dtype: torch.dtype) -> None:
    model = trained(kind, dtype=dtype)
    saved = model.state_dict()
    assert list(saved) == list(plain(dtype).state_dict())
    assert {type(value) for value in saved.values()} == {Tensor}
    assert {value.dtype for value in saved.values()} == {dtype}
    for state in states_of(model):
        assert torch.equal(saved[state.name], stored(state).dense())
    other = plain(dtype, seed=9)
    other.load_state_dict(saved)
    with torch.no_grad():
        ids = batch()
        assert torch.equal(loss_of(other, ids), loss_of(model, ids))
    assert isinstance(model.state_dict(keep_vars=True)[states_of(model)[0].name], QuantisedWeight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_its_own_values_back_changes_nothing(dtype: torch.dtype) -> None:
    """As load_best_model_at_end and averages put back do."""
    model = trained(steps=7, dtype=dtype)
    before, learnt = numbers(model), [values.detach().clone() for values in losia_values(model)]
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, before[name]) for name, value in numbers(model).items())
    assert all(torch.equal(one, other) for one, other in zip(losia_values(model), learnt, strict=True))


def losia_values(model: nn.Module) -> list[nn.Parameter]:
    return [subnet.values for subnet in losia_fx.subnets(model).values()]


def test_save_pretrained_and_back(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny_llama(layers=1), torch.tensor([[5, 6, 7]])
    losia_fx.transform(model, **OPTIONS, frozen_products="int8")
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(learning(model), lr=0.1).step()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_state_has_scales_and_belongs_to_its_storage() -> None:
    model, beside = trained(), trained(keep_dense=True)
    state, other = losia_fx.state_dict(model), losia_fx.state_dict(beside)
    names = {f"{each.name}:scales" for each in states_of(model)}
    assert state.keys() - other.keys() == names
    for each in states_of(model):
        assert torch.equal(state[f"{each.name}:scales"], stored(each).scales.view(-1))
    with pytest.raises(StateError, match="keep_dense was True and is False"):
        losia_fx.load_state_dict(model, other)
    with pytest.raises(StateError, match="keep_dense was False and is True"):
        losia_fx.load_state_dict(beside, state)
    with pytest.raises(StateError, match="frozen_products was 'int8' and is 'float8'"):
        losia_fx.load_state_dict(made("float8"), state)
    name = min(names)
    with pytest.raises(StateError, match=f"{name} is missing"):
        losia_fx.load_state_dict(model, {key: value for key, value in state.items() if key != name})
    with pytest.raises(StateError, match=f"{name} is "):
        losia_fx.load_state_dict(model, {**state, name: state[name].double()})


def test_a_state_from_before_there_was_a_choice() -> None:
    model = trained(keep_dense=True)
    state = losia_fx.state_dict(model)
    del state["config"]["keep_dense"]
    losia_fx.load_state_dict(model, state)
    with pytest.raises(StateError, match="keep_dense was True and is False"):
        losia_fx.load_state_dict(trained(), state)


def test_a_state_without_its_weights_is_named_and_changes_no_weight() -> None:
    model, other = trained(), trained(seed=8, steps=5)
    before = numbers(model)
    losia_fx.load_state_dict(model, losia_fx.state_dict(other))
    assert all(torch.equal(value, before[name]) for name, value in numbers(model).items())
    loss_of(model, batch()).backward()
    with pytest.raises(StateError, match="Load the model's weights of the same checkpoint as well"):
        adamw(learning(model)).step()
    model.load_state_dict(other.state_dict())
    for mine, its in zip(states_of(model), states_of(other), strict=True):
        assert torch.equal(stored(mine).numbers, stored(its).numbers)
        assert torch.equal(stored(mine).scales, stored(its).scales)
        assert torch.equal(mine.values, its.values)


def test_a_state_loaded_into_the_very_model_goes_back() -> None:
    model = trained(schedule="static")
    weights, state = copy.deepcopy((model.state_dict(), losia_fx.state_dict(model)))
    before, scales = numbers(model), [stored(each).scales.clone() for each in states_of(model)]
    train(model, torch.optim.Adam(learning(model), lr=0.3), batches(4))
    assert not torch.equal(stored(states_of(model)[0]).scales, scales[0])
    model.load_state_dict(weights)
    losia_fx.load_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in numbers(model).items())
    for each, scale in zip(states_of(model), scales, strict=True):
        assert torch.equal(stored(each).scales, scale)


def test_weights_of_another_run_let_its_awaited_scales_be() -> None:
    """Loaded after a state that they do not belong to, they are packed by themselves."""
    model, other, third = trained(), trained(seed=8), plain(seed=9)
    losia_fx.load_state_dict(model, losia_fx.state_dict(other))
    model.load_state_dict(third.state_dict())
    for state in states_of(model):
        numbers, scales = pack(dict(third.named_parameters())[state.name].detach(), "int8")
        assert torch.equal(stored(state).numbers, numbers)
        assert torch.equal(stored(state).scales, scales)


def test_what_was_loaded_is_let_go_at_the_next_forward() -> None:
    model = made()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    kept = weakref.ref(values["layers.0.mix.weight"])
    model.load_state_dict(values)
    del values
    gc.collect()
    assert kept() is not None  # a LoSiA state may follow
    loss_of(model, batch())
    gc.collect()
    assert kept() is None


# -- the ways around a step --------------------------------------------------------------------------------------------


def test_steps_by_hand() -> None:
    model = made()
    for ids in batches(5):
        loss_of(model, ids).backward()
        with torch.no_grad():
            for parameter in learning(model):
                assert parameter.grad is not None
                parameter.sub_(0.5 * parameter.grad)
        losia_fx.stepped(model)
        model.zero_grad()
        assert_agree(model)
    assert losia_fx.controller(model).history


def test_a_second_forward_within_a_step_measures_by_w_of_before() -> None:
    """As sharpness-aware minimization has it: S is moved, used, and moved back before the step counts."""
    model = made(schedule="sync", period=5)
    optimizer, ids = torch.optim.SGD(learning(model), lr=0.1), batch()
    before = numbers(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        return loss

    closure()
    with torch.no_grad():
        for state in states_of(model):
            state.values.add_(0.003)
    closure()
    assert any(not torch.equal(value, before[name]) for name, value in numbers(model).items())
    with torch.no_grad():
        for state in states_of(model):
            state.values.sub_(0.003)
    optimizer.step()
    assert_agree(model)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    model = made(kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch())
        assert F.linear(torch.ones(1, 16), states_of(model)[0].weight).dtype == torch.bfloat16
    loss.backward()
    adamw(learning(model)).step()
    assert_agree(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_tear(bad: float) -> None:
    model = made(schedule="static")
    (state, *_) = states_of(model)
    optimizer = torch.optim.SGD(learning(model), lr=1.0)
    loss_of(model, batch()).backward()
    assert state.values.grad is not None
    state.values.grad[0, 0] = bad
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(3):
        loss_of(model, batch())
    assert bool(state.weight[state.rows[0]].isnan().all())


# -- other uses --------------------------------------------------------------------------------------------------------


def test_a_weight_used_by_hand() -> None:
    model = made(schedule="static")
    (state, *_) = states_of(model)
    dense = losia_fx.dense(model, state.name)
    assert torch.equal(dense, stored(state).dense())
    (3 * dense).sum().backward()
    assert torch.equal(state.values.grad, torch.full_like(state.values, 3.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("learns", [True, False])
def test_functional_call_runs_with_what_it_is_given(learns: bool) -> None:
    model, other, ids = trained(schedule="static"), plain(seed=6), batch()
    given = {name: value.detach() for name, value in other.named_parameters()}
    with torch.set_grad_enabled(learns):
        found = torch.func.functional_call(model, given, (ids,))
        assert torch.equal(found, other(ids))
    loss_of(model, ids).backward()
    assert_agree(model)


def test_export_is_of_the_values() -> None:
    model, ids = trained(schedule="static"), batch()
    with torch.no_grad():
        expected = model(ids)
    exported = torch.export.export(model, (ids,), strict=False).module()
    torch.testing.assert_close(exported(ids), expected)


def test_no_delta_is_of_it(tmp_path: Any) -> None:
    tracked = made(keep_dense=True, track_delta=True)
    model = made()
    with pytest.raises(DeltaError, match=r"layers\.0\.mix\.weight: is kept in 8 bits \(keep_dense=False\)"):
        losia_fx.save_delta(model, tmp_path / "some.safetensors")
    train(tracked, adamw(learning(tracked)), batches(2))
    losia_fx.save_delta(tracked, tmp_path / "some.safetensors")
    before = numbers(model)
    with pytest.raises(DeltaError, match=r"is kept in 8 bits \(keep_dense=False\)"):
        losia_fx.load_delta(model, tmp_path / "some.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in numbers(model).items())


def test_an_average_of_models_is_packed_anew_and_one_in_place_refused() -> None:
    swa = torch.optim.swa_utils
    model, other = trained(schedule="static"), trained(steps=6, schedule="static")
    averaged = swa.AveragedModel(model)
    for each in (model, other):
        averaged.update_parameters(each)
    with torch.no_grad():
        averaged(batch())
    for mean, one, two in zip(*(states_of(each) for each in (averaged.module, model, other)), strict=True):
        exact = (stored(one).dense() + stored(two).dense()) / 2
        assert bool(((stored(mean).dense() - exact).abs() <= 0.51 * stored(mean).scales).all())
        assert torch.equal(mean.block(), mean.as_held(mean.values))
    averaged = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    with pytest.raises(losia_fx.LosiaError, match="keep_dense=True"):
        averaged.update_parameters(other)


def test_a_slot_in_the_midst_of_which_weights_are_loaded() -> None:
    model = made(schedule="sync", period=4)
    optimizer = adamw(learning(model))
    train(model, optimizer, batches(2))
    model.load_state_dict(plain(seed=4).state_dict())
    train(model, optimizer, batches(4))
    assert_agree(model)
    assert len(losia_fx.controller(model).history) >= 1


def test_interrupted_in_a_move_it_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What W holds of S is drawn before anything moves: a move that is made again finds it done."""
    model = made(schedule="all", importance="random", period=1)
    optimizer = torch.optim.SGD(learning(model), lr=0.1)
    plain_move, calls = SubnetState.move_to, 0

    def cut_in(self: SubnetState, rows: Tensor, cols: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            self.rows.copy_(rows)
            raise KeyboardInterrupt
        plain_move(self, rows, cols)

    loss_of(model, batch()).backward()
    monkeypatch.setattr(SubnetState, "move_to", cut_in)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    before = numbers(model)
    loss_of(model, batch()).backward()
    assert all(torch.equal(value, before[name]) for name, value in numbers(model).items())
    assert_agree(model)
