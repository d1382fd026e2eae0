"""Averages of weights, by every common tool: the validation forward uses them, and training goes on as without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import DataLoader

import losia_fx
from losia_fx import LosiaWarning
from tests.support.toys import Toy, batch, tiny_llama
from tests.support.twin import (
    Twin,
    assert_one,
    backward,
    close,
    logits,
    loss_of,
    subnets_of,
    twins,
    values_of,
    warned,
    zero,
)

pytestmark = pytest.mark.filterwarnings("error::losia_fx.LosiaWarning")

DECAY = 0.75  # exact in float32: ema_pytorch computes it there
MOVING: dict[str, Any] = {"schedule": "async", "importance": "random", "period": 3, "rewarm": False}
"""Every third step another group moves."""
STEPS = 8


def adamw(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


class Run:
    """A model and its twin under followed training; ``each`` is called after every step."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        self.model, self.twin = twins(model, **options)
        self.optimizers = adamw(values_of(self.model)), adamw(self.twin.parameters())
        self.moved: list[str] = []

    def train(self, steps: int = STEPS, each: Callable[[], Any] = lambda: None) -> None:
        for _ in range(steps):
            zero(self.model, self.twin)
            backward(self.model, self.twin)
            for optimizer in self.optimizers:
                optimizer.step()
            self.moved += self.twin.follow(subnets_of(self.model), self.optimizers[1])
            each()


def assert_sees(model: Any, weights: dict[str, Tensor], twin: Twin, gradients: bool = False) -> None:
    """``model`` computes as a plain one with these weights."""
    plain, ids = twin.solid(), batch()
    plain.load_state_dict(weights, strict=False)
    with torch.set_grad_enabled(gradients):
        close(logits(model(ids)).detach(), logits(plain(ids)), 1e-9, "logits")


class Average:
    """An exponential average of whole weights by name: what each tool is to come to."""

    def __init__(self, twin: Twin, decay: float = DECAY) -> None:
        self.twin, self.decay = twin, decay
        self.weights = {name: weight.detach().clone() for name, weight in twin.weights().items()}

    def update(self) -> None:
        for name, weight in self.twin.weights().items():
            self.weights[name].lerp_(weight.detach(), 1 - self.decay)


# -- diffusers -----------------------------------------------------------------------------------------------------


def ema_model(parameters: Iterable[nn.Parameter], foreach: bool) -> Any:
    training_utils = pytest.importorskip("diffusers.training_utils")
    return training_utils.EMAModel(list(parameters), decay=DECAY, foreach=foreach)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("of", ["parameters", "what learns"])
def test_diffusers_ema(of: str, foreach: bool) -> None:
    """As its training scripts have it: step; store, copy_to, validation, restore; at the end copy_to and saving."""
    run = Run()
    held = list(run.model.parameters()) if of == "parameters" else values_of(run.model)
    mine, expected = ema_model(held, foreach), ema_model(run.twin.parameters(), foreach)

    def each() -> None:
        mine.step(held)
        expected.step(run.twin.parameters())

    for _ in range(3):
        run.train(3, each)
        mine.store(held)
        mine.copy_to(held)
        expected.store(run.twin.parameters())
        expected.copy_to(run.twin.parameters())
        assert_sees(run.model, run.twin.weights(), run.twin)
        mine.restore(held)
        expected.restore(run.twin.parameters())
    assert_one(run.model, run.twin)
    run.train(2, each)
    mine.copy_to(held)
    expected.copy_to(run.twin.parameters())
    state = run.model.state_dict()  # nothing has run since
    for name, weight in run.twin.weights().items():
        close(state[name], weight.detach(), 1e-9, name)


# -- torch, ema_pytorch: averages in copies of the model -----------------------------------------------------------


def averaged(model: nn.Module, kind: str) -> tuple[Any, Callable[[], None]]:
    """A copy that averages, and its update."""
    if kind == "ema_pytorch":
        ema_pytorch = pytest.importorskip("ema_pytorch")
        # its power is such that the decay is at its bound from the first update on
        mine = ema_pytorch.EMA(model, beta=DECAY, min_value=DECAY, update_after_step=-1, update_every=1)
        mine.initted.fill_(True)
        return mine, mine.update
    swa = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=kind == "with buffers")
    swa.update_parameters(model)
    return swa, lambda: swa.update_parameters(model)


KINDS = ("torch", "with buffers", "ema_pytorch")


