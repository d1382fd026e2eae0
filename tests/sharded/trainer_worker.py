"""accelerate and transformers' Trainer with their FSDP2 plugin: run as worker.py is.

Without a GPU both leave the plugin aside without a word, and take DistributedDataParallel: here they are told that
there are several GPUs, and go the way they go there, over gloo.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, optim
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import losia_fx
from tests.sharded.worker import Scenario, alone, batches, main, model_of, outcome
from tests.support.toys import loss_of

SCENARIO = Scenario(model="llama", clip=0.3)
BLOCK = "LlamaDecoderLayer"
CUT = 8


class Several(PartialState):
    """As on a machine with several GPUs, as far as the kind of distribution goes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = self.distributed_type = DistributedType.MULTI_GPU


def as_with_gpus() -> None:
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    import accelerate.state
    import transformers.training_args

    accelerate.state.PartialState = transformers.training_args.PartialState = Several  # type: ignore[misc]


def prepared(seed: int, efficient: bool) -> tuple[Accelerator, Any, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[BLOCK],
        cpu_ram_efficient_loading=efficient,
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.distributed_type is DistributedType.FSDP
    # Of a model that one rank loads for all, the others have any numbers.
    model = model_of(SCENARIO, "eager", seed + efficient * dist.get_rank())
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(losia_fx.controller(model))
    return accelerator, model, optimizer


def go_on(parts: tuple[Accelerator, Any, Any], steps: list[list[Tensor]]) -> None:
    accelerator, model, optimizer = parts
    for (ids,) in steps:
        accelerator.backward(loss_of(model, ids.chunk(dist.get_world_size())[dist.get_rank()]))
        accelerator.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()


def accelerated(efficient: bool) -> dict[str, Any]:
    expected = alone(SCENARIO)
    parts = prepared(0, efficient)
    go_on(parts, batches(SCENARIO)[:CUT])
    folder = Path(sys.argv[1]).parent / f"accelerate {efficient}"
    parts[0].save_state(str(folder))
    go_on(parts, batches(SCENARIO)[CUT:])
    found = outcome(parts[1])
    again = prepared(1, efficient)
    again[0].load_state(str(folder))
    go_on(again, batches(SCENARIO)[CUT:])
    return {"found": found, "expected": expected, "resumed": outcome(again[1])}


class InOrder(Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def trainer_of(folder: Path, seed: int, efficient: bool, **options: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=SCENARIO.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=0.3,
        optim="adamw_torch",
        save_steps=CUT,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        fsdp=True,
        fsdp_config={
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [BLOCK],
            "cpu_ram_efficient_loading": efficient,
            "state_dict_type": "FULL_STATE_DICT",
        },
        **options,
    )
    rows = [ids for (step,) in batches(SCENARIO) for ids in step]
    data = [{"input_ids": ids, "labels": ids} for ids in rows]
    model = model_of(SCENARIO, "eager", seed + efficient * dist.get_rank())
    trainer = InOrder(model=model, args=args, train_dataset=data, eval_dataset=data[:8])
    trainer.add_callback(losia_fx.LosiaCallback(trainer))
    return trainer


def trained(efficient: bool) -> dict[str, Any]:
    expected, folder = alone(SCENARIO), Path(sys.argv[1]).parent / f"trainer {efficient}"
    trainer = trainer_of(folder, 0, efficient)
    trainer.train()
    assert trainer.accelerator.distributed_type is DistributedType.FSDP
    again = trainer_of(folder, 1, efficient)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}"))
    return {"found": outcome(trainer.model), "expected": expected, "resumed": outcome(again.model)}


def best() -> dict[str, Any]:
    """Evaluated, saved, and the best of it (here: the first, whose loss is the largest) loaded in the end."""
    folder = Path(sys.argv[1]).parent / "best"
    asked: dict[str, Any] = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    asked["load_best_model_at_end"] = True
    trainer = trainer_of(folder, 0, False, eval_strategy="steps", eval_steps=CUT, **asked)
    trainer.train()
    metrics = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    return {"losses": metrics, "best": trainer.evaluate()["eval_loss"]}


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "accelerate": lambda: accelerated(False),
    "accelerate, loaded by one": lambda: accelerated(True),
    "Trainer": lambda: trained(False),
    "Trainer, loaded by one": lambda: trained(True),
    "best": best,
}


def run(name: str) -> dict[str, Any]:
    as_with_gpus()
    AcceleratorState._reset_state(reset_partial_state=True)
    return RUNS[name]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:], run))
