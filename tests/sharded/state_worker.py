"""Sharded models saved and resumed, and what they send: run as worker.py is."""

from __future__ import annotations

import gc
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import losia_fx
from losia_fx.checkpoint.state import load_state, save_state
from losia_fx.method.selection import select_experts, select_rows, select_subnet
from losia_fx.method.shards import Portion, select_own_experts, select_portion
from losia_fx.runtime.living import living
from tests.sharded.worker import Scenario, batches, main, model_of, of, outcome, shard, whole
from tests.support.toys import loss_of


class Traffic(TorchDispatchMode):
    """Bytes that this rank gives to collectives, by the collective's name. Nothing is compiled meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.partition(".")[0]
            if name in ("wait_tensor", "_wrap_tensor_autograd"):
                return func(*args, **(kwargs or {}))
            given = args[1] if name in ("_allgather_base_", "_reduce_scatter_base_") else args[0]
            tensors = given if isinstance(given, (list, tuple)) else [given]
            self.sent[name] = self.sent.get(name, 0) + sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


SCENARIO = Scenario(clip=0.3, dtype=torch.float64)
STATES = {
    "mixed": Scenario(),
    "visits": Scenario(options=of(importance="visits", carry_moments=True)),
    "replicas": Scenario(replicas=2),
    "own": Scenario(
        options=of(schedule="all", importance="random", period=1, head_rows="mixed", head_period=5, profile_steps=3)
    ),
}
"""What is saved and resumed."""
CUT = 8
"""Steps before the checkpoint: two slots and, of period 3, two steps of the third."""
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
EVERYWHERE = StateDictOptions(full_state_dict=True)


def adamw(model: nn.Module) -> optim.Optimizer:
    return optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def go_on(model: Any, optimizer: optim.Optimizer, steps: list[list[Tensor]], rank: int, ranks: int) -> None:
    for (ids,) in steps:
        loss_of(model, ids.chunk(ranks)[rank]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()


def sharded(scenario: Scenario, seed: int = 0) -> nn.Module:
    model = model_of(scenario, "eager", seed)
    if dist.get_world_size() > 1:
        shard(model, scenario)
    return model


def trained_and_saved(name: str) -> dict[str, Any]:
    """Cut within a slot, written by one rank and by each its own part, and gone on with."""
    scenario, folder = STATES[name], folder_of(name)
    model = sharded(scenario)
    optimizer, steps = adamw(model), batches(scenario)
    go_on(model, optimizer, steps[:CUT], dist.get_rank(), dist.get_world_size())
    save_state(model, folder / "losia", dist.get_rank() == 0)
    weights, moments = (
        get_model_state_dict(model, options=WHOLE),
        get_optimizer_state_dict(model, optimizer, options=WHOLE),
    )
    if dist.get_rank() == 0:
        torch.save((weights, moments), folder / "rest.pt")
    save_in_parts(model, optimizer, folder / PARTS)
    go_on(model, optimizer, steps[CUT:], dist.get_rank(), dist.get_world_size())
    return outcome(model)


def in_parts(model: nn.Module, optimizer: optim.Optimizer, losia: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of which each rank has its own part."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "run": {"losia": losia},
    }


def save_in_parts(model: nn.Module, optimizer: optim.Optimizer, folder: str | Path) -> None:
    dcp.save(in_parts(model, optimizer, losia_fx.state_dict(model, sharded=True)), checkpoint_id=folder)


def resumed_in_parts(name: str) -> dict[str, Any]:
    scenario, folder = STATES[name], folder_of(name) / PARTS
    model = sharded(scenario, seed=1)
    optimizer = adamw(model)
    state = in_parts(model, optimizer, losia_fx.state_dict(model, like=dcp.FileSystemReader(folder).read_metadata()))
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    losia_fx.load_state_dict(model, state["run"]["losia"])
    go_on(model, optimizer, batches(scenario)[CUT:], dist.get_rank(), dist.get_world_size())
    return outcome(model)


PARTS = "parts"


def resumed(name: str, first: str) -> dict[str, Any]:
    """Into a model of another seed, on as many ranks as there are. first: what is loaded before the rest."""
    if first == PARTS:
        return resumed_in_parts(name)
    scenario, folder = STATES[name], folder_of(name)
    model = sharded(scenario, seed=1)
    optimizer = adamw(model)
    weights, moments = torch.load(folder / "rest.pt", weights_only=True)
    if first == "losia":
        load_state(model, folder / "losia")
    set_model_state_dict(model, weights, options=WHOLE)
    set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
    if first != "losia":
        load_state(model, folder / "losia")
    go_on(model, optimizer, batches(scenario)[CUT:], dist.get_rank(), dist.get_world_size())
    return outcome(model)


def delta(kind: str) -> dict[str, Any]:
    """What training changed, saved and loaded by all ranks; every step moves every element by the same, so that one
    process comes to the very same bits. Own checkpoints keep the base, other weights are one of their own."""
    folder = folder_of(f"delta of {dist.get_world_size()}")
    scenario = Scenario(**{"model": "uneven", "dtype": torch.float32, **DELTAS[kind]})
    model, steps = sharded(scenario), batches(scenario)
    found = {"base": weights_of(model)}
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2**-6)
    march(model, optimizer, steps[:4])
    own = weights_of(model)
    march(model, optimizer, steps[4:8])
    set_model_state_dict(model, own, options=EVERYWHERE)
    march(model, optimizer, steps[8:13])
    losia_fx.save_delta(model, folder / kind)
    found["tuned"] = weights_of(model)
    losia_fx.load_delta(model, folder / kind, undo=True)
    found["undone"] = weights_of(model)
    losia_fx.load_delta(model, folder / kind)
    found["values"] = {name: whole(subnet.values) for name, subnet in losia_fx.subnets(model).items()}
    found["again"] = weights_of(model)
    set_model_state_dict(model, {key: value + 1 for key, value in own.items()}, options=EVERYWHERE)
    march(model, optimizer, steps[13:14])
    losia_fx.save_delta(model, folder / f"{kind}, another base")
    found["refused"] = [
        refusal(model, folder / (others if dist.get_rank() else f"{kind}, another base"))
        for others in ("no such file", kind)
    ]
    return found


def refusal(model: nn.Module, path: Path) -> str:
    """Of a delta that the first rank could undo."""
    before = weights_of(model)
    try:
        losia_fx.load_delta(model, path, undo=True)
    except losia_fx.DeltaError as error:
        assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
        return str(error)
    return ""


DELTAS: dict[str, dict[str, Any]] = {
    "by visits": {"options": of(importance="random", rewarm=False, track_delta=True, trainable=("norm",))},
    "experts": {"model": "three experts", "options": of(importance="random", rewarm=False, track_delta=True)},
    "everywhere": {
        "options": of(importance="random", rewarm=False, track_delta=True, schedule="all", head_rows="random")
    },
}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole, on every rank; copies."""
    found = get_model_state_dict(model, options=EVERYWHERE)
    return {name: weight.clone() for name, weight in found.items()}


