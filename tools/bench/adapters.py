"""Other ways to fine-tune: in full, and the low-rank and sparse ones of peft and galore-torch."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import nn

from .losia_methods import count_trained
from .methods import LEARNING_RATE, Method, Trial, adamw, compiled_in_place
from .sizes import Setup, block_linears


def _full(setup: Setup, mode: str) -> Trial:
    model = setup.model().requires_grad_(True)
    return Trial(compiled_in_place(model, mode), setup.batch, adamw(model.parameters()))


def equal_rank(setup: Setup) -> int:
    """The rank of adapters on the blocks' linears that trains about as many parameters as LoSiA does."""
    per_rank = sum(linear.in_features + linear.out_features for linear in block_linears(setup.base))
    return max(1, round(count_trained(setup) / per_rank))


def _lora(setup: Setup, mode: str, rank: int | None, casts: bool) -> Trial:
    from peft import LoraConfig

    rank = equal_rank(setup) if rank is None else rank
    config = LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return _adapted(setup, mode, config, casts)


def _shira(setup: Setup, mode: str) -> Trial:
    from peft import ShiraConfig

    linears = {name.rpartition(".")[2] for name, module in setup.base.model.layers.named_modules()
               if isinstance(module, nn.Linear)}  # fmt: skip
    config = ShiraConfig(r=equal_rank(setup), target_modules=sorted(linears), task_type="CAUSAL_LM")
    return _adapted(setup, mode, config, True)


def _adapted(setup: Setup, mode: str, config: Any, casts: bool) -> Trial:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(setup.model(), config, autocast_adapter_dtype=casts)
    return Trial(compiled_in_place(model, mode), setup.batch, adamw(model.parameters()))


def galore_rank(setup: Setup) -> int:
    """The authors' 128, or less in a model that is too small for it."""
    return min(128, setup.size.hidden // 8)


def _galore(setup: Setup, mode: str) -> Trial:
    from galore_torch import GaLoreAdamW

    model = setup.model()
    weights = [linear.weight.requires_grad_(True) for linear in block_linears(model)]
    group = {"params": weights, "rank": galore_rank(setup), "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=LEARNING_RATE, no_deprecation_warning=True)
    return Trial(compiled_in_place(model, mode), setup.batch, optimizer)


CASTS = "peft's default: float32 adapters beside a bfloat16 base"
NO_CASTS = "autocast_adapter_dtype=False: adapters in the base's dtype"
ADAPTERS = (
    Method("full", _full, note="every parameter, the embedding too"),
    Method("lora r=16", partial(_lora, rank=16, casts=True), needs="peft", note=CASTS),
    Method("lora r=64", partial(_lora, rank=64, casts=True), needs="peft", note=CASTS),
    Method("lora r=equal", partial(_lora, rank=None, casts=True), needs="peft", note=f"as many as LoSiA; {CASTS}"),
    Method("lora r=16, no casts", partial(_lora, rank=16, casts=False), needs="peft", note=NO_CASTS),
    Method("lora r=64, no casts", partial(_lora, rank=64, casts=False), needs="peft", note=NO_CASTS),
    Method("lora r=equal, no casts", partial(_lora, rank=None, casts=False), needs="peft", note=NO_CASTS),
    Method("shira", _shira, needs="peft", note="about as many parameters as LoSiA, outside of the head"),
    Method("galore", _galore, needs="galore_torch", note="the blocks' linears; its SVD, every 200 steps, is not in it"),
)
