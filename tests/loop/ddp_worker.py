"""Two processes under DistributedDataParallel over gloo; what they found goes to a file for the tests.

    python ddp_worker.py RESULTS

Each rank writes RESULTS.<rank>; a scenario that fails leaves its traceback there.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn.parallel import DistributedDataParallel

import losia_fx
from losia_fx.checkpoint.state import load_state, save_state
from losia_fx.optim import SubnetRMS
from tests.support.pair import OPTIONS, PERIOD
from tests.support.toys import Toy, batch, loss_of

RANKS = 2
STEPS = 2 * PERIOD * 2 + 1  # two rounds of two groups, and one more


def model_of(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return losia_fx.transform(Toy(layers=1).double(), **{**OPTIONS, "compiler": "eager", **options})


def adamw(model: nn.Module) -> optim.Optimizer:
    return optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def joined_batches(count: int = STEPS) -> list[Tensor]:
    torch.manual_seed(7)
    return [batch(8) for _ in range(count)]


def mine(ids: Tensor) -> Tensor:
    """Half of a batch, in an order that tells the ranks apart."""
    return ids.chunk(RANKS)[dist.get_rank()]


def outcome(model: nn.Module) -> dict[str, Any]:
    return {"state": losia_fx.state_dict(model), "weights": {k: v.clone() for k, v in model.state_dict().items()}}


def count_bytes(ddp: DistributedDataParallel) -> list[int]:
    """Bytes of each bucket that is averaged, as it is."""
    sizes: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP looks at annotations, and ours would be strings
        sizes.append(bucket.buffer().nbytes)
        averaged = bucket.buffer() / RANKS
        return dist.all_reduce(averaged, async_op=True).get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    return sizes


def trajectory() -> dict[str, Any]:
    """Clipped steps on halves; with the gradients of the first one, and the traffic."""
    model = model_of()
    ddp = DistributedDataParallel(model)
    sizes, optimizer, gradients = count_bytes(ddp), adamw(model), {}
    for number, ids in enumerate(joined_batches()):
        loss_of(ddp, mine(ids)).backward()
        if number == 0:
            gradients = {name: s.values.grad.clone() for name, s in losia_fx.subnets(ddp).items()}
            traffic = sum(sizes)
        nn.utils.clip_grad_norm_(ddp.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return {**outcome(model), "gradients": gradients, "traffic": traffic, "left_out": losia_fx.controller(ddp).left_out}


def accumulation() -> dict[str, Any]:
    """Four micro-batches a step, of which three are not averaged (no_sync)."""
    model = model_of()
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)
    for ids in joined_batches(PERIOD + 2):
        parts = mine(ids).split(1)
        with ddp.no_sync():
            for part in parts[:-1]:
                (loss_of(ddp, part) / len(parts)).backward()
        (loss_of(ddp, parts[-1]) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(model)


def two_forwards_before_a_backward() -> dict[str, Any]:
    model = model_of()
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)
    for ids in joined_batches(PERIOD + 2):
        first, second = mine(ids).chunk(2)
        losses = [loss_of(ddp, first), loss_of(ddp, second)]
        (sum(losses) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return outcome(model)


def plain_steps(model: nn.Module, ddp: Callable[..., Any]) -> dict[str, Any]:
    optimizer = adamw(model)
    for ids in joined_batches(PERIOD + 2):
        loss_of(ddp, mine(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(model)


def compiled_around() -> dict[str, Any]:
    """torch.compile around the wrapper, as people stack them."""
    model = model_of(compiler="aot_eager")
    ddp = torch.compile(DistributedDataParallel(model), backend="eager")
    return plain_steps(model, ddp)


def resumed() -> dict[str, Any]:
    """Cut in rewarming: every rank reads what the first has written."""
    folder, ends = Path(sys.argv[1]).parent, []
    steps, cut = joined_batches(), PERIOD + 1
    for begin in (0, cut):
        model = model_of()
        optimizer = adamw(model)
        if begin:
            load_state(model, folder / "losia")
            rest = torch.load(folder / "rest.pt", weights_only=True)
            model.load_state_dict(rest[0])
            optimizer.load_state_dict(rest[1])
        ddp = DistributedDataParallel(model)
        for number, ids in enumerate(steps[begin:], begin):
            if number == cut and not begin and dist.get_rank() == 0:
                save_state(model, folder / "losia")
                torch.save((model.state_dict(), optimizer.state_dict()), folder / "rest.pt")
            loss_of(ddp, mine(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.barrier()
        ends.append(outcome(model))
    return {"whole": ends[0], "resumed": ends[1]}


def group_of_its_own() -> dict[str, Any]:
    """DistributedDataParallel over this rank alone: its half of each batch is all it learns from."""
    groups = [dist.new_group([rank]) for rank in range(RANKS)]
    model = model_of()
    ddp = DistributedDataParallel(model, process_group=groups[dist.get_rank()])
    return plain_steps(model, ddp)


def by_rows_and_columns() -> dict[str, Any]:
    """SubnetRMS, whose means see the averaged gradient."""
    model = model_of()
    ddp = DistributedDataParallel(model)
    optimizer = SubnetRMS(model, 5e-3)
    for ids in joined_batches(PERIOD + 2):
        loss_of(ddp, mine(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**outcome(model), "optimizer": optimizer.state_dict()["state"]}


class Labelled(Toy):
    """Its tokens come by the name that labels are counted by."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


def roaming_model() -> nn.Module:
    torch.manual_seed(0)
    rule = losia_fx.LosiaConfig.roaming(period=PERIOD, head_rows="frequent", count_steps=2, carry_moments=True)
    return losia_fx.transform(
        Labelled(layers=1).double(), rule, rank_factor=0.25, output_rank_factor=0.25, compiler="eager"
    )


def roaming() -> dict[str, Any]:
    """Labels of all ranks are counted; Adam's second moment goes on where the subnets have been drawn anew."""
    model = roaming_model()
    return plain_steps(model, DistributedDataParallel(model))


SCENARIOS: list[Callable[[], dict[str, Any]]] = [
    trajectory, accumulation, two_forwards_before_a_backward, compiled_around, resumed, group_of_its_own,
    by_rows_and_columns, roaming,
]  # fmt: skip


def rank_main(rank: int, results: str, scenarios: list[Callable[[], dict[str, Any]]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}.rendezvous", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for scenario in scenarios:
        torch._dynamo.reset()
        try:
            found[scenario.__name__] = scenario()
        except Exception:
            found[scenario.__name__] = {"error": traceback.format_exc()}
            traceback.print_exc()
        torch.save(found, f"{results}.{rank}")
    os._exit(0)


def run(scenarios: list[Callable[[], dict[str, Any]]]) -> int:
    """Each scenario in both ranks; the exit code."""
    for number in range(RANKS):
        if os.fork() == 0:
            rank_main(number, sys.argv[1], scenarios)
    ended = [os.waitpid(-1, 0)[1] for _ in range(RANKS)]
    return max(map(os.waitstatus_to_exitcode, ended))


if __name__ == "__main__":
    sys.exit(run(SCENARIOS))
