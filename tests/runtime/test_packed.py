"""W in 8 bits follows W, to the bit, whatever moves it; and what is said of it."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losia_fx
from losia_fx import LosiaWarning, StateError, TransformError
from losia_fx.method.packing import pack
from losia_fx.runtime import expected
from losia_fx.runtime.packed import PackedWeight
from losia_fx.runtime.state import SubnetState
from tests.support.eight_bits import KINDS, fast
from tests.support.toy_runs import adamw, learning, train
from tests.support.toys import Toy, batch, by_string, loss_of

__all__ = ["fast"]
OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "period": 2}


def made(kind: str = "int8", **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return losia_fx.transform(Toy(width=16, inner=32), **{**OPTIONS, "frozen_products": kind, **options})


def states_of(model: nn.Module) -> list[SubnetState]:
    return [state for state in losia_fx.controller(model).states if state.packed is not None]


def assert_packed(model: nn.Module) -> None:
    """What the graphs take next is what packing W now would give."""
    states = states_of(model)
    assert len(states) == 6
    for state in states:
        assert state.packed is not None
        numbers, scales = pack(state.weight.detach(), state.packed.kind)
        found, found_scales = state.packed_inputs()
        assert torch.equal(found.view(torch.uint8), numbers.view(torch.uint8)), state.name
        assert torch.equal(found_scales, scales), state.name


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that are packed as a whole, from now on."""
    found: list[str] = []
    plain = PackedWeight.of

    def noted(self: PackedWeight, weight: nn.Parameter, name: str) -> tuple[Tensor, Tensor]:
        if not self.is_of(weight):
            found.append(name)
        return plain(self, weight, name)

    monkeypatch.setattr(PackedWeight, "of", noted)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "all", "importance": "random", "period": 1},
        {"dtype": torch.bfloat16, "schedule": "static"},
        {"compiler": "aot_eager"},
    ],
    ids=["async", "every step", "bfloat16", "aot_eager"],
)
def test_steps_make_the_rows_anew_that_they_write(kind: str, options: dict[str, Any], whole: list[str]) -> None:
    """Through re-selections, at a rate at which rows outgrow the scales that they had."""
    dtype = options.pop("dtype", torch.float32)
    model = made(kind, **options).to(dtype)
    options["dtype"] = dtype
    optimizer = torch.optim.SGD(learning(model), lr=3.0)
    loss_of(model, batch()).backward()
    assert sorted(whole) == sorted(state.name for state in states_of(model))
    largest = {state.name: state.weight.detach().abs().amax(1) for state in states_of(model)}
    whole.clear()
    for _ in range(5):
        optimizer.step()
        assert_packed(model)
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
    assert whole == []
    grown = [state.weight.detach().abs().amax(1) > 1.01 * largest[state.name] for state in states_of(model)]
    assert all(bool(rows.any()) for rows in grown)


def _write_all(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.mul_(0.9)


def _write_elsewhere(model: nn.Module) -> None:
    """One element that is in no subnet."""
    with torch.no_grad():
        for state in states_of(model):
            outside = next(i for i in range(state.shape[0]) if i not in state.rows.tolist())
            state.weight[outside, 0] = 7.0


def _write_unseen(model: nn.Module) -> None:
    for state in states_of(model):
        state.weight.data.mul_(1.5)


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()})


def _assign(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()}, assign=True)


def _exchange_data(model: nn.Module) -> None:
    for state in states_of(model):
        state.weight.data = state.weight.data.clone() * 2


def _narrow(model: nn.Module) -> None:
    model.bfloat16()


def _move_a_subnet(model: nn.Module) -> None:
    for state in states_of(model):
        with torch.no_grad():
            state.values.add_(0.5)


OUTSIDE: list[Callable[[nn.Module], None]] = [
    _write_all, _write_elsewhere, _write_unseen, _load, _assign, _exchange_data, _narrow, _move_a_subnet,
]  # fmt: skip


