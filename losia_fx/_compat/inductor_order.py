"""Inductor reads a buffer that was written in place after the write: in torch 2.13 it may forget to.

The scheduler knows a written buffer by a new name, which whoever reads it afterwards has to ask for. Where the C++
backend fuses loops of different shapes it finds a node's reads anew, and SchedulerNode.recompute_size_and_body gives
them their new names only if the node has other dependencies by hand. The pass that reorders nodes for a lower peak of
memory then moves such a read ahead of the write: gradients that are wrong in silence (EfficientLoFTR under losia_fx;
the backward of a bilinear interpolation behind a convolution has such reads, in whatever order they end up).

Seen in torch 2.13.0 (tests/test_compat.py); ends with the torch that renames in both cases.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from torch._inductor.scheduler import SchedulerNode


@cache
def keep_reads_behind_writes() -> None:
    """From now on, in this process."""
    recompute = SchedulerNode.recompute_size_and_body

    @wraps(recompute)
    def renamed(self: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    SchedulerNode.recompute_size_and_body = renamed  # type: ignore[method-assign]
