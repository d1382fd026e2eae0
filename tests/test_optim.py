"""losia_fx.optim.SubnetRMS, in lockstep with the rule written over single numbers, and in the loops people have."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import losia_fx
from losia_fx import ConfigError, LosiaWarning, OptimizerError, StateError, TransformError
from losia_fx.optim import SubnetRMS
from tests.support.optimizers import Passing
from tests.support.reference import block_index
from tests.support.rms import Rule
from tests.support.toys import Toy, batch, loss_of

OPTIONS: dict[str, Any] = {
    "compiler": "eager", "rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "importance": "random",
    "trainable": ("norm",),
}  # fmt: skip
RULES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1, "beta2": 0.9, "eps": 1e-4},
}


def toy(dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return losia_fx.transform(Toy(layers=1).to(dtype), **{**OPTIONS, **options})


class Lockstep:
    """A transformed toy, and a plain one whose weights ``Rule`` changes at the places of the toy's subnets."""

    def __init__(self, options: dict[str, float], lr: float = 1e-2, **config: Any) -> None:
        torch.manual_seed(0)
        plain = Toy(layers=1).double()
        self.model = losia_fx.transform(copy.deepcopy(plain), **{**OPTIONS, "rewarm": False, **config})
        self.plain, self.subnets = plain.requires_grad_(True), losia_fx.subnets(self.model)
        self.optimizer = SubnetRMS(self.model, lr, **options)
        held = {"beta2": 0.99, "momentum": 0.0, "eps": 1e-8, "weight_decay": 0.0, **options}
        learning = [name for name, p in self.model.named_parameters() if p.requires_grad and "subnet" not in name]
        self.rules = {name: Rule(lr, **held) for name in (*self.subnets, *learning)}

    def places(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (subnet.rows.clone(), subnet.cols.clone()) for name, subnet in self.subnets.items()}

    @torch.no_grad()
    def follow(self, places: dict[str, tuple[Tensor, Tensor]]) -> None:
        """The rule's step at ``places``, and a fresh momentum where the subnet has moved since."""
        now = self.places()
        for name, rule in self.rules.items():
            weight, place = self.plain.get_parameter(name), places.get(name)
            assert weight.grad is not None
            index = ... if place is None else block_index(*place)
            weight[index] = rule.step(weight[index], weight.grad[index], place)
            if place is not None and not all(map(torch.equal, place, now[name])):
                rule.moved()

    def step(self) -> None:
        ids, places = batch(), self.places()
        for model in (self.model, self.plain):
            model.zero_grad()
            loss_of(model, ids).backward()
        self.optimizer.step()
        self.follow(places)
        for name in self.rules:
            torch.testing.assert_close(self.model.get_parameter(name), self.plain.get_parameter(name), msg=name)


@pytest.mark.parametrize("name", RULES)
def test_weights_are_those_of_the_rule_written_over_single_numbers(name: str) -> None:
    pair = Lockstep(RULES[name])
    before = pair.places()
    for _ in range(2 * 2 * 2 + 1):  # two rounds of two groups, and one more
        pair.step()
    assert len(losia_fx.controller(pair.model).history) == 4
    assert all(not torch.equal(rows, pair.places()[key][0]) for key, (rows, _) in before.items())


def test_without_momentum_it_keeps_vectors_alone() -> None:
    model = toy(trainable=())
    optimizer = SubnetRMS(model, 1e-2)
    for _ in range(3):
        loss_of(model, batch()).backward()
        optimizer.step()
    subnets = losia_fx.subnets(model)
    for subnet in subnets.values():
        state = optimizer.state[subnet.values]
        assert sorted(tuple(value.shape) for value in state.values()) == sorted(
            [(subnet.weight.shape[0],), (subnet.weight.shape[1],)] * 2
        )
    assert len(optimizer.state) == len(subnets)