@pytest.mark.parametrize("write", OUTSIDE, ids=lambda write: write.__name__.strip("_"))
@pytest.mark.parametrize("kind", KINDS)
def test_what_else_writes_a_weight_is_followed(kind: str, write: Callable[[nn.Module], None]) -> None:
    """The next forward is that of a model transformed with the weights as they are."""
    model = made(kind)
    train(model, adamw(learning(model)), [batch() for _ in range(3)])
    write(model)
    ids = batch()
    loss = loss_of(model, ids)
    fresh = Toy(width=16, inner=32).to(next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    losia_fx.transform(fresh, **OPTIONS, frozen_products=kind)
    assert torch.equal(loss, loss_of(fresh, ids))
    assert_packed(model)
    optimizer = adamw(learning(model))
    loss.backward()
    optimizer.step()
    assert_packed(model)


def test_a_second_forward_within_a_step_sees_the_weights_moved() -> None:
    """As sharpness-aware minimization has it: S is moved, used, and moved back before the step counts."""
    model = made()
    optimizer = adamw(learning(model))
    ids = batch()
    first = loss_of(model, ids)
    first.backward()
    with torch.no_grad():
        for state in losia_fx.controller(model).states:
            state.values.add_(0.05)
    assert not torch.equal(first, loss_of(model, ids))
    assert_packed(model)
    with torch.no_grad():
        for state in losia_fx.controller(model).states:
            state.values.sub_(0.05)
    optimizer.step()
    assert_packed(model)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_pack_for_themselves(again: Callable[[nn.Module], nn.Module]) -> None:
    model = made()
    train(model, adamw(learning(model)), [batch()])
    twin, ids = again(model), batch()
    held = {state.packed_inputs()[0].data_ptr() for state in states_of(model)}
    assert torch.equal(loss_of(model, ids), loss_of(twin, ids))
    train(twin, adamw(learning(twin)), [batch() for _ in range(3)])
    assert_packed(twin)
    assert_packed(model)
    assert not held & {state.packed_inputs()[0].data_ptr() for state in states_of(twin)}


def test_nothing_of_it_is_in_a_checkpoint_or_a_buffer() -> None:
    plain, model = made(None), made()  # type: ignore[arg-type]
    for each in (plain, model):
        loss_of(each, batch()).backward()
    assert list(plain.state_dict()) == list(model.state_dict())
    assert [name for name, _ in plain.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert losia_fx.state_dict(plain).keys() == losia_fx.state_dict(model).keys()


def test_restore_takes_it_off_and_the_weights_are_as_trained() -> None:
    model = made()
    train(model, adamw(learning(model)), [batch() for _ in range(3)])
    states, trained = states_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    losia_fx.restore(model)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert all(state.packed is None for state in states)


def test_without_gradients_the_weights_themselves_run() -> None:
    model, ids = made(), batch()
    plain = losia_fx.restore(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loss_of(model, ids), loss_of(plain, ids))
    assert not torch.equal(loss_of(model, ids), loss_of(plain, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    model = made(kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch())
    loss.backward()
    assert all(state.values.grad is not None for state in states_of(model))
    assert_packed(model)


def test_a_layer_of_another_role_in_one_graph_is_not_packed() -> None:
    """Its sizes do not fit: it shares no graph with those that are packed, and trains."""
    model = Toy(width=16, inner=32)
    model.layers[1].mlp.up, model.layers[1].mlp.down = nn.Linear(16, 20), nn.Linear(20, 16)
    losia_fx.transform(model, **OPTIONS, frozen_products="int8")
    loss_of(model, batch()).backward()
    said = {weight.name: weight.products for weight in losia_fx.report(model).weights}
    assert said["layers.1.mlp.up.weight"] == "dense: sizes that are no multiples of 8"
    assert all(state.values.grad is not None for state in losia_fx.controller(model).states)


def test_the_other_way_to_name_it() -> None:
    model = Toy(width=16, inner=32)
    for parameter in model.embed.parameters():
        parameter.requires_grad_(False)
    compiled = by_string(model, rank_factor=0.25, frozen_products="int8")
    loss = loss_of(compiled, batch())
    loss.backward()
    assert_packed(model)
    assert not torch.equal(loss, loss_of(losia_fx.restore(model), batch()))


# -- what is said -------------------------------------------------------------------------------------------------


class Also(Toy):
    """Takes one of its weights in another way, too."""

    def forward(self, ids: Tensor) -> Tensor:
        up: Any = self.layers[0].get_submodule("mlp.up").weight
        return super().forward(ids) + 0 * (self.embed(ids) @ up.t()).sum()


def test_the_report_says_which_weights_and_why_not() -> None:
    model = losia_fx.transform(Also(width=16, inner=32), **OPTIONS, frozen_products="int8", exclude=("layers.1.mix",))
    loss_of(model, batch()).backward()
    report = losia_fx.report(model)
    said = {weight.name: weight.products for weight in report.weights if weight.products}
    assert said == {
        "layers.0.mix.weight": "int8",
        "layers.0.mlp.up.weight": "int8; dense for matmul",
        "layers.0.mlp.down.weight": "int8",
        "layers.1.mix.weight": "dense: no subnet",
        "layers.1.mlp.up.weight": "int8",
        "layers.1.mlp.down.weight": "int8",
        "head.weight": "dense: output head",
    }
    assert "frozen products" in str(report)
    assert "frozen products" not in str(losia_fx.report(made(None)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "slow"), [(0.48, False), (1.0, True), (2.75, True)])
def test_a_line_says_what_to_expect(
    share: float, slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(expected, "share_of_dense", lambda *_: share)
    caplog.set_level(logging.INFO, "losia_fx")
    said = f"frozen_products='int8': a product of these takes {share:.2f} of the time of one in float32"
    if slow:
        with pytest.warns(LosiaWarning, match=f"{said} on this machine .cpu.: steps are slower"):
            model = made()
    else:
        model = made()
    assert (said in caplog.text) == (not slow)
    assert states_of(model)  # nothing else follows from the measurement


def test_a_model_without_such_weights() -> None:
    with pytest.warns(LosiaWarning, match="frozen_products='float8': no weight of this model has such products"):
        losia_fx.transform(Toy(width=12, inner=20), **OPTIONS, frozen_products="float8")


def test_a_machine_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on ...\nmore")

    monkeypatch.undo()
    monkeypatch.setattr(expected, "product", missing)
    expected.share_of_dense.cache_clear()
    model = Toy(width=16, inner=32)
    before = dict(vars(model))
    with pytest.raises(TransformError, match=r"frozen_products='int8': cpu has no product of these \(torch._scaled_mm"):
        losia_fx.transform(model, **OPTIONS, frozen_products="int8")
    assert vars(model).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(expected.SIZES, "cpu", (4, 16))
    expected.share_of_dense.cache_clear()
    for _ in range(2):
        assert expected.share_of_dense("int8", torch.float32, torch.device("cpu")) > 0
    assert expected.share_of_dense.cache_info().misses == 1
    expected.share_of_dense.cache_clear()


def test_a_shard_of_a_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losia_fx.runtime.packed.is_sharded", lambda weight: True)
    with pytest.raises(StateError, match=r"some\.weight: frozen_products='int8' needs all of a weight"):
        PackedWeight("int8").of(nn.Parameter(torch.zeros(8, 8)), "some.weight")