def march(model: Any, optimizer: optim.Optimizer, steps: list[list[Tensor]]) -> None:
    for (ids,) in steps:
        loss_of(model, ids.chunk(dist.get_world_size())[dist.get_rank()]).backward()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def folder_of(name: str) -> Path:
    folder = Path(sys.argv[1]).parent / name
    folder.mkdir(exist_ok=True)
    return folder


def traffic() -> dict[str, Any]:
    """A step of a model whose sizes eight divides: nothing profiled, all of it, and at the end of the slot."""
    found = {}
    for name, options in {"plain": of(schedule="static"), "profiled": of(schedule="all")}.items():
        scenario = Scenario(
            model="eighths", dtype=torch.float32, options=(*options, *of(rank_factor=1 / 8, output_rank_factor=0.0))
        )
        torch._dynamo.reset()  # what it met in such a mode it would not compile again
        model = sharded(scenario)
        optimizer, steps = adamw(model), batches(scenario)
        go_on(model, optimizer, steps[:4], dist.get_rank(), dist.get_world_size())  # past the first looks
        with Traffic() as sent, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*ran outside a rewritten graph")
            go_on(model, optimizer, steps[4:5], dist.get_rank(), dist.get_world_size())
        found[name] = dict(sent.sent)
        if name == "profiled":
            with Traffic() as sent, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*ran outside a rewritten graph")
                go_on(model, optimizer, steps[5:6], dist.get_rank(), dist.get_world_size())
            found["moved"] = dict(sent.sent)
        found["linears"] = sum(s.weight.numel() for s in losia_fx.subnets(model).values())
    return found


def memory() -> dict[str, Any]:
    """Bytes that live between two steps because of a model in training, while all of it is profiled."""
    scenario = Scenario(model="large", dtype=torch.float32, options=of(schedule="all", period=50), steps=3)
    before = {storage for storage, _ in living_storages()}
    model = sharded(scenario)
    optimizer = adamw(model)
    go_on(model, optimizer, batches(scenario), dist.get_rank(), dist.get_world_size())
    gc.collect()
    return {"bytes": sum(size for storage, size in living_storages() if storage not in before)}


def living_storages() -> set[tuple[int, int]]:
    """Of every tensor that Python knows, and of what DTensors hold: place and bytes."""
    held = [part for tensor in living(DTensor) if isinstance(part := tensor._local_tensor, Tensor)]
    plain = [tensor for tensor in [*living(Tensor), *held] if type(tensor) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in plain if not tensor.is_meta]
    return {(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()}


def selections() -> dict[str, Any]:
    """Of matrices and of experts, with ties and uneven portions, beside those of one process; how many agree."""
    group = dist.group.WORLD
    assert group is not None
    generator, agree = torch.Generator().manual_seed(0), 0
    for number in range(TRIED):
        rows, cols, experts = torch.randint(3, 12, (3,), generator=generator).tolist()
        score = torch.rand(experts, rows, cols, generator=generator)
        if number % 2:
            score = (score * 4).floor()  # ties, and lines of nothing
        size = (max(1, rows // 3), max(1, cols // 2))
        portion = Portion.of(rows, group)
        mine = score[0][portion.inside]
        found = [select_portion(mine, portion, size, False), select_portion(mine, portion, size, True)]
        alone = [select_subnet(score[0], *size), select_rows(score[0], size[0])]
        old = tuple(torch.arange(n).expand(experts, n).contiguous() for n in size)
        portion = Portion.of(experts, group)
        found.append(select_own_experts(score[portion.inside], portion, old))  # type: ignore[arg-type]
        alone.append(select_experts(score, old))  # type: ignore[arg-type]
        agree += all(
            torch.equal(a.rows, b.rows) and torch.equal(a.cols, b.cols) and torch.isclose(a.captured, b.captured)
            for a, b in zip(found, alone, strict=True)
        )
    return {"agree": agree}


TRIED = 40


def run(name: str) -> dict[str, Any]:
    kind, _, rest = name.partition(" ")
    if kind == "saved":
        return trained_and_saved(rest)
    if kind == "resumed":
        return resumed(*rest.split())
    if kind == "delta":
        return delta(rest)
    return {"traffic": traffic, "memory": memory, "selections": selections}[kind]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:], run))
