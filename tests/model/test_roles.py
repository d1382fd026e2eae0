"""Which weights get a subnet: what is left dense, what is refused by name, and a model that nothing has changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import losia_fx
from losia_fx import LosiaWarning, TransformError
from losia_fx.registry import TRAINED
from tests.support.toys import (
    Toy,
    assert_subnet_gradients,
    batch,
    by_string,
    fingerprint,
    loss_of,
    plain_gradients,
    tiny_llama,
)

OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25}


def assert_refused(model: nn.Module, *texts: str, **options: Any) -> None:
    before, controllers = fingerprint(model), len(TRAINED)
    with pytest.raises(TransformError) as caught:
        losia_fx.transform(model, **{**OPTIONS, **options})
    for text in texts:
        assert text in str(caught.value)
    assert fingerprint(model) == before
    assert len(TRAINED) == controllers


# -- weights that are left dense -------------------------------------------------------------------------------------


class Marked(Tensor):
    """As people subclass tensors: every function works on it."""


class Packed(nn.Parameter):
    """As bitsandbytes' are: a Parameter of a kind of its own."""


class Quantised(Tensor):
    """As torchao's are: it says float32 of itself, and holds integers and a scale that a product unpacks."""

    packed: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor) -> Quantised:
        made = Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        made.packed, made.scale = packed, scale
        return made  # type: ignore[no-any-return]

    @classmethod
    def of(cls, weight: Tensor) -> Quantised:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def whole(self) -> Tensor:
        return self.packed * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Quantised:
        return Quantised(inner["packed"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].scale)
        return func(*(arg.whole() if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


KINDS: dict[str, Callable[[Tensor], nn.Parameter]] = {
    "Marked": lambda weight: nn.Parameter(weight.as_subclass(Marked)),
    "Packed": Packed,
    "Quantised": lambda weight: nn.Parameter(Quantised.of(weight), requires_grad=False),
}


def with_kind(kind: str, *layers: int) -> Toy:
    model = Toy(layers=2)
    for layer in layers:
        linear = model.get_submodule(f"layers.{layer}.mlp.up")
        linear.register_parameter("weight", KINDS[kind](linear.weight.detach().clone()))  # type: ignore[operator]
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_plain_tensor_is_left_dense(kind: str) -> None:
    """It stays as it is, and said; its neighbours learn, with the gradients of plain autograd through it."""
    model, ids = with_kind(kind, 0), batch()
    odd = model.get_parameter("layers.0.mlp.up.weight")
    plain = Toy(layers=2)
    values = odd.data.whole() if isinstance(odd.data, Quantised) else odd.detach().as_subclass(Tensor)
    plain.load_state_dict({**model.state_dict(), "layers.0.mlp.up.weight": values.clone()})
    losia_fx.transform(model, **OPTIONS)
    (row,) = [row for row in losia_fx.report(model).weights if row.name == "layers.0.mlp.up.weight"]
    assert (row.trained, row.why) == ("frozen", f"type {kind}: left dense")
    assert model.get_parameter("layers.0.mlp.up.weight") is odd
    assert len(losia_fx.subnets(model)) == 6
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, plain_gradients(plain, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_such_weights_alone_is_refused(kind: str) -> None:
    assert_refused(with_kind(kind, 0, 1), f"type {kind}: left dense", target=("*.up",))


# -- weights that are not here ---------------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Toy()


def offloaded_in_part(folder: str) -> nn.Module:
    places = {"embed": "disk", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "head": "cpu"}
    return accelerate.dispatch_model(Toy(), places, offload_dir=folder, main_device="cpu")  # type: ignore[no-any-return]


ABSENT: dict[str, Callable[[str], nn.Module]] = {
    "meta": lambda folder: on_meta(),
    "cpu_offload": lambda folder: accelerate.cpu_offload(Toy(), torch.device("cpu")),
    "disk_offload": lambda folder: accelerate.disk_offload(Toy(), folder, torch.device("cpu")),
    "some to disk": offloaded_in_part,
}


@pytest.mark.parametrize("way", ABSENT)
def test_weights_without_values_are_refused(way: str, tmp_path: Path) -> None:
    model = ABSENT[way](str(tmp_path))
    first = "layers.1.mix.weight" if way == "some to disk" else "layers.0.mix.weight"
    assert_refused(model, f"{first}, ", "meta device", "from_pretrained", "offload")


def test_a_weight_to_train_in_full_needs_values_too() -> None:
    model = Toy()
    model.norm.to("meta")
    assert_refused(model, "norm.weight, norm.bias: on the meta device", trainable=("norm*",))


def test_what_stays_frozen_may_be_offloaded(tmp_path: Path) -> None:
    """accelerate brings it for its own forward, as ever."""
    places = {"embed": "disk", "layers": "cpu", "norm": "disk", "head": "cpu"}
    plain, ids = Toy(), batch()
    model = accelerate.dispatch_model(copy.deepcopy(plain), places, offload_dir=str(tmp_path), main_device="cpu")
    losia_fx.transform(model, **OPTIONS)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, plain_gradients(plain, ids))


def test_once_there_they_are_transformed() -> None:
    model, plain = on_meta(), Toy()
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    losia_fx.transform(model, **OPTIONS)
    loss_of(model, ids := batch()).backward()
    assert_subnet_gradients(model, plain_gradients(plain, ids))


# -- weights in pieces -----------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module, *names: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh)
    return model


def column_parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (1,)), {"layers.1.mlp.up": ColwiseParallel()})


