"""A weight in 8 bits is to all that reads it the dense one, stays what it is where it is copied, and takes no write
that it could not keep."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losia_fx import LosiaError
from losia_fx.method.packing import DTYPES, pack
from losia_fx.runtime.quantised_weight import QuantisedWeight

each_kind = pytest.mark.parametrize("kind", tuple(DTYPES))


def made(kind: str = "int8", dtype: torch.dtype = torch.bfloat16) -> QuantisedWeight:
    torch.manual_seed(2)
    found = nn.Parameter(QuantisedWeight.of(torch.randn(16, 8).to(dtype), kind), requires_grad=False)
    assert isinstance(found, QuantisedWeight)
    return found


def parts(weight: Any) -> tuple[Tensor, Tensor]:
    assert isinstance(weight, QuantisedWeight)
    return weight.numbers.view(torch.uint8), weight.scales


def assert_same_parts(one: Any, other: Any) -> None:
    for mine, its in zip(parts(one), parts(other), strict=True):
        assert torch.equal(mine, its)


@each_kind
def test_it_looks_like_the_dense_weight_and_holds_half_of_it(kind: str) -> None:
    weight = made(kind)
    assert isinstance(weight, nn.Parameter)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((16, 8), torch.bfloat16, "cpu")
    assert weight.kind == kind
    assert weight.stride() == (8, 1)
    assert not weight.requires_grad
    assert sum(part.untyped_storage().nbytes() for part in parts(weight)) == 16 * 8 + 4 * 16


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_its_values_are_numbers_times_scales(kind: str, dtype: torch.dtype) -> None:
    weight = made(kind, dtype)
    numbers, scales = pack(torch.manual_seed(2) and torch.randn(16, 8).to(dtype), kind)
    assert torch.equal(weight.dense(), (numbers.float() * scales).to(dtype))


READS: list[Callable[[Tensor], Tensor]] = [
    lambda w: w + 1,
    lambda w: w.t(),
    lambda w: w[3:7, 2],
    lambda w: w.reshape(-1),
    lambda w: w.abs().amax(1),
    lambda w: w.to(torch.int32),
    lambda w: w @ w.t(),
    lambda w: torch.cat([w, w]),
    lambda w: torch.stack([w, w]).sum(0),
    lambda w: w.index_select(0, torch.tensor([5, 1, 5])),
    lambda w: w.index_select(-2, torch.tensor([5, 1])),
    lambda w: w.index_select(1, torch.tensor([7, 0])),
    lambda w: w[torch.tensor([5, 1])],
    lambda w: torch.zeros_like(w),
    lambda w: torch.ones_like(w, dtype=torch.float32),
    lambda w: F.linear(torch.ones(3, 8, dtype=w.dtype), w),
    lambda w: F.embedding(torch.tensor([[1, 15]]), w),
    lambda w: torch.einsum("oi,bi->bo", w, torch.ones(2, 8, dtype=w.dtype)),
]


@pytest.mark.parametrize("read", READS)
@each_kind
def test_whatever_reads_it_is_given_the_values(read: Callable[[Tensor], Tensor], kind: str) -> None:
    weight = made(kind)
    found, expected = read(weight), read(weight.dense())
    assert type(found) is Tensor
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@each_kind
def test_gradients_go_through_it_and_to_it(kind: str) -> None:
    weight, x = made(kind), torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight.requires_grad_(True)
    dense = weight.dense().detach().requires_grad_()
    for w in (weight, dense):
        F.linear(x, w).square().sum().backward()
    assert weight.grad is not None
    assert dense.grad is not None
    assert torch.equal(weight.grad, dense.grad)


COPIES: list[Callable[[Tensor], Tensor]] = [
    lambda w: w.detach(),
    lambda w: w.data,
    lambda w: w.clone(),
    copy.copy,
    copy.deepcopy,
    lambda w: pickle.loads(pickle.dumps(w)),
    lambda w: through_save(w),
    lambda w: w.to(torch.float32),
    lambda w: w.half(),
    lambda w: w.to("cpu", copy=True),
    lambda w: nn.Parameter(w, requires_grad=False),
]


def through_save(weight: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    found: Tensor = torch.load(buffer, weights_only=False)
    return found


@pytest.mark.parametrize("again", COPIES)
@each_kind
def test_copies_are_of_its_kind(again: Callable[[Tensor], Tensor], kind: str) -> None:
    weight = made(kind)
    twin = again(weight)
    assert_same_parts(twin, weight)
    assert isinstance(twin, QuantisedWeight)
    assert twin.dense(torch.bfloat16).equal(weight.dense())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), Tensor.clone])
@pytest.mark.parametrize("learns", [False, True])
def test_copies_are_apart_and_parameters_stay_so(again: Callable[[Tensor], Tensor], learns: bool) -> None:
    weight = made().requires_grad_(learns)
    twin = again(weight.detach() if again is Tensor.clone else weight)
    assert isinstance(twin, QuantisedWeight)
    assert isinstance(twin, nn.Parameter) == (again is not Tensor.clone)
    assert twin.requires_grad == (learns and again is not Tensor.clone)
    before = weight.dense()
    with torch.no_grad():
        twin.copy_(torch.zeros(16, 8))
    assert torch.equal(weight.dense(), before)
    assert not twin.dense().any()


def test_one_tensor_of_two_modules_is_one_in_a_copy() -> None:
    module = nn.Module()
    module.one = module.other = made()  # type: ignore[assignment]
    twin = copy.deepcopy(module)
    assert twin.one is twin.other
    assert twin.one is not module.one


def test_another_dtype_is_another_face_of_the_same_numbers() -> None:
    weight = made("int8", torch.float32)
    assert_same_parts(weight.bfloat16().float(), weight)
    assert weight.to("meta").is_meta


def test_an_alias_shares_memory_and_version() -> None:
    weight = made()
    alias = weight.detach()
    alias.copy_(torch.ones(16, 8))
    assert torch.equal(weight.dense(), torch.ones(16, 8, dtype=torch.bfloat16))
    assert weight._version == 1
    assert not weight.lost_writes()


@each_kind
def test_copy_packs_dense_values_and_takes_the_parts_of_its_kind(kind: str) -> None:
    weight, source = made(kind), torch.randn(16, 8)
    weight.detach().copy_(source)
    numbers, scales = pack(source, kind)
    assert torch.equal(weight.numbers.view(torch.uint8), numbers.view(torch.uint8))
    assert torch.equal(weight.scales, scales)
    other = QuantisedWeight(torch.ones(16, 8).to(DTYPES[kind]), torch.full((16, 1), 0.5), torch.float32)
    weight.detach().copy_(other)
    assert_same_parts(weight, other)
    weight.detach().copy_(torch.tensor(2.0))
    assert torch.equal(weight.dense(), torch.full((16, 8), 2.0, dtype=torch.bfloat16))


def test_a_plain_tensor_takes_its_values() -> None:
    weight = made()
    plain = torch.empty(16, 8, dtype=torch.bfloat16)
    plain.copy_(weight)
    assert type(plain) is Tensor
    assert torch.equal(plain, weight.dense())


def _by_out(weight: Tensor) -> None:
    torch.add(weight, 1, out=weight)


def _by_index(weight: Tensor) -> None:
    weight[0] = 1.0


def _by_data(weight: Tensor) -> None:
    weight.data = torch.zeros(3, 3)


WRITES: list[Callable[[Tensor], object]] = [
    lambda w: w.mul_(2), lambda w: w.zero_(), lambda w: w.data.fill_(1), lambda w: nn.init.normal_(w),
    lambda w: torch._foreach_mul_([w], 2.0), _by_out, _by_index, _by_data,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_it_cannot_keep_is_refused_and_names_the_way_out(write: Callable[[Tensor], object]) -> None:
    weight = made()
    before = weight.dense()
    with torch.no_grad(), pytest.raises(LosiaError, match="keep_dense=True"):
        write(weight)
    assert torch.equal(weight.dense(), before)
    assert not weight.lost_writes()


def test_a_write_to_what_would_be_a_view_is_told_of_once() -> None:
    weight = made()
    before = weight.dense()
    weight.detach()[0].zero_()
    assert torch.equal(weight.dense(), before)
    assert weight.lost_writes()
    assert not weight.lost_writes()


@each_kind
def test_a_block_is_written_held_and_counted(kind: str) -> None:
    weight, values = made(kind), torch.linspace(-0.5, 0.5, 6).view(2, 3)
    rows, cols = torch.tensor([3, 9]), torch.tensor([0, 2, 5])
    expected = weight.held(values, rows)
    weight.write(rows, cols, values)
    assert torch.equal(weight.block(rows, cols), expected)
    assert torch.equal(weight[rows][:, cols], expected.bfloat16())
    assert weight._version == 1
    assert not weight.lost_writes()


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_that_its_scale_can_say_keeps_that_and_others_are_packed(kind: str, dtype: torch.dtype) -> None:
    weight = made(kind, dtype)
    for size in (9.0, 0.1):  # the scale of row 3 is larger than its values ask for
        weight.write(torch.tensor([3]), torch.arange(8), torch.full((1, 8), size))
    before = [part.clone() for part in parts(weight)]
    values = weight.dense()
    weight.copy_(values)
    assert_same_parts(weight, QuantisedWeight(before[0].view(DTYPES[kind]), before[1], dtype))
    assert not torch.equal(weight.scales, pack(values, kind)[1])
    weight.write(torch.tensor([3, 7]), torch.tensor([2]), torch.zeros(2, 1))  # since then
    values[5] += 1
    weight.copy_(values)
    expected = pack(values, kind)
    others = torch.arange(16) != 5
    assert torch.equal(weight.scales[others], before[1][others])
    assert torch.equal(parts(weight)[0][others], before[0][others])
    assert torch.equal(weight.scales[5], expected[1][5])
    assert torch.equal(parts(weight)[0][5], expected[0][5].view(torch.uint8))


def test_its_values_leave_torch_as_those_of_the_dense_weight_do() -> None:
    weight = made(dtype=torch.float32)
    assert weight.tolist() == weight.dense().tolist()
    assert (weight.detach().numpy() == weight.dense().numpy()).all()
    assert (np.asarray(weight.detach()) == weight.dense().numpy()).all()


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_bring_back_the_numbers_that_were_loaded(kind: str, dtype: torch.dtype) -> None:
    """A checkpoint holds dense values: packed by themselves they would say other numbers."""
    rows, cols = torch.tensor([3, 9]), torch.tensor([0, 2, 5])
    trained = made(kind, dtype)
    for size in (9.0, 0.1):  # a row outgrows its scale, and is small again
        trained.write(rows, cols, torch.full((2, 3), size))
    values = trained.block(rows, cols)
    other = QuantisedWeight.of(torch.randn(16, 8).to(dtype), kind)
    other.copy_(trained.dense())
    assert not torch.equal(other.scales, trained.scales)
    assert not other.give_scales(trained.scales.view(-1), rows, cols, values + 1)
    assert other.give_scales(trained.scales.view(-1), rows, cols, values)
    assert_same_parts(other, trained)
    assert not other.lost_writes()


def test_what_was_loaded_is_kept_no_longer_than_need_be() -> None:
    weight, loaded = made(), torch.randn(16, 8)
    kept = weakref.ref(loaded)
    weight.detach().copy_(loaded)
    del loaded
    gc.collect()
    assert kept() is not None
    weight.forget_source()
    gc.collect()
    assert kept() is None


def test_what_was_loaded_and_written_since_is_not_taken() -> None:
    rows, cols = torch.tensor([3]), torch.tensor([0])
    weight, loaded = made(dtype=torch.float32), torch.randn(16, 8)
    weight.detach().copy_(loaded)
    values, before = weight.block(rows, cols), [part.clone() for part in parts(weight)]
    loaded.zero_()
    assert weight.give_scales(weight.scales.view(-1).clone(), rows, cols, values)
    for one, other in zip(parts(weight), before, strict=True):
        assert torch.equal(one, other)


def test_it_goes_into_a_compiled_graph() -> None:
    """Dynamo fakes it by its parts; what a graph of another's does is of the values."""
    linear = nn.Linear(8, 16, bias=False)
    linear.weight = made("int8", torch.float32)  # type: ignore[assignment]
    x = torch.randn(3, 8)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(linear, backend=backend, fullgraph=True)(x), linear(x))


def test_it_says_what_it_is() -> None:
    assert repr(made("float8")) == "QuantisedWeight((16, 8), torch.bfloat16 of float8, device='cpu')"


def test_it_has_a_place_of_its_own() -> None:
    one, other = made(), made()
    assert one.data_ptr() == one.numbers.data_ptr() != other.data_ptr()


def test_memory_may_be_shared() -> None:
    weight = made()
    assert not weight.is_shared()
    assert weight.share_memory_() is weight
    assert weight.is_shared()


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        weight = made()
        assert torch.equal(weight + 0, weight.dense())
        weight.copy_(torch.ones(16, 8))
        weight.write(torch.tensor([0]), torch.tensor([0]), torch.tensor([[0.5]]))
        assert not weight.lost_writes()
        weight = weight.clone()
    assert float(weight.dense()[0, 0]) == pytest.approx(0.5, rel=0.01)
