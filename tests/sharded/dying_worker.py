"""Two processes under torchrun, of which the second dies after some steps of a sharded model and a checkpoint."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from tests.sharded.state_worker import CUT, SCENARIO, adamw, batches, go_on, save_in_parts, sharded

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = sharded(SCENARIO)
    optimizer, steps = adamw(model), batches(SCENARIO)
    go_on(model, optimizer, steps[:CUT], rank, ranks)
    save_in_parts(model, optimizer, sys.argv[1])
    os.write(1, b"trained\n")  # at once: both write to one pipe
    dist.barrier()  # or the job would end before the other has said so
    if rank == 1:
        os._exit(3)
    go_on(model, optimizer, steps[CUT:], rank, ranks)
    print("never", flush=True)
