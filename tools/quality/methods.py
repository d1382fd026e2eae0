"""What is compared: how each method makes a model trainable, and what it is optimized with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer

import losia_fx
from losia_fx import LosiaConfig
from losia_fx.errors import LosiaError
from losia_fx.optim import SubnetRMS

BETAS = (0.9, 0.999)
PERIOD = 10
SUBNET_RATES, HEAD_RATES = (6e-3, 1e-2, 1.5e-2), (3e-3, 6e-3, 1e-2, 1.5e-2)
LORA_RATES, FULL_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (3e-5, 1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Method:
    """prepare: of a model and a seed, the model to train. optimizer: of that and a learning rate."""

    name: str
    says: str
    """What it is, for the table."""
    rates: tuple[float, ...]
    """Tried where none are named."""
    prepare: Callable[[Any, int], Any]
    optimizer: Callable[[Any, float], Optimizer]
    clip_norm: float | None = None


def adam(model: nn.Module, lr: float) -> Optimizer:
    return Adam((parameter for parameter in model.parameters() if parameter.requires_grad), lr, BETAS)


def _rms(model: nn.Module, lr: float) -> Optimizer:
    return SubnetRMS(model, lr)


def _full(model: Any, seed: int) -> Any:
    return model


def _lora(rank: int) -> Callable[[Any, int], Any]:
    def prepare(model: Any, seed: int) -> Any:
        try:
            import peft
        except ImportError:
            raise LosiaError("LoRA needs peft: pip install losia-fx[bench], or leave lora out of --methods") from None
        linears = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=linears)
        return peft.get_peft_model(model, config)

    return prepare


def _subnets(**options: Any) -> Callable[[Any, int], Any]:
    """The head stays frozen unless the options say so; nothing is compiled, as the models are tiny."""

    def prepare(model: Any, seed: int) -> Any:
        given = {"output_rank_factor": 0.0, "period": PERIOD, "compiler": "eager", **options}
        return losia_fx.transform(model, seed=seed, **given)

    return prepare


def _roaming_with_head(model: Any, seed: int) -> Any:
    return losia_fx.transform(model, LosiaConfig.roaming(seed=seed, compiler="eager"))


_DRAWN: dict[str, Any] = {"importance": "random"}
_ALL: dict[str, Any] = {"schedule": "all", **_DRAWN}
_HEAD: dict[str, Any] = {"output_rank_factor": 0.125}
_FREQUENT: dict[str, Any] = {**_HEAD, "head_rows": "frequent", "count_steps": 50}

_KNOWN = (
    Method("full", "every parameter", FULL_RATES, _full, adam, clip_norm=1.0),
    Method("lora-2", "LoRA, rank 2, every linear of the blocks", LORA_RATES, _lora(2), adam, clip_norm=1.0),
    Method("lora-8", "LoRA, rank 8, every linear of the blocks", LORA_RATES, _lora(8), adam, clip_norm=1.0),
    Method("paper", "the paper's rule: async, mixed", SUBNET_RATES, _subnets(), adam),
    Method("random", "async, drawn", SUBNET_RATES, _subnets(**_DRAWN), adam),
    Method("static", "the first subnets, kept", SUBNET_RATES, _subnets(schedule="static"), adam),
    Method("all", "all drawn every 10 steps", SUBNET_RATES, _subnets(**_ALL), adam),
    Method("all-carry", "the same, moments carried", SUBNET_RATES, _subnets(**_ALL, carry_moments=True), adam),
    Method("all-rms", "the same with SubnetRMS", SUBNET_RATES, _subnets(**_ALL), _rms),
    Method(
        "all-visits", "all by visits every 10 steps", SUBNET_RATES, _subnets(schedule="all", importance="visits"), adam
    ),
    Method("sign", "all drawn every step, Adam", SUBNET_RATES, _subnets(**_ALL, period=1), adam),
    Method("roaming", "all drawn every step, SubnetRMS", SUBNET_RATES, _subnets(**_ALL, period=1), _rms),
    Method("paper-head", "the paper's rule, and the head by it", HEAD_RATES, _subnets(**_HEAD), adam),
    Method("paper-head-frequent", "its blocks, the head by labels", HEAD_RATES, _subnets(**_FREQUENT), adam),
    Method("int8", "paper, frozen products in int8", SUBNET_RATES, _subnets(frozen_products="int8"), adam),
    Method(
        "int8-only",
        "the same, W kept in int8 alone",
        SUBNET_RATES,
        _subnets(frozen_products="int8", keep_dense=False),
        adam,
    ),
    Method("float8", "paper, frozen products in float8", SUBNET_RATES, _subnets(frozen_products="float8"), adam),
    Method("roaming-head", "LosiaConfig.roaming(), with the head", HEAD_RATES, _roaming_with_head, _rms),
    Method(
        "roaming-head-frequent",
        "roaming, the head by labels",
        HEAD_RATES,
        _subnets(**_ALL, **_FREQUENT, period=1),
        _rms,
    ),
)
METHODS = {method.name: method for method in _KNOWN}
