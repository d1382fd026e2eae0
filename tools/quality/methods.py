"""What is compared: how each method makes a model trainable, and what it is optimized with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer

import losia_fx
from losia_fx.errors import LosiaError
from losia_fx.optim import SubnetRMS

BETAS = (0.9, 0.999)
PERIOD = 10
SUBNET_RATES, LORA_RATES, FULL_RATES = (6e-3, 1e-2, 1.5e-2), (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3)


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
    """The head stays frozen unless the options say so; compiled by no compiler, as the models are tiny."""

    def prepare(model: Any, seed: int) -> Any:
        given = {"output_rank_factor": 0.0, "period": PERIOD, "compiler": "eager", **options}
        return losia_fx.transform(model, seed=seed, **given)

    return prepare


_ALL = (
    Method("full", "every parameter", FULL_RATES, _full, adam, clip_norm=1.0),
    Method("lora-2", "LoRA, rank 2, every linear of the blocks", LORA_RATES, _lora(2), adam, clip_norm=1.0),
    Method("lora-8", "LoRA, rank 8, every linear of the blocks", LORA_RATES, _lora(8), adam, clip_norm=1.0),
    Method("paper", "the paper's rule: async, mixed", SUBNET_RATES, _subnets(), adam),
    Method("random", "async, subnets drawn at random", SUBNET_RATES, _subnets(importance="random"), adam),
    Method("random-rms", "the same with SubnetRMS", SUBNET_RATES, _subnets(importance="random"), _rms),
    Method("static", "the first subnets, kept", SUBNET_RATES, _subnets(schedule="static"), adam),
)
METHODS = {method.name: method for method in _ALL}