def flattened(model: nn.Module, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def with_flattened_block(**options: Any) -> nn.Module:
    model = Toy()
    model.layers[0] = flattened(model.layers[0], **options)
    return model


PIECES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fully_shard": (lambda: sharded(Toy(), "layers.0", "layers.1", ""), "layers.0.mix.weight, "),
    "one block": (lambda: sharded(Toy(), "layers.1"), "layers.1.mix.weight, layers.1.mlp.up.weight, "),
    "one linear": (lambda: column_parallel(Toy()), "layers.1.mlp.up.weight: sharded"),
    "fsdp1": (lambda: flattened(Toy()), "_fsdp_wrapped_module._flat_param: flattened"),
    "fsdp1, original": (lambda: flattened(Toy(), use_orig_params=True), "layers.0.mix.weight"),
    "within fsdp1": (lambda: flattened(Toy(), use_orig_params=True).module, "layers.0.mix.weight"),  # type: ignore
    "around fsdp1": (lambda: nn.Sequential(flattened(Toy())), "0._fsdp_wrapped_module._flat_param"),
    "one block of fsdp1": (with_flattened_block, "layers.0._fsdp_wrapped_module._flat_param: flattened"),
    "one block, original": (lambda: with_flattened_block(use_orig_params=True), "layers.0._fsdp_wrapped_module.norm"),
}


@pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*reduction")
@pytest.mark.parametrize("way", PIECES)
def test_weights_in_pieces_are_refused(one_process: None, way: str) -> None:
    make, name = PIECES[way]
    model = make()
    learning = [parameter.requires_grad for parameter in model.parameters()]
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(TransformError) as caught:
        losia_fx.transform(model, **OPTIONS)
    for text in (name, "transform the whole model first", "DistributedDataParallel"):
        assert text in str(caught.value)
    assert learning == [parameter.requires_grad for parameter in model.parameters()]
    assert attributes == {name: sorted(module.__dict__) for name, module in model.named_modules()}


def test_a_sharded_weight_that_is_excluded_stays_frozen(one_process: None) -> None:
    model = losia_fx.transform(column_parallel(Toy()), exclude=("layers.1.mlp.up",), **OPTIONS)
    (row,) = [row for row in losia_fx.report(model).weights if row.name == "layers.1.mlp.up.weight"]
    assert (row.trained, row.why) == ("frozen", "named in exclude: 'layers.1.mlp.up'")
    assert len(losia_fx.subnets(model)) == 6


# -- adapters --------------------------------------------------------------------------------------------------------


def adapted(**options: Any) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["mix", "up"], init_lora_weights=False, **options)
    return peft.get_peft_model(Toy(), config)  # type: ignore[no-any-return,arg-type]


