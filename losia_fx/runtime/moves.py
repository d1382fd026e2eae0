"""What an optimizer may say about a subnet that moves."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class KeepsOverMoves(Protocol):
    """An optimizer that sees to its own state of a subnet that has moved; any other's starts anew there.

    Implemented by losia_fx.optim.SubnetRMS, and by whatever optimizer a user writes that keeps something of the whole
    weight (by rows and columns, say) beside what it keeps of the subnet.
    """

    def after_subnet_move(self, values: nn.Parameter) -> None:
        """``values``, S of one of the optimizer's subnets, holds other elements of W from now on.

        Called once rows, cols and S have changed in place; a second time for one move that was cut short.
        """