@pytest.mark.parametrize("options", [{}, MOVING], ids=["still", "moving"])
@pytest.mark.parametrize("kind", KINDS)
def test_averaged_copies(kind: str, options: dict[str, Any]) -> None:
    """Also where subnets move: the average of W by name is right, whatever has become of the copy's S."""
    run = Run(**options)
    mine, update = averaged(run.model, kind)
    expected = Average(run.twin)

    def each() -> None:
        update()
        expected.update()
        assert_sees(mine, expected.weights, run.twin)
        assert_sees(mine, expected.weights, run.twin, gradients=True)

    run.train(each=each)
    assert bool(run.moved) == bool(options)
    inner = mine.ema_model if kind == "ema_pytorch" else mine.module
    state = inner.state_dict()
    for name, weight in expected.weights.items():
        close(state[name], weight, 1e-9, name)
    assert_one(run.model, run.twin)


@pytest.mark.parametrize("options", [{}, MOVING], ids=["still", "moving"])
def test_training_goes_on_from_an_average(options: dict[str, Any]) -> None:
    """The copy's weights are what it starts from, not the averages of its subnets."""
    run = Run(**options)
    mine, update = averaged(run.model, "torch")
    run.train(each=update)
    start = {name: value.clone() for name, value in mine.module.state_dict().items()}
    again = Twin(run.twin.solid(), subnets_of(mine.module))
    again.plain.load_state_dict(start)
    for name in again.values:
        again.write(name, start[name])
    optimizers = adamw(values_of(mine.module)), adamw(again.parameters())
    for _ in range(3):
        zero(mine.module, again)
        backward(mine.module, again)
        for optimizer in optimizers:
            optimizer.step()
        again.follow(subnets_of(mine.module), optimizers[1])
    assert_one(mine.module, again)


def test_stochastic_weight_averaging_in_bfloat16() -> None:
    """The average of a narrow W is not the rounded average of its wide S: in a copy W counts, without an error."""
    model, _ = twins(Toy(layers=1).bfloat16(), **MOVING)
    mine = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    plain = AveragedModel(losia_fx.restore(copy.deepcopy(model)), multi_avg_fn=get_swa_multi_avg_fn())
    optimizer = adamw(values_of(model))
    for _ in range(STEPS):
        model.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
        mine.update_parameters(model)
        plain.update_parameters(losia_fx.restore(copy.deepcopy(model)))
        ids = batch()
        with torch.no_grad():
            assert torch.equal(mine(ids), plain(ids))


@pytest.mark.parametrize("options", [{}, MOVING], ids=["still", "moving"])
@pytest.mark.parametrize("first", ["transformed copy", "plain model"])
def test_a_target_network(first: str, options: dict[str, Any]) -> None:
    """Polyak's soft update, as reinforcement learning has it: by position where both have subnets, else by name."""
    run = Run(**options)
    target = copy.deepcopy(run.model) if first == "transformed copy" else run.twin.solid()
    expected = Average(run.twin)

    def pairs() -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        if first == "transformed copy":
            return zip(target.parameters(), run.model.parameters(), strict=True)
        fast = dict(run.model.named_parameters())
        return ((slow, fast[name]) for name, slow in target.named_parameters())

    def each() -> None:
        for slow, fast in pairs():
            slow.data.copy_(DECAY * slow.data + (1 - DECAY) * fast.data)
        expected.update()
        assert_sees(target, expected.weights, run.twin)

    run.train(each=each)
    assert_one(run.model, run.twin)


# -- by hand -------------------------------------------------------------------------------------------------------


def swap_by_loading(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights)


