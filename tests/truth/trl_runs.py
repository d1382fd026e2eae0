"""Tiny runs of TRL's trainers, and the same on a plain model of which the subnets' elements alone may move."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

import losia_fx
from tests.support.reference import block_index

ASSETS = Path(losia_fx.__file__).parent / "assets" / "default_model"
PERIOD = 2
OPTIONS: dict[str, Any] = {
    "compiler": "eager",
    "rank_factor": 0.25,
    "output_rank_factor": 0.25,
    "period": PERIOD,
    "importance": "random",
    "rewarm": False,
}
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.5,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-4,  # a step as large for a gradient that is all rounding would tell the runs apart
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
}


def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(str(ASSETS))
    found.pad_token = found.pad_token or found.eos_token
    found.chat_template = None
    return found


def plain_model(layers: int = 1) -> Any:
    torch.manual_seed(1)
    vocabulary = len(tokenizer())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=128, tie_word_embeddings=False, **sizes
    )
    config.pad_token_id = config.eos_token_id = config.bos_token_id = tokenizer().eos_token_id
    return LlamaForCausalLM(config)


class Seen(TrainerCallback):
    """What a transformed model was after each step: t, and where its subnets are; S and W agree, as they are stored."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.subnets: Mapping[str, losia_fx.Subnet] = losia_fx.subnets(model)
        self.places = [self._places()]

    def _places(self) -> dict[str, tuple[Tensor, ...]]:
        return {name: tuple(i.clone() for i in block_index(s.rows, s.cols)) for name, s in self.subnets.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert losia_fx.controller(self.model).step == state.global_step
        self.places.append(self._places())
        for name, place in self.places[-1].items():
            assert torch.equal(self.subnets[name].weight[place], self.subnets[name].values), name


class Restricted(TrainerCallback):
    """Has a plain model learn at those places alone; a weight whose place moves starts its moments anew."""

    def __init__(self, model: nn.Module, places: list[dict[str, tuple[Tensor, ...]]]) -> None:
        self.places, self.masks = places, {}
        model.requires_grad_(False)
        self.weights = {name: model.get_parameter(name) for name in places[0]}
        self._move(0)
        for name, weight in self.weights.items():
            weight.requires_grad_(True)
            weight.register_hook(lambda grad, name=name: grad * self.masks[name])

    def _move(self, step: int) -> list[str]:
        moved = []
        for name, place in self.places[step].items():
            mask = torch.zeros_like(self.weights[name]).index_put(place, torch.ones(()))
            if name not in self.masks or not torch.equal(mask, self.masks[name]):
                self.masks[name] = mask
                moved.append(name)
        return moved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name in self._move(state.global_step):
            kwargs["optimizer"].state.pop(self.weights[name])


def assert_learned(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Every weight with a subnet has moved, those of the blocks too."""
    still = [name for name in losia_fx.subnets(model) if torch.equal(model.get_parameter(name), before[name])]
    assert not still


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
