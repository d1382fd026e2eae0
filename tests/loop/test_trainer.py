"""transformers' Trainer: trains, evaluates, saves, resumes to the bit, reports; and its checkpoints stay ordinary."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

import losia_fx
from losia_fx import LosiaWarning, StateError
from losia_fx.checkpoint.trainer import FILE
from tests.support.toy_runs import OPTIONS, assert_same
from tests.support.toys import VOCABULARY, Toy, tiny_llama

PERIOD = 4
STEPS = 11


class LossToy(Toy):
    """Gives its loss, as a Trainer expects."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(input_ids)
        return {"loss": cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()), "logits": logits}


class Seen(TrainerCallback):
    """Stands for whatever the Trainer reports to."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers|torch.utils.data")
        yield


def data(count: int = 64) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    rows = [torch.randint(1, VOCABULARY, (6,)) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def model_of(dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return losia_fx.transform(LossToy(layers=1).to(dtype), **OPTIONS, **options)


IN_8_BITS: dict[str, Any] = {"frozen_products": "int8", "keep_dense": False}


def arguments(out: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "max_grad_norm": 0.5,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(out), **{**options, **more})


def trainer_of(model: nn.Module, out: Path, callback: bool = True, checkpoint: Path | None = None, **more: Any) -> Any:
    made = Trainer(
        model=model,
        args=arguments(out, **more),
        train_dataset=data(),
        eval_dataset=data(8),
        data_collator=default_data_collator,
    )
    if callback:
        made.add_callback(losia_fx.LosiaCallback(made, checkpoint=checkpoint))
    return made


@pytest.mark.slow
def test_importing_losia_fx_imports_no_transformers() -> None:
    code = "import losia_fx, sys; assert 'transformers' not in sys.modules; assert losia_fx.state_dict"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'LosiaCallbak'"):
        losia_fx.LosiaCallbak  # noqa: B018


@pytest.mark.filterwarnings("ignore:losia_fx. frozen_products=.* steps are slower")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, IN_8_BITS)],
    ids=["float32", "bfloat16", "in 8 bits"],
)
def test_resuming_goes_on_to_the_bit(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of a slot, at its edge, and in rewarming."""
    whole = model_of(dtype, **options)
    trainer = trainer_of(whole, tmp_path)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"
    assert losia_fx.controller(whole).step == STEPS
    assert [event.step for event in losia_fx.controller(whole).history] == [4, 8]
    for cut in (2, PERIOD, PERIOD + 1):
        resumed = model_of(dtype, seed=2, **options)
        continued = trainer_of(resumed, tmp_path, save_strategy="no")
        continued.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
        assert_same(whole, resumed)
        ends = [
            [log for log in t.state.log_history if log["step"] == STEPS and "loss" in log] for t in (trainer, continued)
        ]
        assert ends[0][0]["loss"] == ends[1][0]["loss"]


