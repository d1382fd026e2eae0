"""Two processes under torchrun, of which the second dies after some steps of a sharded model."""

from __future__ import annotations

import os

import torch.distributed as dist

from tests.sharded.state_worker import CUT, SCENARIO, adamw, batches, go_on, sharded

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = sharded(SCENARIO)
    optimizer, steps = adamw(model), batches(SCENARIO)
    go_on(model, optimizer, steps[:CUT], rank, ranks)
    print("trained", flush=True)
    if rank == 1:
        os._exit(3)
    go_on(model, optimizer, steps[CUT:], rank, ranks)
    print("never", flush=True)
