"""What a profiled slot gathers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from losia_fx.runtime.profile import Profile


@pytest.mark.parametrize("used", [True, False])
def test_the_ranks_average_their_gradients(used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """G is that of the joined batch, of whose loss each rank has the mean of its part; and a rank may have none."""
    weight, mine, other = torch.zeros(3, 4), torch.randn(3, 4), torch.randn(3, 4)

    def all_reduce(grad: Tensor, group: Any) -> None:
        grad.add_(other)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    profile = Profile(grad=mine.clone() if used else None)
    profile.average_ranks(weight, object())  # type: ignore[arg-type]
    torch.testing.assert_close(profile.grad, ((mine if used else 0.0) + other) / 2)
