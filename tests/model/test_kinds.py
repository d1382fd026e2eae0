"""What a parameter is, told from its owner."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm
from transformers.pytorch_utils import Conv1D

from losia_fx.model.kinds import (
    ATTENTION,
    EXPERTS,
    LINEAR,
    MATRIX,
    TRANSPOSED,
    holds_weights,
    holds_weights_itself,
    is_bare,
    is_embedding,
    kind_of,
    reparametrised,
)


class Router(nn.Module):
    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)
        self.table = nn.Parameter(torch.zeros(4, 4))


class Experts(nn.Module):
    def __init__(self, counted: int, name: str = "num_experts") -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(3, 8, 4))
        self.bias = nn.Parameter(torch.zeros(3, 8))
        self.scales = nn.Parameter(torch.zeros(3, 8, 1))
        setattr(self, name, counted)


class MyLinear(nn.Linear):
    pass


class MyNorm(nn.LayerNorm):
    pass


class MyConv(nn.Conv1d):
    pass


def attention(**options: int) -> nn.Module:
    return nn.MultiheadAttention(8, 2, **options)  # type: ignore[arg-type]


KINDS: list[tuple[Callable[[], nn.Module], str, str | None]] = [
    (lambda: nn.Linear(3, 4), "weight", LINEAR),
    (lambda: nn.Linear(3, 4), "bias", None),
    (lambda: MyLinear(3, 4), "weight", LINEAR),
    (lambda: Conv1D(4, 3), "weight", TRANSPOSED),
    (lambda: Conv1D(4, 3), "bias", None),
    (attention, "in_proj_weight", ATTENTION),
    (lambda: attention(kdim=3, vdim=5), "q_proj_weight", ATTENTION),
    (lambda: attention(kdim=3, vdim=5), "k_proj_weight", ATTENTION),
    (lambda: attention(kdim=3, vdim=5), "v_proj_weight", ATTENTION),
    (attention, "in_proj_bias", None),
    (lambda: attention().out_proj, "weight", LINEAR),  # type: ignore[arg-type,return-value]
    (lambda: Router(4, 8), "weight", MATRIX),
    (lambda: Router(4, 8), "table", None),
    (lambda: Router(1, 8), "weight", None),
    (lambda: Router(8), "weight", None),
    (lambda: Router(4, 8, dtype=torch.int8), "weight", None),
    (lambda: Experts(3), "gate_up", EXPERTS),
    (lambda: Experts(3, "n_routed_experts"), "gate_up", EXPERTS),
    (lambda: Experts(4), "gate_up", None),
    (lambda: Experts(3, "heads"), "gate_up", None),
    (lambda: Experts(3), "bias", None),
    (lambda: Experts(3), "scales", None),
    (lambda: nn.Embedding(4, 8), "weight", None),
    (lambda: nn.LayerNorm(8), "weight", None),
    (lambda: MyNorm((4, 8)), "weight", None),
    (lambda: nn.Conv1d(4, 8, 3), "weight", None),
    (lambda: MyConv(4, 8, 1), "weight", None),
    (lambda: nn.Bilinear(4, 8, 3), "weight", None),
    (lambda: nn.LSTM(4, 8), "weight_ih_l0", None),
]


@pytest.mark.parametrize(("make", "key", "kind"), KINDS)
def test_kind(make: Callable[[], nn.Module], key: str, kind: str | None) -> None:
    owner = make()
    parameter = owner._parameters[key]
    assert parameter is not None
    assert kind_of(owner, key, parameter) == kind


def test_reparametrised() -> None:
    plain, new = nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(3, 4))
    with pytest.warns(FutureWarning):
        old = weight_norm(nn.Linear(3, 4))
    assert not reparametrised(plain, "weight")
    assert not reparametrised(plain, "bias")
    assert reparametrised(old, "weight_g")
    assert reparametrised(old, "weight_v")
    assert "weight" not in old._parameters
    assert parametrize.is_parametrized(new)
    owners = [(owner, key) for owner in new.modules() for key in owner._parameters if key != "bias"]
    assert owners
    assert all(reparametrised(owner, key) for owner, key in owners)
    assert not holds_weights_itself(new)
    assert not holds_weights_itself(old)


def test_holders() -> None:
    assert holds_weights(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    assert not holds_weights_itself(nn.Sequential(nn.Linear(2, 2)))
    assert not holds_weights(nn.Sequential(nn.Embedding(2, 2), nn.Conv1d(2, 2, 1)))
    assert holds_weights_itself(attention())
    assert holds_weights(Experts(3))


def test_bare_and_embedding() -> None:
    assert is_bare(nn.Linear(2, 2))
    assert is_bare(Conv1D(2, 2))
    assert not is_bare(nn.Sequential(nn.Linear(2, 2)))
    assert is_embedding(nn.Embedding(2, 2))
    assert is_embedding(nn.EmbeddingBag(2, 2))
    assert not is_embedding(nn.Linear(2, 2))


class Stacks(nn.Module):
    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for index, shape in enumerate(shapes):
            self.register_parameter(f"stack_{index}", nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (((4, 8, 6), (4, 6, 8)), EXPERTS),  # two stacks of four: nobody needs to say that these are experts
        (((4, 8, 6),), None),
        (((4, 8, 6), (3, 6, 8)), None),
        (((1, 8, 6), (1, 8, 6)), None),
        (((4, 8, 6), (4, 1, 6)), None),
    ],
)
def test_stacks_that_no_attribute_counts(shapes: tuple[tuple[int, ...], ...], kind: str | None) -> None:
    owner = Stacks(*shapes)
    assert kind_of(owner, "stack_0", owner.stack_0) == kind
