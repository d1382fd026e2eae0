"""Weights that were cut up over processes, before a transformation or after it: what cannot be followed is refused by
name, and nothing learns."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import losia_fx
from losia_fx import DeltaError, LosiaError, OptimizerError, StateError, TransformError
from tests.support.toys import Toy, batch, loss_of
from tests.support.twin import STILL, snapshot
from tests.truth.test_refused import trained, transformed

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*reduction"),
    pytest.mark.filterwarnings("error::losia_fx.LosiaWarning"),
]

Spread = Callable[[Any], None]


def sharded(*names: str, **options: Any) -> Spread:
    def shard(model: nn.Module) -> None:
        for name in names:
            fully_shard(model.get_submodule(name), mesh=init_device_mesh("cpu", (1,)), **options)

    return shard


WHOLE = sharded("layers.0", "layers.1", "")
WHOLE_ALONE = sharded("")


def distributed(*placements: Any) -> Spread:
    def distribute(model: nn.Module) -> None:
        linear: Any = model.get_submodule("layers.1.mlp.up")
        pieces = distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (1,)), placements)
        linear.weight = nn.Parameter(pieces, requires_grad=False)

    return distribute


def parallel(model: Any) -> None:
    plan = {"head": ColwiseParallel(), "layers.*.mix": ColwiseParallel()}
    plan |= {"layers.*.mlp.up": ColwiseParallel(), "layers.*.mlp.down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (1,)), plan)


def parallel_and_sharded(model: Any) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    plan = {"head": ColwiseParallel(), "layers.*.mix": ColwiseParallel()}
    plan |= {"layers.*.mlp.up": ColwiseParallel(), "layers.*.mlp.down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])


def by_columns(parameter: nn.Parameter) -> Shard:
    return Shard(parameter.dim() - 1)


def on_two_meshes(model: Any) -> None:
    fully_shard(model.layers[0], mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard")))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


PIECES: dict[str, tuple[Spread, str]] = {
    "one block": (sharded("layers.1"), "layers.0.mix.weight, "),
    "all but the head": (sharded("layers.0", "layers.1"), "head.weight: whole on every rank"),
    "one DTensor": (distributed(Shard(0)), "layers.0.mix.weight, "),
    "one that is whole": (distributed(Replicate()), "layers.0.mix.weight, "),
    "tensor parallel": (parallel, "3 more: sharded over processes, but not by fully_shard"),
    "tensor parallel under fully_shard": (parallel_and_sharded, "3 more: sharded in more than one dimension"),
    "by columns": (sharded("", shard_placement_fn=by_columns), "layers.0.mix.weight, "),
    "on two meshes": (on_two_meshes, "head.weight: sharded over another device mesh than layers.0.mix.weight"),
}


def local(model: nn.Module) -> dict[str, Any]:
    return {name: getattr(value, "to_local", lambda v=value: v)().clone() for name, value in snapshot(model).items()}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("way", PIECES)
def test_weights_in_pieces_that_cannot_be_followed(way: str, steps: int) -> None:
    """Nothing learns, the head included: which is said at the forward, and at the step if it had come so far."""
    spread, name = PIECES[way]
    model = transformed()
    for _ in range(steps):
        trained(model)
    spread(model)
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = local(model)
    for use in (lambda: loss_of(model, batch()), lambda: losia_fx.state_dict(model), lambda: losia_fx.subnets(model)):
        with pytest.raises(StateError) as caught:
            use()
        assert name in str(caught.value)
        assert "fully_shard" in str(caught.value)
        assert "DistributedDataParallel" in str(caught.value)
    for subnet in list(model.parameters()):
        subnet.grad = torch.ones_like(subnet) if subnet.requires_grad else None
    with pytest.raises(StateError, match="fully_shard"):
        optimizer.step()
    assert losia_fx.controller(model).step == steps
    for key, value in local(model).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    "way", ["one block", "all but the head", "one DTensor", "one that is whole", "tensor parallel"]
)
def test_weights_in_pieces_before_transform(way: str) -> None:
    spread, _ = PIECES[way]
    model = Toy(layers=2)
    spread(model)
    asked = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    with pytest.raises(TransformError) as caught:
        losia_fx.transform(model, **STILL)
    assert "transform the whole model first, and then shard it with fully_shard" in str(caught.value)
    assert asked == {key: parameter.requires_grad for key, parameter in model.named_parameters()}


def step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    loss_of(model, batch()).backward()
    optimizer.step()
    optimizer.zero_grad()


def in_pieces(**options: Any) -> nn.Module:
    model = losia_fx.transform(Toy(), **{**STILL, **options})
    WHOLE(model)
    return model


def test_the_road_that_the_messages_name_works() -> None:
    model = in_pieces()
    before = local(model)
    step(model, optim.SGD(model.parameters(), lr=0.1))
    assert losia_fx.controller(model).step == 1
    moved = {name for name, value in local(model).items() if not torch.equal(before[name], value)}
    assert losia_fx.subnets(model).keys() <= moved


def test_unsharded_before_it_was_ever_used() -> None:
    """In part, as an evaluation leaves it, or everywhere: followed as shards all the same."""
    outcomes = []
    for unsharded in ([], [""], ["layers.0", "layers.1", ""]):
        torch.manual_seed(0)
        model: Any = in_pieces()
        optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for name in unsharded:
            model.get_submodule(name).unshard()
        step(model, optimizer)
        assert losia_fx.controller(model).sharded
        outcomes.append(local(model))
    for outcome in outcomes[1:]:
        assert all(torch.equal(value, outcomes[0][key]) for key, value in outcome.items())


@pytest.mark.parametrize("blocks", [(), ("layers.0", "layers.1")])
def test_an_optimizer_made_while_the_root_was_unsharded(blocks: tuple[str, ...]) -> None:
    """An evaluation leaves it so: what such an optimizer holds of it nobody uses any more."""
    model: Any = transformed()
    sharded(*blocks, "")(model)
    with torch.no_grad():
        model(batch())
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {key: value.clone() for key, value in local(model).items()}
    with pytest.raises(OptimizerError, match=r"weight.*made while fully_shard had these unsharded"):
        step(model, optimizer)
    model.reshard()
    for key, value in local(model).items():
        assert torch.equal(value, before[key]), key
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, optimizer)
    assert not torch.equal(local(model)["head.weight"], before["head.weight"])


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)  # type: ignore[no-any-return]


@pytest.mark.parametrize("blocks", [(), ("layers.0", "layers.1")])
def test_sharded_by_a_module_around_the_model(blocks: tuple[str, ...]) -> None:
    """It unshards before the model itself is called, which finds whole weights, whose memory is gone at the step."""
    model = transformed()
    sharded(*blocks)(model)
    around = Around(model)
    WHOLE_ALONE(around)
    optimizer = optim.SGD([p for p in around.parameters() if p.requires_grad], lr=0.1)
    before = local(around)
    with pytest.raises(StateError, match="fully_shard of a module around the model alone"):
        step(around, optimizer)
    around.reshard()  # type: ignore[operator]
    for key, value in local(around).items():
        assert torch.equal(value, before[key]), key


def test_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losia_fx.runtime.expected.share_of_dense", lambda *_: 0.5)  # whatever this machine has
    model = in_pieces(frozen_products="int8")
    with pytest.raises(StateError, match="frozen_products='int8' and a model that fully_shard has sharded"):
        loss_of(model, batch())


def test_a_base_from_before() -> None:
    model = losia_fx.transform(Toy(), **STILL, track_delta=True)
    step(model, optim.SGD(model.parameters(), lr=0.1))
    WHOLE(model)
    with pytest.raises(StateError, match="track_delta=True: the model was trained before fully_shard"):
        loss_of(model, batch())


def test_a_state_that_is_sharded_otherwise() -> None:
    """Of one mesh into a model on another, or into one that is whole: by name, and nothing is loaded."""
    state = losia_fx.state_dict(in_pieces(), sharded=True)
    named = state["head.weight:values"]
    other = DTensor.from_local(named.to_local(), init_device_mesh("cpu", (1,)), [Replicate()])
    for model, given in ((in_pieces(), {**state, "head.weight:values": other}), (transformed(), state)):
        before = losia_fx.state_dict(model)
        with pytest.raises(StateError, match=r"weight:values is sharded in another way than the model"):
            losia_fx.load_state_dict(model, given)
        after = losia_fx.state_dict(model)
        assert all(torch.equal(after[key], value) for key, value in before.items() if isinstance(value, Tensor))


def test_parameters_in_full_that_are_whole_on_every_rank() -> None:
    model: Any = losia_fx.transform(Toy(), trainable=("norm",), **STILL)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params={model.norm.weight, model.norm.bias})
    with pytest.raises(StateError, match=r"norm\.weight, norm\.bias: trains in full and is whole on every rank"):
        loss_of(model, batch())


def test_an_optimizer_from_before() -> None:
    model = transformed()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    WHOLE(model)
    with pytest.raises(StateError, match="SGD was made before fully_shard"):
        loss_of(model, batch())
    assert optimizer.state == {}


def test_what_takes_whole_weights(tmp_path: Any) -> None:
    model = in_pieces()
    step(model, optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TransformError, match="Toy is sharded: fully_shard keeps the subnets"):
        losia_fx.restore(model)
    with pytest.raises(LosiaError, match=r"head\.weight: no process has the whole weight"):
        losia_fx.dense(model, "head.weight")
    with pytest.raises(DeltaError, match="is not kept"):
        losia_fx.save_delta(model, tmp_path / "delta")
    with pytest.raises(StateError, match="cannot be copied or pickled"):
        pickle.dumps(next(iter(losia_fx.controller(model).states)))
    step(model, optim.SGD(model.parameters(), lr=0.1))
    assert losia_fx.controller(model).step == 2


def test_both_written() -> None:
    """By their parameters: W alone, S alone, and both, of which nobody can tell which is meant."""
    model = in_pieces()
    step(model, optim.SGD(model.parameters(), lr=0.1))
    subnet = losia_fx.subnets(model)["head.weight"]
    weight, values = (tensor.to_local() for tensor in (subnet.weight, subnet.values))  # type: ignore[attr-defined]
    with torch.no_grad():
        subnet.weight.mul_(2)
    loss_of(model, batch())
    assert torch.equal(values, weight[subnet.rows])
    with torch.no_grad():
        subnet.values.add_(1)
    loss_of(model, batch())
    assert torch.equal(values, weight[subnet.rows])
    with torch.no_grad():
        subnet.values.add_(1)
        subnet.weight.mul_(2)
    with pytest.raises(StateError, match=r"head\.weight: both the weight and the values of its subnet were written"):
        loss_of(model, batch())
