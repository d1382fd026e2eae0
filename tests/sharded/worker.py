"""Some processes that train sharded models together over gloo, scenario after scenario, each beside one process alone.

    python worker.py RESULTS RANKS SCENARIO...

Each rank writes RESULTS.<rank>; a scenario that fails leaves its traceback there.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import losia_fx
from losia_fx._compat import graph_counts
from tests.sharded.models import MODELS
from tests.support.pair import OPTIONS
from tests.support.reference import MakeOptimizer, Reference
from tests.support.toys import batch, loss_of


@dataclass(frozen=True)
class Scenario:
    """How a model is made, sharded and trained; the first group of fields decides what one process comes to as well."""

    model: str = "toy"
    dtype: torch.dtype = torch.float64
    options: tuple[tuple[str, Any], ...] = ()
    optimizer: str = "adamw"
    clip: float | None = None
    clip_value: float | None = None
    parts: int = 1
    """Micro-batches a step."""
    halves: bool = False
    """One process takes the ranks' parts of a batch one after the other, as narrow dtypes round each."""
    zeroed: bool = False
    """Gradients are zeroed, and kept."""
    steps: int = 19
    """Of period 3 over 3 groups: two rounds, and a slot that ends within."""

    last: int = 8
    """Samples in the last batch of an epoch of three."""

    root_only: bool = False
    reshard: bool | None = None
    sync_last: bool = False
    """Gradients are reduced with the last micro-batch alone."""
    replicas: int = 1
    compiler: str = "eager"
    kept_after_backward: bool = False
    outer: bool = False
    """Called through a torch.compile of the user's own."""
    evaluated: bool = False
    """An evaluation between the backward and the step, after which the root's parameters stay unsharded."""


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda model: optim.AdamW(learning(model), lr=5e-3),
    "amsgrad": lambda model: optim.AdamW(learning(model), lr=5e-3, amsgrad=True),
    "adagrad": lambda model: optim.Adagrad(learning(model), lr=0.05),
    "sgd": lambda model: optim.SGD(learning(model), lr=0.1, momentum=0.9),
    "by hand": lambda model: ByHand(learning(model)),
    "rms": lambda model: losia_fx.optim.SubnetRMS(model, lr=5e-3, weight_decay=0.1),
    "rms, momentum": lambda model: losia_fx.optim.SubnetRMS(model, lr=5e-3, momentum=0.9),
}


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class ByHand:
    """Steps that no optimizer of torch's makes."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def of(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


ROAMING = of(schedule="all", importance="random", period=1, head_rows="mixed", head_period=4, profile_steps=2)

CORE: dict[str, Scenario] = {
    "by block": Scenario(),
    "root only": Scenario(root_only=True, compiler="aot_eager"),
    "uneven shards": Scenario(model="uneven", clip=0.3),
    "clipped, float32": Scenario(clip=0.3, dtype=torch.float32),
    "two micro-batches, reduced once": Scenario(parts=2, sync_last=True),
    "checkpointed": Scenario(model="checkpointed", compiler="aot_eager"),
    "norms in full, clipped": Scenario(options=of(trainable=("norm",)), clip=0.3),
    "tied head": Scenario(model="tied", options=of(train_tied_head=True)),
    "experts": Scenario(model="experts"),
    "visits": Scenario(options=of(importance="visits"), steps=13),
}
SLOW: dict[str, Scenario] = {
    "by block, aot_eager": Scenario(compiler="aot_eager"),
    "not resharded after the forward": Scenario(reshard=False),
    "sync": Scenario(options=of(schedule="sync"), steps=13),
    "three layers": Scenario(model="three layers", compiler="aot_eager"),
    "resharded, root too": Scenario(reshard=True),
    "clipped": Scenario(clip=0.3),
    "gradients zeroed in place": Scenario(zeroed=True),
    "two micro-batches": Scenario(parts=2),
    "evaluated before the step": Scenario(evaluated=True),
    "three experts, aot_eager": Scenario(model="three experts", compiler="aot_eager", clip=0.3),
    "SubnetRMS": Scenario(optimizer="rms", model="uneven", clip=0.3, options=of(trainable=("norm",))),
    "SubnetRMS, experts, momentum": Scenario(optimizer="rms, momentum", model="three experts"),
    "moments carried": Scenario(options=of(carry_moments=True), model="uneven", optimizer="amsgrad"),
    "moments carried, experts": Scenario(options=of(carry_moments=True), model="three experts"),
    "experts, visits": Scenario(model="three experts", options=of(importance="visits")),
    "all at once": Scenario(options=of(schedule="all")),
    "a weight that one rank has no use for": Scenario(model="skipping", halves=True),
    "not resharded after the backward": Scenario(kept_after_backward=True, compiler="aot_eager"),
    "clipped by value": Scenario(clip_value=0.01),
    "Adagrad": Scenario(optimizer="adagrad"),
    "SGD with momentum": Scenario(optimizer="sgd", clip=0.3),
    "steps by hand": Scenario(optimizer="by hand"),
    "llama, frequent labels": Scenario(model="llama", options=of(head_rows="frequent", count_steps=3)),
    "static": Scenario(options=of(schedule="static"), steps=4),
    "profiled in part": Scenario(options=of(profile_steps=2)),
    "not rewarmed": Scenario(options=of(rewarm=False)),
    "first": Scenario(options=of(importance="first")),
    "second": Scenario(options=of(importance="second")),
    "gradient": Scenario(options=of(importance="gradient")),
    "sample": Scenario(options=of(importance="sample")),
    "random": Scenario(options=of(importance="random")),
    "fixed head": Scenario(options=of(head_rows="fixed")),
    "roaming": Scenario(options=of(schedule="all", importance="random", period=1, head_rows="random"), steps=6),
    "roaming, head by importance": Scenario(options=ROAMING, steps=10, optimizer="rms", model="uneven", clip=0.3),
    "roaming, tied head": Scenario(
        options=(*ROAMING, *of(train_tied_head=True)), steps=10, optimizer="rms", model="tied", parts=2, sync_last=True
    ),
    "head by importance beside sums": Scenario(
        options=of(schedule="all", importance="visits", head_rows="second", head_period=4), steps=10, model="uneven"
    ),
    "checkpointed, reentrant": Scenario(model="reentrant", options=of(trainable=("embed",))),
    "checkpointed, reentrant, aot_eager": Scenario(
        model="reentrant", options=of(trainable=("embed",)), compiler="aot_eager", clip=0.3
    ),
    "checkpointed in part": Scenario(model="selective", compiler="aot_eager"),
    "checkpoint_wrapper": Scenario(model="checkpoint_wrapper", compiler="aot_eager"),
    "llama, checkpointed, reentrant": Scenario(model="reentrant llama", compiler="aot_eager"),
    "weights used by hand": Scenario(model="weights by hand"),
    "weights used by hand, aot_eager": Scenario(model="weights by hand", compiler="aot_eager"),
    "an uneven last batch": Scenario(last=5, halves=True),
    "within torch.compile": Scenario(outer=True, compiler="aot_eager"),
    "inductor": Scenario(compiler="inductor", dtype=torch.float32),
    "root only, inductor": Scenario(root_only=True, compiler="inductor", dtype=torch.float32),
    "bfloat16": Scenario(dtype=torch.bfloat16, halves=True),
    "llama": Scenario(model="llama", compiler="aot_eager"),
    "llama, inductor": Scenario(model="llama", compiler="inductor", dtype=torch.float32, clip=0.3),
}
FOUR: dict[str, Scenario] = {
    "four ranks": Scenario(clip=0.3),
    "four ranks, uneven": Scenario(model="uneven", compiler="aot_eager"),
    "four ranks, experts": Scenario(model="three experts"),
    "four ranks, two rows": Scenario(options=of(rank_factor=1 / 8, output_rank_factor=1 / 20)),
    "two replicas of two shards": Scenario(replicas=2, clip=0.3),
    "two replicas, two micro-batches, reduced once": Scenario(replicas=2, parts=2, sync_last=True),
    "four ranks, visits": Scenario(options=of(importance="visits")),
}
SCENARIOS = CORE | SLOW | FOUR


def model_of(scenario: Scenario, compiler: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[scenario.model]().to(scenario.dtype)
    return losia_fx.transform(model, **{**OPTIONS, "compiler": compiler, **dict(scenario.options)})


def shard(model: nn.Module, scenario: Scenario) -> None:
    options: dict[str, Any] = {"reshard_after_forward": scenario.reshard}
    if scenario.replicas > 1:
        shape = (scenario.replicas, dist.get_world_size() // scenario.replicas)
        options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))
    for block in () if scenario.root_only else getattr(model, "model", model).layers:  # type: ignore[union-attr]
        fully_shard(block, **options)
    fully_shard(model, **options)
    if scenario.kept_after_backward:
        model.set_reshard_after_backward(False)  # type: ignore[operator]
    if scenario.model == "skipping":
        model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def batches(scenario: Scenario) -> list[list[Tensor]]:
    torch.manual_seed(7)
    sizes = [scenario.last if step % 3 == 2 else 8 for step in range(scenario.steps)]
    steps = [[batch(size) for _ in range(scenario.parts)] for size in sizes]
    if scenario.halves:
        return [[half for ids in micro for half in ids.chunk(2)] for micro in steps]
    return steps


def train(model: Any, scenario: Scenario, rank: int, ranks: int) -> dict[str, Any]:
    optimizer = OPTIMIZERS[scenario.optimizer](model)
    call = torch.compile(model, backend="aot_eager") if scenario.outer else model
    for micro in batches(scenario):
        for number, ids in enumerate(micro):
            if scenario.model == "skipping":
                model.layers[1].skips = (rank if ranks > 1 else number) == 1
            if scenario.sync_last and ranks > 1:
                model.set_requires_gradient_sync(number == len(micro) - 1)
            (loss_of(call, ids.chunk(ranks)[rank]) / len(micro)).backward()
        if scenario.clip:
            nn.utils.clip_grad_norm_(model.parameters(), scenario.clip)
        if scenario.clip_value:
            nn.utils.clip_grad_value_(model.parameters(), scenario.clip_value)
        if scenario.evaluated:
            with torch.no_grad():
                model(micro[0])
        optimizer.step()
        if scenario.optimizer == "by hand":
            losia_fx.stepped(model)
        optimizer.zero_grad(set_to_none=not scenario.zeroed)
    return outcome(model)


def outcome(model: nn.Module) -> dict[str, Any]:
    followed = losia_fx.controller(model)
    return {
        "weights": {name: whole(value) for name, value in model.state_dict().items()},
        "places": {name: (s.rows.clone(), s.cols.clone()) for name, s in losia_fx.subnets(model).items()},
        "values": {name: whole(s.values) for name, s in losia_fx.subnets(model).items()},
        "history": [(event.step, event.group, event.moved, event.captured) for event in followed.history],
        "left_out": followed.left_out,
        "step": followed.step,
    }


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@functools.cache
def alone(scenario: Scenario) -> dict[str, Any]:
    """What one process comes to on the joined batches."""
    return train(model_of(scenario, scenario.compiler), scenario, 0, 1)


def joined_only(scenario: Scenario) -> Scenario:
    """The same of what decides the outcome of one process."""
    plain = Scenario()
    names = ("root_only", "reshard", "sync_last", "replicas", "kept_after_backward", "evaluated", "outer")
    compiler = "inductor" if scenario.compiler == "inductor" else "eager"  # which rounds in a way of its own
    return replace(scenario, compiler=compiler, **{name: getattr(plain, name) for name in names})


def policy(compiler: str) -> dict[str, Any]:
    """float32 weights that are used and differentiated in bfloat16, beside dense bfloat16 gradients made by hand."""
    scenario = Scenario(dtype=torch.float32)
    plain = MODELS[scenario.model]()
    model = model_of(scenario, compiler)
    plain.load_state_dict(model.state_dict())
    subnets, groups = losia_fx.subnets(model), losia_fx.controller(model).groups
    places = {name: (subnet.rows.clone(), subnet.cols.clone()) for name, subnet in subnets.items()}
    make: MakeOptimizer = lambda parameters: optim.AdamW(parameters, lr=5e-3)  # noqa: E731
    reference = Reference(plain, places, groups, make, lambda step: 5e-3, period=OPTIONS["period"])
    for (ids,) in batches(scenario):
        halves = []
        for half in ids.chunk(dist.get_world_size()):
            twin = copy.deepcopy(plain).bfloat16()
            loss_of(twin, half).backward()
            halves.append({name: p.grad.float() for name, p in twin.named_parameters() if p.grad is not None})
        for name, weight in reference.weights.items():
            weight.weight.grad = torch.stack([half[name] for half in halves]).mean(0)
        reference.step()
    for module in (*model.layers, model):  # type: ignore[misc]
        fully_shard(module, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    found = train(model, scenario, dist.get_rank(), dist.get_world_size())
    ends = {name: (weight.rows, weight.cols) for name, weight in reference.weights.items()}
    values = {name: weight.values.detach() for name, weight in reference.weights.items()}
    expected = {"weights": reference.model.state_dict(), "values": values, "places": ends}
    return {"found": found, "expected": expected | {"history": reference.reselections}}


def run(name: str) -> dict[str, Any]:
    if name in POLICIES:
        return policy(POLICIES[name])
    scenario = SCENARIOS[name]
    if scenario.model == "weights by hand":
        warnings.filterwarnings("ignore", message=".*ran outside a rewritten graph")
    expected = alone(joined_only(scenario))
    scenario = replace(scenario, halves=False)
    torch._dynamo.reset()
    before, _ = graph_counts()
    model = model_of(scenario, scenario.compiler)
    shard(model, scenario)
    found = train(model, scenario, dist.get_rank(), dist.get_world_size())
    found["graphs"] = graph_counts()[0] - before
    return {"found": found, "expected": expected}


POLICIES = {"bfloat16 policy": "eager", "bfloat16 policy, aot_eager": "aot_eager"}
Run = Callable[[str], dict[str, Any]]


def rank_main(rank: int, results: str, ranks: int, names: list[str], run: Run) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}.rendezvous", rank=rank, world_size=ranks)
    found: dict[str, Any] = {}
    for name in names:
        torch._dynamo.reset()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", category=losia_fx.LosiaWarning)
                found[name] = run(name)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
            traceback.print_exc()
        torch.save(found, f"{results}.{rank}")
    os._exit(0)


def main(results: str, ranks: int, names: list[str], run: Run = run) -> int:
    """Each scenario in all ranks; the exit code."""
    for rank in range(ranks):
        if os.fork() == 0:
            rank_main(rank, results, ranks, names, run)
    ended = [os.waitpid(-1, 0)[1] for _ in range(ranks)]
    return max(map(os.waitstatus_to_exitcode, ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] or list(CORE)))
