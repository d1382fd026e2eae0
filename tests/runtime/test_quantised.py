"""Weights that no subnet can be had of: how many stay frozen is said, and float8 is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losia_fx
from losia_fx import LosiaWarning, TransformError
from tests.support.toys import Toy, batch, by_string, fingerprint, loss_of

OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25}
SAID = "linear weights stay frozen"


class Packed(torch.Tensor):
    """As torchao's weights are: a tensor subclass with a meaning of its own."""


class Scaled(nn.Module):
    """x (stored * scale)^T: as transformers' FP8Linear and 8-bit linears are."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = linear
        self.scale = nn.Parameter(linear.weight.detach().abs().max() / 100)
        linear.weight = nn.Parameter((linear.weight.detach() / self.scale.detach()).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stored.weight.to(x.dtype) * self.scale, self.stored.bias)


def pack(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)
    return linear


def by_int8(linear: nn.Linear) -> nn.Module:
    return Scaled(linear, torch.int8)


def by_float8(linear: nn.Linear) -> nn.Module:
    return Scaled(linear, torch.float8_e4m3fn)


def toy(change: Callable[[nn.Linear], nn.Module], *names: str) -> Toy:
    """A Toy whose linears of these names, in every block, are changed."""
    torch.manual_seed(0)
    model = Toy()
    for block in model.layers:
        for name in names:
            path, _, last = name.rpartition(".")
            owner = block.get_submodule(path)
            setattr(owner, last, change(getattr(owner, last)))
    return model


ALL = ("mix", "mlp.up", "mlp.down")


def plain_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of what can have any."""
    loss_of(model, ids).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def warned(model: nn.Module, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losia_fx.transform(model, **OPTIONS, **options)
    assert all(issubclass(warning.category, LosiaWarning) for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("change", "why"),
    [(pack, "type Packed: left dense"), (by_int8, "stored as 2-D int8: left dense")],
    ids=["subclass", "int8"],
)
def test_a_quantised_base_is_said(change: Callable[[nn.Linear], nn.Module], why: str) -> None:
    (said,) = warned(toy(change, *ALL))
    assert f"6 of 7 {SAID}: 6 x {why}" in said


def test_what_learns_beside_a_quantised_base_is_exact() -> None:
    model, ids = toy(by_int8, *ALL), batch()
    expected = plain_gradients(model, ids)
    warned(model)
    loss_of(model, ids).backward()
    subnets = losia_fx.subnets(model)
    assert list(subnets) == ["head.weight"]
    subnet = subnets["head.weight"]
    torch.testing.assert_close(subnet.values.grad, expected["head.weight"][subnet.rows])


def test_every_reason_with_its_count() -> None:
    model = toy(by_int8, "mix", "mlp.up")
    model.layers[0].mlp.down = pack(model.layers[0].mlp.down)
    (said,) = warned(model)
    assert f"5 of 7 {SAID}: 4 x stored as 2-D int8: left dense; 1 x type Packed: left dense" in said


@pytest.mark.parametrize(
    ("names", "options"),
    [(("mix",), {}), ((), {"exclude": ["layers.*"]}), ((), {"target": ["layers.0.mix", "head"]})],
    ids=["a few", "excluded", "not targeted"],
)
def test_no_warning_of_a_few_or_of_what_was_asked_for(
    names: tuple[str, ...], options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="losia_fx"):
        assert warned(toy(by_int8, *names), **options) == []
    (said,) = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    assert f"{2 if names else 5 if 'target' in options else 6} of 7" in said


def test_half_is_not_most() -> None:
    model = toy(by_int8, *ALL)
    model.layers[1] = Toy().layers[1]
    model.layers.append(Toy().layers[0])
    model.layers[2].mlp.up = by_int8(model.layers[2].mlp.up)  # 4 of 10
    model.layers[2].mlp.down = by_int8(model.layers[2].mlp.down)  # 5
    assert warned(model) == []


def test_a_head_that_was_turned_off_was_asked_for() -> None:
    model = toy(by_int8, "mix", "mlp.up")
    del model.layers[1]
    assert warned(model, output_rank_factor=0) == []


def test_nothing_is_said_where_nothing_stays_frozen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="losia_fx"):
        assert warned(Toy()) == []
    assert [record for record in caplog.records if SAID in record.getMessage()] == []


# -- float8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [ALL, ("mlp.up",)], ids=["all", "some"])
def test_float8_is_refused_by_name_and_nothing_is_changed(names: tuple[str, ...]) -> None:
    model = toy(by_float8, *names)
    before = fingerprint(model)
    with pytest.raises(TransformError, match=r"float8 weights.*layers\.0\..*stored\.weight.*float8_e4m3fn"):
        losia_fx.transform(model, **OPTIONS)
    assert fingerprint(model) == before
    assert losia_fx.transform(toy(by_float8, "mix"), exclude=["layers.*.mix.stored"], **OPTIONS)


def test_float8_experts_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 3
            self.up = nn.Parameter(torch.randn(3, 8, 16).to(torch.float8_e5m2), requires_grad=False)

    model = Toy()
    for block in model.layers:
        block.experts = Experts()
    with pytest.raises(TransformError, match=r"layers\.0\.experts\.up.*float8_e5m2"):
        losia_fx.transform(model, **OPTIONS)


def test_float8_cannot_be_trained_in_full() -> None:
    with pytest.raises(TransformError, match=r"layers\.0\.mix\.stored\.weight"):
        losia_fx.transform(toy(by_float8, "mix"), trainable=["layers.0.mix.*"], exclude=["*.mix.*"], **OPTIONS)


def test_what_learns_beside_float8_is_exact() -> None:
    model, ids = toy(by_float8, "mix"), batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, exclude=["*.mix.stored"], **OPTIONS)
    loss_of(model, ids).backward()
    subnets = losia_fx.subnets(model)
    assert len(subnets) == 5
    for name, subnet in subnets.items():
        torch.testing.assert_close(subnet.values.grad, expected[name][subnet.rows][:, subnet.cols])


def test_by_the_string_float8_is_refused_where_it_asks_for_a_gradient() -> None:
    model = toy(by_float8, "mix")
    loss_of(by_string(model), batch()).backward()
    assert len(losia_fx.subnets(model)) == 5
    model = toy(by_float8, "mix")
    model.layers[0].mix.stored.weight.requires_grad_(True)
    with pytest.raises(Exception, match="float8 weights cannot learn"):
        loss_of(by_string(model), batch()).backward()


# -- bitsandbytes ----------------------------------------------------------------------------------------------------


def by_bitsandbytes(bits: int) -> Callable[[nn.Linear], nn.Module]:
    bnb = pytest.importorskip("bitsandbytes")

    def change(linear: nn.Linear) -> nn.Module:
        out, into = linear.weight.shape
        if bits == 4:
            made = bnb.nn.Linear4bit(into, out, bias=False, compute_dtype=torch.float32)
        else:
            made = bnb.nn.Linear8bitLt(into, out, bias=False, has_fp16_weights=False)
        made.load_state_dict({"weight": linear.weight.detach()})
        return made.to("cpu")

    return change


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int) -> None:
    model, ids = toy(by_bitsandbytes(bits), *ALL), batch()
    expected = plain_gradients(model, ids)
    (said,) = warned(model)
    assert f"6 of 7 {SAID}: 6 x stored as 2-D {'uint8 (Params4bit)' if bits == 4 else 'int8 (Int8Params)'}" in said
    loss_of(model, ids).backward()
    (subnet,) = losia_fx.subnets(model).values()
    torch.testing.assert_close(subnet.values.grad, expected["head.weight"][subnet.rows])