def swap_in_place(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        value.copy_(weights[name])


@torch.no_grad()
def swap_by_name(model: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def swap_data(model: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].data.copy_(weight)


@pytest.mark.parametrize("options", [{}, MOVING], ids=["still", "moving"])
@pytest.mark.parametrize("swap", [swap_by_loading, swap_in_place, swap_by_name, swap_data])
def test_an_average_of_the_state_dict(swap: Callable[..., None], options: dict[str, Any]) -> None:
    """Swapped in for validation every other step, and out again."""
    run = Run(**options)
    average = {name: value.clone() for name, value in run.model.state_dict().items()}
    expected = Average(run.twin)
    count = 0

    def each() -> None:
        nonlocal count
        count += 1
        for name, value in run.model.state_dict().items():
            average[name].lerp_(value, 1 - DECAY)
        expected.update()
        if count % 2 == 0:
            backup = {name: value.clone() for name, value in run.model.state_dict().items()}
            swap(run.model, average)
            assert_sees(run.model, expected.weights, run.twin)
            swap(run.model, backup)

    run.train(each=each)
    assert_one(run.model, run.twin)


class Shadow:
    """An average of S alone, as hand-made classes over what requires grad keep it; swapped in three ways."""

    def __init__(self, parameters: Iterable[nn.Parameter], how: str) -> None:
        self.parameters, self.how = [p for p in parameters if p.requires_grad], how
        self.average = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        for mean, parameter in zip(self.average, self.parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - DECAY)

    def swap(self) -> None:
        """The average in, what was there out; or back."""
        for number, parameter in enumerate(self.parameters):
            mean = self.average[number]
            if self.how == "swapped storages":
                parameter.data, self.average[number] = mean, parameter.data
            else:
                held = parameter.detach().clone()
                if self.how == "data":
                    parameter.data.copy_(mean)
                else:
                    with torch.no_grad():
                        parameter.copy_(mean)
                mean.copy_(held)


@pytest.mark.parametrize("how", ["no_grad", "data", "swapped storages"])
def test_an_average_of_what_learns(how: str) -> None:
    run = Run()
    mine, expected = Shadow(run.model.parameters(), how), Shadow(run.twin.parameters(), how)
    count = 0

    def each() -> None:
        nonlocal count
        count += 1
        for shadow in (mine, expected):
            shadow.update()
        if count % 2 == 0:
            for shadow in (mine, expected):
                shadow.swap()
            assert_sees(run.model, run.twin.weights(), run.twin)
            for shadow in (mine, expected):
                shadow.swap()

    run.train(each=each)
    assert_one(run.model, run.twin)


def test_an_average_of_checkpoints() -> None:
    """A soup: the mean of what three moments saved, loaded at the end; training could go on from it."""
    run = Run(**MOVING)
    saved: list[dict[str, Tensor]] = []
    expected: list[dict[str, Tensor]] = []
    for _ in range(3):
        run.train(3)
        saved.append({name: value.clone() for name, value in run.model.state_dict().items()})
        expected.append({name: weight.detach().clone() for name, weight in run.twin.weights().items()})
    run.model.load_state_dict({name: sum(each[name] for each in saved) / 3 for name in saved[0]})
    for name in run.twin.values:
        run.twin.write(name, sum(each[name] for each in expected) / 3)
    assert_one(run.model, run.twin)
    run.train(4)
    assert_one(run.model, run.twin)


# -- averages that cannot be right: S by place over a re-selection -------------------------------------------------


def saved(model: nn.Module, folder: Path) -> None:
    model.state_dict()


def evaluated(model: nn.Module, folder: Path) -> None:
    with torch.no_grad():
        model(batch())


def delta(model: nn.Module, folder: Path) -> None:
    losia_fx.save_delta(model, folder / "delta")


@pytest.mark.parametrize("how", ["no_grad", "data", "diffusers"])
@pytest.mark.parametrize("use", [evaluated, saved, delta])
def test_an_average_of_places_that_have_moved_is_said_once(use: Any, how: str, tmp_path: Path) -> None:
    run = Run(**MOVING, track_delta=True)
    if how == "diffusers":
        held = list(run.model.parameters())
        average = ema_model(held, False)
        update, swap_in, swap_out = (
            lambda: average.step(held),
            lambda: (average.store(held), average.copy_to(held)),
            lambda: average.restore(held),
        )
    else:
        shadow = Shadow(run.model.parameters(), how)
        update, swap_in, swap_out = shadow.update, shadow.swap, shadow.swap
    run.train(4, update)
    assert run.moved
    said: list[str] = []
    for _ in range(2):
        with warned() as now:
            swap_in()
            use(run.model, tmp_path)
            swap_out()
        said += now
    assert len(said) == 1, said
    assert "state_dict" in said[0]
    assert_one(run.model, run.twin)  # and what was swapped back is as it was


USES_BEFORE: dict[str, Callable[[nn.Module], Any]] = {
    "report": losia_fx.report,
    "subnets": lambda model: [subnet.values for subnet in losia_fx.subnets(model).values()],
    "a weight": lambda model: next(iter(losia_fx.subnets(model).values())).weight,
}


@pytest.mark.parametrize("first", USES_BEFORE)
@pytest.mark.parametrize("use", [evaluated, saved])
def test_an_average_is_said_whatever_looks_at_the_model_first(first: str, use: Any, tmp_path: Path) -> None:
    run = Run(**MOVING)
    shadow = Shadow(run.model.parameters(), "data")
    run.train(4, shadow.update)
    with warned() as said:
        shadow.swap()
        USES_BEFORE[first](run.model)
        use(run.model, tmp_path)
    assert len(said) == 1, said
    assert "begun before they moved" in said[0]


def test_an_average_is_said_of_a_model_that_is_restored_with_it() -> None:
    run = Run(**MOVING)
    shadow = Shadow(run.model.parameters(), "data")
    run.train(4, shadow.update)
    shadow.swap()
    with warned() as said:
        losia_fx.restore(run.model)
    assert len(said) == 1, said
    assert "begun before they moved" in said[0]


def test_an_average_of_places_that_have_not_moved_is_not_said() -> None:
    """Before the first re-selection there is nothing to warn of."""
    run = Run(**{**MOVING, "period": 5})
    shadow, expected = Shadow(run.model.parameters(), "data"), Shadow(run.twin.parameters(), "data")
    run.train(4, lambda: (shadow.update(), expected.update()))
    assert not run.moved
    shadow.swap()
    expected.swap()
    assert_one(run.model, run.twin)


def test_an_average_copied_back_over_moved_subnets_is_right_or_said() -> None:
    """ema_pytorch's update_model_with_ema writes the averages of W, which are right, and of S, which are not."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    run = Run(**MOVING)
    mine = ema_pytorch.EMA(run.model, beta=DECAY, min_value=DECAY, update_after_step=-1, update_every=1)
    mine.initted.fill_(True)
    expected = Average(run.twin)
    run.train(4, lambda: (mine.update(), expected.update()))
    assert run.moved
    mine.update_model_with_ema()
    try:
        assert_sees(run.model, expected.weights, run.twin)
    except (losia_fx.StateError, LosiaWarning) as said:
        print(said)


def test_an_average_copied_back_over_still_subnets_is_followed() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    run = Run()
    mine = ema_pytorch.EMA(run.model, beta=DECAY, min_value=DECAY, update_after_step=-1, update_every=1)
    mine.initted.fill_(True)
    expected = Average(run.twin)
    for _ in range(2):
        run.train(3, lambda: (mine.update(), expected.update()))
        mine.update_model_with_ema()
        for name, weight in expected.weights.items():
            run.twin.write(name, weight)
        assert_one(run.model, run.twin)


# -- schedule-free -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, MOVING], ids=["still", "moving"])
@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free(kind: str, options: dict[str, Any]) -> None:
    """eval() moves S to the average, train() back: evaluation and saving in between see the average."""
    make = getattr(pytest.importorskip("schedulefree"), kind)
    run = Run(**options)
    run.optimizers = tuple(make(p, lr=0.05) for p in (values_of(run.model), run.twin.parameters()))
    for round_number in range(3):
        for optimizer in run.optimizers:
            optimizer.train()
        run.train(4)
        for optimizer in run.optimizers:
            optimizer.eval()
        if round_number == 1:
            state = run.model.state_dict()
            for name, weight in run.twin.weights().items():
                close(state[name], weight.detach(), 1e-9, name)
        assert_one(run.model, run.twin)
    assert losia_fx.controller(run.model).step == 12


@pytest.mark.parametrize("of_package", ["schedulefree", "pytorch_optimizer"])
def test_a_weight_that_schedule_free_moved_is_nobody_elses(of_package: str) -> None:
    """Evaluated in both modes, with subnets that have moved: none of that is an average of somebody's."""
    package = pytest.importorskip(of_package)

    def make(parameters: list[nn.Parameter]) -> Any:
        if of_package == "schedulefree":
            return package.AdamWScheduleFree(parameters, lr=0.05)
        return package.ScheduleFreeWrapper(torch.optim.SGD(parameters, lr=0.05))

    run = Run(**MOVING)
    optimizer = make(values_of(run.model))
    for _ in range(8):
        optimizer.train()
        run.model.zero_grad()
        loss_of(run.model, batch()).backward()
        optimizer.step()
        for mode in (optimizer.eval, optimizer.train):
            mode()
            found = values_of(run.model)[0].detach().clone()
            name = next(iter(subnets_of(run.model)))
            subnet = subnets_of(run.model)[name]
            close(run.model.state_dict()[name][subnet.rows][:, subnet.cols], found, 1e-12, name)
        optimizer.eval()
        losia_fx.report(run.model)  # in the one mode, and what is saved in the other
        optimizer.train()
        run.model.state_dict()
    assert losia_fx.controller(run.model).history


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_averages_that_a_count_of_all_steps_corrects(moving: bool) -> None:
    """SPlus: its eval() is right while no subnet moves. Where one does, its average starts anew: that is said, once."""
    splus: Any = pytest.importorskip("pytorch_optimizer").SPlus
    model, _ = twins(**(MOVING if moving else {}))
    optimizer = splus(values_of(model), lr=0.001)
    with warned() as said:
        for _ in range(7):
            model.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()
    if moving:
        assert len(said) == 1, said
        assert "SPlus keeps averages" in said[0]
        return
    averages = {
        name: optimizer.state[subnet.values]["ema"] / (1 - 0.999**7) for name, subnet in subnets_of(model).items()
    }
    optimizer.eval()
    whole = model.state_dict()
    for name, subnet in subnets_of(model).items():
        close(whole[name][subnet.rows][:, subnet.cols], averages[name], 1e-9, name)
    assert not said


def test_a_schedule_free_checkpoint_goes_on(tmp_path: Path) -> None:
    """Saved in eval mode, as its readme asks, and loaded into a model and an optimizer made anew."""
    schedulefree = pytest.importorskip("schedulefree")

    def made(seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model, _ = twins(**{**MOVING, "rewarm": True})
        return model, schedulefree.AdamWScheduleFree(values_of(model), lr=0.05)

    def trained(model: nn.Module, optimizer: Any, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.train()
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()
        optimizer.eval()

    whole, optimizer = made(1)
    trained(whole, optimizer, 4, seed=5)
    torch.save((whole.state_dict(), optimizer.state_dict(), losia_fx.state_dict(whole)), tmp_path / "saved")
    trained(whole, optimizer, 4, seed=6)
    resumed, other = made(2)
    weights, moments, state = torch.load(tmp_path / "saved", weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(moments)
    losia_fx.load_state_dict(resumed, state)
    trained(resumed, other, 4, seed=6)
    for (name, value), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        close(value, expected, 1e-12, name)


def test_the_slow_weights_of_a_lookahead() -> None:
    """pytorch_optimizer's backup_and_load_cache evaluates the slow weights; clear_and_load_backup goes on."""
    package = pytest.importorskip("pytorch_optimizer")
    run = Run()
    run.optimizers = tuple(package.Lookahead(o, k=2, alpha=0.5) for o in run.optimizers)
    for _ in range(3):
        run.train(3)
        for optimizer in run.optimizers:
            optimizer.backup_and_load_cache()
        assert_sees(run.model, run.twin.weights(), run.twin)
        for optimizer in run.optimizers:
            optimizer.clear_and_load_backup()
    assert_one(run.model, run.twin)


# -- Lightning -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lightnings_weight_averaging(tmp_path: Path) -> None:
    """It swaps all parameters and buffers with an averaged copy's around each validation."""
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    run = Run(tiny_llama(layers=1).double())
    expected = Average(run.twin)
    seen: list[int] = []
    batches = [DataLoader([batch() for _ in range(count)], batch_size=None) for count in (6, 1)]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model

        def training_step(self, ids: Tensor) -> Tensor:
            return loss_of(self.model, ids)

        def on_train_batch_end(self, outputs: Any, ids: Tensor, number: int) -> None:
            run.optimizers[1].zero_grad()
            loss_of(run.twin, ids).backward()
            run.optimizers[1].step()
            if self.trainer.global_step == 1:  # its first average is a copy
                expected.decay = 0.0
            expected.update()
            expected.decay = DECAY

        def validation_step(self, ids: Tensor) -> None:
            if not self.trainer.sanity_checking:
                assert_sees(self.model, expected.weights, run.twin)
                seen.append(self.trainer.global_step)

        def configure_optimizers(self) -> Any:
            return run.optimizers[0]

    averaging = callbacks.WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path), callbacks=[averaging],
    )  # fmt: skip
    trainer.fit(Module(), *batches)
    assert seen == [6, 12]
    for name, weight in expected.weights.items():  # at the end the averages are left in the model
        close(run.model.state_dict()[name], weight, 1e-9, name)