def train(model: nn.Module, optimizer: SubnetRMS, batches: list[Tensor]) -> None:
    for ids in batches:
        loss_of(model, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_resumed_run_goes_on_to_the_bit(dtype: torch.dtype, momentum: float, tmp_path: Path) -> None:
    batches = [batch() for _ in range(9)]
    model = toy(dtype)
    optimizer = SubnetRMS(model, 1e-2, momentum=momentum)
    train(model, optimizer, batches[:4])
    torch.save((model.state_dict(), losia_fx.state_dict(model), optimizer.state_dict()), tmp_path / "saved")
    train(model, optimizer, batches[4:])
    other = toy(dtype, seed=1)
    again = SubnetRMS(other, 0.5, momentum=momentum)
    weights, losia, state = torch.load(tmp_path / "saved", weights_only=True)
    other.load_state_dict(weights)
    losia_fx.load_state_dict(other, losia)
    again.load_state_dict(state)
    train(other, again, batches[4:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_step_that_a_scaler_skips_leaves_no_trace_and_the_others_are_unscaled() -> None:
    pair = Lockstep({})
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for number in range(7):
        ids, places, overflows = batch(), pair.places(), number % 3 == 1
        for model in (pair.model, pair.plain):
            model.zero_grad()
        scaler.scale(loss_of(pair.model, ids) * (float("inf") if overflows else 1.0)).backward()
        loss_of(pair.plain, ids).backward()
        scaler.step(pair.optimizer)
        scaler.update()
        if not overflows:
            pair.follow(places)
    for name in pair.rules:
        torch.testing.assert_close(pair.model.get_parameter(name), pair.plain.get_parameter(name), msg=name)


def test_inside_another_optimizer_it_keeps_its_means_too() -> None:
    model = toy()
    optimizer = SubnetRMS(model, 1e-2, momentum=0.9)
    outer = Passing(optimizer)
    for _ in range(4):
        loss_of(model, batch()).backward()
        outer.step()
        outer.zero_grad()
    moved = [event.group for event in losia_fx.controller(model).history if event.step == 4]
    states = [optimizer.state[s.values] for s in losia_fx.subnets(model).values() if s.group in moved]
    assert states
    for state in states:
        assert not state["momentum"].any()
        assert state["step"] == 0
        assert state["row_visits"].sum() > 0


def test_a_copy_of_model_and_optimizer_trains_apart() -> None:
    model = toy()
    optimizer = SubnetRMS(model, 1e-2)
    train(model, optimizer, [batch()])
    other, again = copy.deepcopy((model, optimizer))
    ids = [batch() for _ in range(3)]
    train(model, optimizer, ids)
    train(other, again, ids)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_closure_is_called_and_its_loss_returned() -> None:
    model = toy()
    optimizer, ids = SubnetRMS(model, 1e-2), batch()
    before = {name: s.values.detach().clone() for name, s in losia_fx.subnets(model).items()}

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    assert all(not torch.equal(before[name], s.values) for name, s in losia_fx.subnets(model).items())


def test_a_scheduler_and_a_trainer_take_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    from tests.support.toys import tiny_llama

    def trained(folder: Path, steps: int, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = losia_fx.transform(tiny_llama(layers=1), **{**OPTIONS, "trainable": ()})
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 40, (32, 6))]
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=3, seed=1,
            report_to=[], disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=default_data_collator,
            optimizers=(SubnetRMS(model, 1e-2), None),
        )  # fmt: skip
        trainer.add_callback(losia_fx.LosiaCallback(trainer))
        trainer.train(resume_from_checkpoint=resume or None)
        return {name: value.clone() for name, value in model.state_dict().items()}

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers|torch.utils.data")
        whole = trained(tmp_path / "whole", 6)
        trained(tmp_path / "parts", 3)
        resumed = trained(tmp_path / "parts", 6, resume=True)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "1e-3"),
        ("beta2", 1.0),
        ("beta2", -0.1),
        ("momentum", 1.0),
        ("momentum", True),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("weight_decay", None),
    ],
)
def test_a_wrong_value_is_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{option}=.*give a number") as caught:
        SubnetRMS(toy(), **{"lr": 1e-3, option: value})
    assert repr(value) in str(caught.value)


def test_a_model_that_is_not_transformed_is_refused() -> None:
    with pytest.raises(TransformError, match=r"call losia_fx\.transform"):
        SubnetRMS(Toy(), 1e-3)


def test_parameters_in_place_of_the_model_are_refused() -> None:
    with pytest.raises(TypeError, match="give the transformed model itself"):
        SubnetRMS(toy().parameters(), 1e-3)  # type: ignore[arg-type]


def test_a_model_in_which_nothing_learns_is_refused() -> None:
    with pytest.raises(OptimizerError, match="nothing in Toy requires grad"):
        SubnetRMS(toy().requires_grad_(False), 1e-3)


def test_a_state_of_another_model_is_refused_by_name() -> None:
    model, other = toy(trainable=()), losia_fx.transform(Toy(layers=1, width=18), **{**OPTIONS, "trainable": ()})
    optimizer, again = SubnetRMS(model, 1e-2), SubnetRMS(other, 1e-2)
    loss_of(model, batch()).backward()
    optimizer.step()
    again.load_state_dict(optimizer.state_dict())
    loss_of(other, batch()).backward()
    with (
        pytest.warns(LosiaWarning, match="Load the LoSiA state too"),
        pytest.raises(StateError, match="loaded state of"),
    ):
        again.step()


def test_a_state_of_another_optimizer_is_refused_and_nothing_loaded() -> None:
    model = toy()
    optimizer = SubnetRMS(model, 1e-2)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with pytest.raises(StateError, match="another optimizer than SubnetRMS: its groups have no beta2, momentum"):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_sparse_gradient_is_refused() -> None:
    model = Toy(layers=1)
    model.embed.sparse = True
    losia_fx.transform(model, **{**OPTIONS, "trainable": ("embed",)})
    optimizer = SubnetRMS(model, 1e-2)
    loss_of(model, batch()).backward()
    with pytest.raises(OptimizerError, match="sparse=False"):
        optimizer.step()
