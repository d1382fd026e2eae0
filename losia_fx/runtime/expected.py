"""What products of 8-bit numbers take on a machine, beside those that the model does; measured once a process."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from losia_fx.errors import LosiaWarning, TransformError
from losia_fx.method.packing import quantise
from losia_fx.ops.packed import product

from .state import SubnetState

log = logging.getLogger("losia_fx")

SIZES = {"cpu": (128, 512), "cuda": (4096, 4096)}
"""(tokens, features in and out) of the product that is timed: some milliseconds of each device."""
REPEATS = 3


def say_expected(states: Sequence[SubnetState], kind: str) -> None:
    """In a line, what ``frozen_products=kind`` is expected to gain: a warning where that is nothing, else a log entry.

    Nothing but the line follows from the measurement, so that a run and its resumption compute the same.
    Raises TransformError where the machine has no such products.
    """
    packed = next((state for state in states if state.packed is not None), None)
    if packed is None:
        _warn(f"frozen_products={kind!r}: no weight of this model has such products; losia_fx.report(model) says why")
        return
    weight = packed.weight
    if weight.is_meta:
        return
    share, dtype = share_of_dense(kind, weight.dtype, weight.device), str(weight.dtype).removeprefix("torch.")
    said = f"frozen_products={kind!r}: a product of these takes {share:.2f} of the time of one in {dtype}"
    if share < 1.0:
        log.info("losia_fx: %s on %s", said, weight.device)
    else:
        _warn(f"{said} on this machine ({weight.device}): steps are slower with it here, leave it out")


def _warn(text: str) -> None:
    warnings.warn(f"losia_fx: {text}", LosiaWarning, stacklevel=5)


@functools.cache
def share_of_dense(kind: str, dtype: torch.dtype, device: torch.device) -> float:
    """The time of a product of 8-bit numbers, as a share of that of the dense one in ``dtype``; least of a few."""
    tokens, size = SIZES.get(device.type, SIZES["cuda"])
    x, weight = (torch.ones(count, size, dtype=dtype, device=device) for count in (tokens, size))
    (numbers, token_scales), (packed, scales) = quantise(x, kind), quantise(weight, kind)

    def in_8_bits() -> Tensor:
        return product(numbers, packed.t(), token_scales, scales.t(), dtype)

    try:
        in_8_bits()
    except (RuntimeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise TransformError(
            f"frozen_products={kind!r}: {device} has no product of these ({why}); leave it out, or take another"
        ) from error
    return _least_time(in_8_bits, device) / _least_time(lambda: F.linear(x, weight), device)


def _least_time(run: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    run()
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
