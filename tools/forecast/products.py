"""What frozen products in 8 bits (LosiaConfig.frozen_products) are expected to take of a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from losia_fx.runtime.expected import share_of_dense

from .estimate import StepFacts, losia


@dataclass(frozen=True)
class ProductsForecast:
    kind: str
    weights: int
    """How many have such products."""
    flops_share: float
    """Of the matmul FLOPs of an optimizer step, 0 to 1: those that are products of 8-bit numbers."""
    time_share: float
    """Of the time of a product as the model does it, what one of these takes on this machine; measured."""
    dtype: str
    """Of the model's."""

    @classmethod
    def of(cls, model: nn.Module, facts: StepFacts) -> ProductsForecast | None:
        """None where the options ask for none, or no weight has any."""
        kind = facts.config.frozen_products
        packed = {weight.name for weight in facts.weights if weight.packed_bytes(facts.config)}
        if kind is None or not packed:
            return None
        in_8_bits = sum(2 * use.flops for use in facts.uses if use.weight in packed)  # forward, and dL/dx
        weight = model.get_parameter(min(packed))
        time_share = share_of_dense(kind, weight.dtype, weight.device)
        dtype = str(weight.dtype).removeprefix("torch.")
        return cls(kind, len(packed), in_8_bits / losia(facts).all_flops, time_share, dtype)

    def __str__(self) -> str:
        return (
            f"frozen_products={self.kind!r}: {self.weights} weights, {self.flops_share:.0%} of a step's matmul FLOPs "
            f"in products of 8-bit numbers, each at {self.time_share:.2f} of the time of one in {self.dtype} here"
        )