def test_adapters_get_no_subnet_and_their_weights_do() -> None:
    model, ids = adapted(), batch()
    plain = copy.deepcopy(model)
    with pytest.warns(LosiaWarning, match=r"mix\.lora_A\.default\.weight.* and 4 more: adapters of PEFT's") as caught:
        losia_fx.transform(model, **OPTIONS)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    rows = {row.name.removeprefix("base_model.model."): row for row in losia_fx.report(model).weights}
    for name, row in rows.items():
        if "lora" in name:
            assert row.trained == "frozen"
            assert "trainable" in row.why
            assert "merge_and_unload" in row.why
    assert {name for name, row in rows.items() if row.trained == "subnet"} == {
        *(f"layers.{layer}.{part}.base_layer.weight" for layer in (0, 1) for part in ("mix", "mlp.up")),
        *(f"layers.{layer}.mlp.down.weight" for layer in (0, 1)),
        "head.weight",
    }
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, plain_gradients(plain, ids))
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" in name)


def test_adapters_that_are_named_train_beside() -> None:
    model, ids = adapted(), batch()
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LosiaWarning)
        losia_fx.transform(model, trainable=("*lora_*",), **OPTIONS)
    loss_of(model, ids).backward()
    expected = plain_gradients(plain, ids)
    assert_subnet_gradients(model, expected)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


def test_adapters_that_did_not_learn_are_no_surprise() -> None:
    model = adapted().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LosiaWarning)
        losia_fx.transform(model, **OPTIONS)


def test_adapters_named_in_target_still_get_no_subnet() -> None:
    assert_refused(adapted(), "adapter of PEFT's", "merge_and_unload", target=("*.lora_A.default",))


def test_merged_adapters_are_plain_weights() -> None:
    model = adapted().merge_and_unload()  # type: ignore[operator]
    plain, ids = copy.deepcopy(model), batch()
    losia_fx.transform(model, **OPTIONS)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, plain_gradients(plain, ids))
    assert len(losia_fx.subnets(model)) == 7


def test_adapters_learn_in_full_by_string() -> None:
    """Where requires_grad decides: PEFT has left it to the adapters alone."""
    model, ids = adapted(), batch()
    expected = plain_gradients(model, ids)
    loss_of(by_string(model, compiler="eager"), ids).backward()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert parameter.grad is None
            assert "subnet" not in name


@pytest.mark.parametrize("kind", [peft.IA3Config, peft.LoHaConfig, peft.OFTConfig])
def test_other_adapters(kind: Any) -> None:
    options = {"feedforward_modules": []} if kind is peft.IA3Config else {}
    options |= {"oft_block_size": 4} if kind is peft.OFTConfig else {}
    model = peft.get_peft_model(Toy(), kind(target_modules=["mix"], **options))  # type: ignore[arg-type]
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain, ids = copy.deepcopy(model), batch()
    with pytest.warns(LosiaWarning, match="adapters of PEFT's"):
        losia_fx.transform(model, **OPTIONS)
    rows = {row.name: row for row in losia_fx.report(model).weights}
    assert adapters
    assert all("merge_and_unload" in rows[name].why for name in adapters)
    assert len(losia_fx.subnets(model)) == 7
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, plain_gradients(plain, ids), tolerance=1e-4)


def test_prompts_follow_the_ordinary_rule() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = losia_fx.transform(peft.get_peft_model(tiny_llama(), config), **OPTIONS)
    rows = {row.name: row for row in losia_fx.report(model).weights}
    assert rows["prompt_encoder.default.embedding.weight"].why == "no linear weight; name it in trainable to train it"
    assert sum(row.trained == "subnet" for row in rows.values()) == 15


# -- weights of two models -------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A second model, with modules of its own, that shares weights with a first."""

    def __init__(self, first: Toy) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))
        self.layers[0].weight = first.layers[0].mix.weight  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](F.relu(self.layers[0](x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"exclude": ("layers.0",)}, {"trainable": ("layers.0.weight",)}])
def test_a_weight_of_another_transformed_model_is_refused(options: dict[str, Any]) -> None:
    """Whatever is planned for it here: it moves and learns with the other."""
    first = losia_fx.transform(Toy(), **OPTIONS)
    second = Reader(first)  # type: ignore[arg-type]
    assert_refused(second, "layers.0.weight: shared with another model that is transformed already", **options)
    plain = Toy()
    plain.load_state_dict(first.state_dict())
    loss_of(first, ids := batch()).backward()
    assert_subnet_gradients(first, plain_gradients(plain, ids))
    losia_fx.restore(first)
    assert len(losia_fx.subnets(losia_fx.transform(second, **OPTIONS))) == 2
