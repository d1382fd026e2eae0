"""What a profiled slot gathers of one weight: the gradient of the step under way, importance and uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from losia_fx._compat import graph_task_id

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch


@dataclass
class Profile:
    """Each is made when first needed, on W's device, and has its shape but for the sums."""

    importance: Tensor | None = None
    """I, float32."""
    uncertainty: Tensor | None = None
    """U, float32."""
    grad: Tensor | None = None
    """G, the full gradient of the optimizer step under way: as the first product made it, float32 from the second."""
    row_sums: Tensor | None = None
    """The running mean of G^2 summed over columns, (out,) or (E, out) float32: importance "visits" and "sample"."""
    col_sums: Tensor | None = None
    """The same over rows, (in,) or (E, in)."""
    backward: int = -1
    """The backward pass that last added to G."""
    unreduced: Profile | None = None
    """Under FSDP2, where the others are this rank's portion: holds G of the local batch until it is reduced."""
    outlived: Tensor | None = None
    """Under FSDP2: whether this rank's part of S.grad held anything when the backward began; None for no S.grad."""

    def to(self, device: torch.device) -> None:
        for name in ("importance", "uncertainty", "grad", "row_sums", "col_sums"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))

    def begin_use(self, seen: Tensor | None) -> None:
        """Before a use of W in a backward is added to G. ``seen``: S.grad.

        G lives and dies with S.grad: the first use of W in a backward that finds no gradient on S starts it anew.
        """
        if (backward := graph_task_id()) == self.backward:
            return
        self.backward = backward
        if seen is None:
            self.grad = None
        elif self.grad is not None:  # without asking whether there is any: the host would wait for the device
            self.grad.masked_fill_(~seen.any(), 0.0)

    def accumulate(self, weight: Tensor, grad: Tensor, expert: int | Tensor | None, owned: bool) -> None:
        """Adds ``grad`` to G: shape of W, or of one expert's (out, in) of it, whose number may be a tensor (1,) on W's
        device. ``owned``: nobody else has it."""
        if self.grad is None and expert is None:
            # A sum needs float32; a single product has the width that it was made in.
            narrow = grad if grad.itemsize <= 4 else grad.float()
            self.grad = narrow.contiguous() if owned else narrow.clone(memory_format=torch.contiguous_format)
            return
        if self.grad is None:
            self.grad = grad.new_zeros(weight.shape, dtype=torch.float32)
        self.grad = self.grad.float()
        if isinstance(expert, Tensor):
            self.grad.index_add_(0, expert, grad.float().unsqueeze(0))
        else:
            (self.grad if expert is None else self.grad[expert]).add_(grad)

    def average_ranks(self, weight: Tensor, ranks: ProcessGroup) -> None:
        """G of the joined batch. A rank on which the weight had no use takes part with zeros: others wait for it."""
        grad = torch.zeros_like(weight, dtype=torch.float32) if self.grad is None else self.grad.float()
        dist.all_reduce(grad, group=ranks)
        self.grad = grad.div_(dist.get_world_size(ranks))