class Ended(TrainerCallback):
    """Tells a Trainer to end as a SIGTERM does, some seconds later."""

    def __init__(self, trainer: Trainer, at: str) -> None:
        self.trainer, self.at = trainer, at

    def _ask(self, event: str, state: Any) -> None:
        if event == self.at and state.global_step == 5:
            for callback in self.trainer.callback_handler.callbacks:
                if (manager := getattr(callback, "jit_manager", None)) is not None:
                    manager.is_checkpoint_requested = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask("begin", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask("end", state)


@pytest.mark.parametrize("at", ["begin", "end"])
def test_a_checkpoint_that_a_signal_asks_for_can_be_resumed(at: str, tmp_path: Path) -> None:
    """enable_jit_checkpoint: saved at the next event, of which no callback is told."""
    whole = model_of()
    trainer_of(whole, tmp_path / "whole", save_strategy="no").train()
    cut = trainer_of(model_of(), tmp_path, save_strategy="no", enable_jit_checkpoint=True)
    cut.add_callback(Ended(cut, at))
    cut.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    assert (folder / FILE).is_file()
    resumed = model_of(seed=2)
    trainer_of(resumed, tmp_path, save_strategy="no").train(resume_from_checkpoint=str(folder))
    assert_same(whole, resumed)


def test_a_checkpoint_of_adapters_alone_is_said_once(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = losia_fx.transform(adapted, **OPTIONS, trainable=("*lora_*",))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LosiaWarning)
        trainer_of(model, tmp_path, max_steps=3).train()
    said = [str(each.message) for each in caught if "adapters alone" in str(each.message)]
    assert len(said) == 1
    assert "checkpoint-1" in said[0]
    assert "losia_fx.save_delta" in said[0]


def test_a_checkpoint_in_another_folder_is_named(tmp_path: Path) -> None:
    whole = model_of()
    trainer_of(whole, tmp_path / "a").train()
    moved = tmp_path / "elsewhere"
    (tmp_path / "a" / "checkpoint-6").rename(moved)
    resumed = model_of(seed=2)
    with pytest.raises(StateError, match=r"checkpoint-6.*LosiaCallback\(trainer, checkpoint="):
        trainer_of(resumed, tmp_path / "b").train(resume_from_checkpoint=str(moved))
    trainer_of(resumed, tmp_path / "b", checkpoint=moved).train(resume_from_checkpoint=str(moved))
    assert_same(whole, resumed)

    # the state of another step, or of another run, does not belong to the weights
    wrong = tmp_path / "a" / "checkpoint-9"
    with pytest.raises(StateError, match="weights do not hold the subnets"):
        trainer_of(model_of(), tmp_path / "c", checkpoint=wrong).train(resume_from_checkpoint=str(moved))
    # and a damaged one is named
    contents = bytearray((moved / FILE).read_bytes())
    contents[-7] ^= 1
    (moved / FILE).write_bytes(contents)
    with pytest.raises(StateError, match=r"losia_state.safetensors: is damaged"):
        trainer_of(model_of(), tmp_path / "d", checkpoint=moved).train(resume_from_checkpoint=str(moved))


def test_without_the_callback_a_resume_is_not_silent(tmp_path: Path) -> None:
    trainer_of(model_of(), tmp_path, callback=False, max_steps=3).train()
    assert not (tmp_path / "checkpoint-3" / FILE).exists()
    with pytest.warns(LosiaWarning, match=r"losia_fx\.LosiaCallback"):
        trainer_of(model_of(), tmp_path, callback=False, max_steps=5).train(resume_from_checkpoint=True)


def test_the_trainer_reports_what_the_subnets_do(tmp_path: Path) -> None:
    model, seen = model_of(), Seen()
    trainer = trainer_of(model, tmp_path, save_strategy="no", logging_steps=2)
    trainer.callback_handler.callbacks.insert(0, seen)  # where reporters are: before the user's callbacks
    trainer.train()
    history = losia_fx.controller(model).history
    moves = [log for log in seen.logs if "losia/moved" in log]
    assert [(m["step"], m["losia/group"], m["losia/moved"], m["losia/captured"]) for m in moves] == [
        (event.step, event.group, event.moved, event.captured) for event in history
    ]
    active = {log["step"]: log["losia/active_group"] for log in seen.logs if "losia/active_group" in log}
    assert active == {2: 0, 4: 1, 6: 1, 8: 0, 10: 0}
    assert [log for log in trainer.state.log_history if "losia/moved" in log]
    assert [log["step"] for log in seen.logs if "loss" in log] == [2, 4, 6, 8, 10]  # the Trainer's own logs still come
    json.dumps(trainer.state.log_history)


def test_of_subnets_that_move_all_the_time_the_last_move_is_reported_with_the_trainers_own_logs(tmp_path: Path) -> None:
    torch.manual_seed(1)
    options = {**OPTIONS, "schedule": "all", "importance": "random", "period": 1}
    model, seen = losia_fx.transform(LossToy(layers=1), **options), Seen()
    trainer = trainer_of(model, tmp_path, save_strategy="no", logging_steps=4)
    trainer.callback_handler.callbacks.insert(0, seen)
    trainer.train()
    history = losia_fx.controller(model).history
    assert [event.step for event in history] == list(range(1, STEPS + 1))
    moves = [(log["step"], log["losia/group"], log["losia/moved"]) for log in seen.logs if "losia/moved" in log]
    assert moves == [(step, -1, history[step - 1].moved) for step in (4, 8)]


def test_of_a_head_that_moves_at_its_own_pace_the_last_move_is_reported_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    options = {**OPTIONS, "schedule": "all", "importance": "random", "period": 1, "head_rows": "mixed"}
    model, seen = losia_fx.transform(LossToy(layers=1), **options, head_period=3), Seen()
    trainer = trainer_of(model, tmp_path, save_strategy="no", logging_steps=4)
    trainer.callback_handler.callbacks.insert(0, seen)
    trainer.train()
    of_head = {event.step: event.captured for event in losia_fx.controller(model).history if event.group == 0}
    moves = [(log["step"], log["losia/group"], log.get("losia/captured")) for log in seen.logs if "losia/moved" in log]
    assert sorted(moves[:2]) == [(4, -1, None), (4, 0, of_head[3])]
    assert sorted(moves[2:]) == [(8, -1, None), (8, 0, of_head[6])]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = model_of()
    trainer = trainer_of(
        model,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.3,  # so large that the first checkpoints are the best
        save_total_limit=2,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.state.best_global_step < STEPS
    assert (best / FILE).is_file()
    for name, value in load_file(best / "model.safetensors").items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    for name, subnet in losia_fx.subnets(model).items():
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols]), name


def test_a_causal_language_model_with_nothing_else_said(tmp_path: Path) -> None:
    """Trainer(model=losia_fx.transform(model)): trains, evaluates, saves what from_pretrained loads."""
    torch.manual_seed(1)
    model = losia_fx.transform(tiny_llama(layers=1), compiler="eager", rank_factor=0.25, period=2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model, tmp_path, callback=False, max_steps=3, eval_strategy="steps", eval_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert any("eval_loss" in log for log in trainer.state.log_history)
    for folder in ("out", "checkpoint-3"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == set(losia_fx.subnets(model))
    shutil.rmtree(tmp_path / "out")
