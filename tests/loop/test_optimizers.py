"""Every optimizer that trains by gradients takes the path of the eager reference, in every form of its step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR, ReduceLROnPlateau

import losia_fx
from losia_fx import OptimizerError
from tests.support.optimizers import Passing
from tests.support.pair import PERIOD, Pair
from tests.support.toy_runs import learning, toy, train
from tests.support.toys import Toy, batch, loss_of

SLOW = pytest.mark.slow  # many such variants only add up


class Lion(Optimizer):
    """As people paste it: one momentum, the sign of an interpolation."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            one, two = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * 0.1)
                p.add_(state["exp_avg"].lerp(p.grad, 1 - one).sign_(), alpha=-group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - two)


def hf_adafactor(parameters: list[nn.Parameter], **options: Any) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, relative_step=False, scale_parameter=False, **options)


CASES: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "dampening": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": False}),
    "sgd fused": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adam": (optim.Adam, {"lr": 5e-3, "weight_decay": 0.1}),
    "amsgrad": (optim.Adam, {"lr": 5e-3, "amsgrad": True}),
    "adam fused": (optim.Adam, {"lr": 5e-3, "fused": True}),
    "adamw": (optim.AdamW, {"lr": 5e-3}),
    "adamw foreach": (optim.AdamW, {"lr": 5e-3, "foreach": True}),
    "adamw for-loop": (optim.AdamW, {"lr": 5e-3, "foreach": False}),
    "adamw fused": (optim.AdamW, {"lr": 5e-3, "fused": True, "weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "adagrad fused": (optim.Adagrad, {"lr": 0.05, "fused": True}),
    "adadelta": (optim.Adadelta, {"lr": 1.0}),
    "adamax": (optim.Adamax, {"lr": 5e-3}),
    "nadam": (optim.NAdam, {"lr": 5e-3}),
    "radam": (optim.RAdam, {"lr": 5e-3}),
    "rmsprop": (optim.RMSprop, {"lr": 1e-3, "momentum": 0.5, "centered": True}),
    "rprop": (optim.Rprop, {"lr": 1e-3}),
    "asgd": (optim.ASGD, {"lr": 0.1, "t0": 2.0}),
    "adafactor": (optim.Adafactor, {"lr": 1e-2}),
    "muon": (optim.Muon, {"lr": 1e-2}),
    "transformers' adafactor": (hf_adafactor, {"lr": 1e-2}),
    "lion": (Lion, {"lr": 1e-3}),
}


def maker(name: str) -> Callable[[list[nn.Parameter]], Optimizer]:
    kind, options = CASES[name]
    return lambda parameters: kind(parameters, **options)


QUICK = ("sgd fused", "dampening", "adamw", "adamw fused", "adagrad", "muon", "transformers' adafactor", "lion")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in CASES])
def test_optimizer(name: str) -> None:
    # Muon orthogonalizes in bfloat16: a last bit of float64 may turn a rounding
    Pair(maker(name), tolerance=1e-3 if name == "muon" else 1e-8).rounds()


def test_every_optimizer_of_torch_is_here() -> None:
    tried = {kind for kind, _ in CASES.values()}
    kinds = {kind for kind in vars(optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    assert kinds - tried == {Optimizer, optim.LBFGS, optim.SparseAdam}  # SparseAdam takes no dense gradients at all


def test_lbfgs_is_refused() -> None:
    model = toy()
    optimizer = optim.LBFGS(learning(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OptimizerError, match="LBFGS"):
        optimizer.step(lambda: loss_of(model, batch()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["adamw fused", "adagrad", *(pytest.param(n, marks=SLOW) for n in ("adamw", "nesterov"))]
)
def test_step_with_a_closure(name: str) -> None:
    pair = Pair(maker(name))
    for _ in pair.steps():
        ids = batch()

        def closure(ids: Tensor = ids) -> Tensor:
            pair.optimizer.zero_grad()
            loss = loss_of(pair.model, ids)
            loss.backward()
            return loss

        loss_of(pair.reference.model, ids).backward()
        pair.finish(lambda closure=closure: pair.optimizer.step(closure))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_clip_in_a_hook_of_the_optimizers_own(wrapped: bool) -> None:
    """Such hooks run after those of all optimizers: what they make of the gradients counts for the importance too."""
    make = maker("nesterov")
    pair = Pair(lambda parameters: Passing(make(parameters)) if wrapped else make(parameters))
    values = pair.values()

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(values, 0.05)

    getattr(pair.optimizer, "base", pair.optimizer).register_step_pre_hook(clip)
    for _ in pair.steps():
        for loss in pair.losses(batch()):
            loss.backward()
        pair.finish(clip_norm=0.05)


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("adamw foreach", "eager"),
        pytest.param("nesterov", "aot_eager", marks=SLOW),
        pytest.param("lion", "eager", marks=SLOW),
        pytest.param("adamw for-loop", "inductor", marks=SLOW),
    ],
)
def test_compiled_step(name: str, compiler: str) -> None:
    pair = Pair(maker(name), tolerance=1e-5)  # compiled, bias corrections come from a step count in float32
    pair.rounds(take=torch.compile(pair.optimizer.step, backend=compiler))


def test_groups_with_rates_of_their_own() -> None:
    """The head at a rate of its own, the others at theirs: also across re-selections and rewarming."""
    pair = Pair(maker("adamw"))
    head = pair.subnets["head.weight"].values
    others = [values for values in pair.values() if values is not head]
    pair.optimizer = optim.AdamW([{"params": others}, {"params": [head], "lr": 2e-2}], lr=5e-3)
    pair.rates = lambda name: 2e-2 if name == "head.weight" else 5e-3
    pair.rounds()


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "one cycle": lambda o: OneCycleLR(o, max_lr=2e-2, total_steps=20, cycle_momentum=False),
    "warm restarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=4),
    "cyclic": lambda o: CyclicLR(o, base_lr=1e-3, max_lr=1e-2, step_size_up=3, cycle_momentum=False),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=1, threshold=0.5),
}


@pytest.mark.parametrize("name", ["one cycle", *(pytest.param(n, marks=SLOW) for n in [*SCHEDULERS][1:])])
def test_scheduler(name: str) -> None:
    pair = Pair(maker("adamw"))
    scheduler = SCHEDULERS[name](pair.optimizer)
    rates = set()
    for _ in pair.steps():
        rates.add(pair.optimizer.param_groups[0]["lr"])
        pair.step()
        scheduler.step(*([3.0] if name == "plateau" else []))
    assert len(rates) > 2


def test_two_kinds_of_optimizers_on_one_model() -> None:
    pair = Pair(maker("adamw"))
    head = pair.subnets["head.weight"].values
    first = optim.AdamW([values for values in pair.values() if values is not head], lr=5e-3)
    second = optim.SGD([head], lr=0.1, momentum=0.9)
    of_head = pair.reference.weights["head.weight"]
    of_head.make = lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9)
    of_head.gather()
    pair.rates = lambda name: 0.1 if name == "head.weight" else 5e-3

    def both() -> None:
        first.step()
        second.step()

    pair.rounds(take=both)


def test_two_models_whose_steps_interleave() -> None:
    """Forwards of both, then one's backward and step, then the other's: as with a generator and its critic."""
    pairs = [Pair(maker("adamw"), seed=seed) for seed in (0, 1)]
    for _ in pairs[0].steps():
        losses = [pair.losses(batch()) for pair in pairs]
        for pair, both in zip(reversed(pairs), reversed(losses), strict=True):
            for loss in both:
                loss.backward()
            pair.finish()
    assert all(pair.controller.history for pair in pairs)


def test_one_loss_through_two_models() -> None:
    """A student's loss and a teacher's that learns too, one backward, one optimizer for both."""
    pairs = [Pair(maker("adamw"), seed=seed) for seed in (0, 1)]
    shared = optim.AdamW([values for pair in pairs for values in pair.values()], lr=5e-3)
    for _ in pairs[0].steps():
        ids = batch()
        for losses in zip(*(pair.losses(ids) for pair in pairs), strict=True):
            (losses[0] * losses[1]).backward()
        shared.step()
        for pair in pairs:
            pair.finish(lambda: None)


@pytest.mark.filterwarnings("ignore:losia_fx.*ran outside")
@pytest.mark.parametrize(
    "name",
    [
        *("nesterov", "adamw fused", "adagrad", "transformers' adafactor"),
        *(pytest.param(name, marks=SLOW) for name in ("sgd fused", "nadam", "adafactor")),
    ],
)
def test_a_state_that_lacks_entries_survives_saving(name: str) -> None:
    """Just after a re-selection, for each kind of state: what comes back steps to the bit as what was saved."""
    kind, options = CASES[name]
    one, two = toy(), toy()
    steps = [batch() for _ in range(2 * PERIOD)]
    first, second = kind(learning(one), **options), kind(learning(two), **options)
    with torch.compiler.set_stance("force_eager"):
        train(one, first, steps[:4])  # the period of these toys: the head's subnet has just moved
        two.load_state_dict(one.state_dict())
        losia_fx.load_state_dict(two, losia_fx.state_dict(one))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(one, first, steps[4:])
        train(two, second, steps[4:])
    for (key, value), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(value, other), key


def test_a_module_whose_parameters_learn_in_full_beside() -> None:
    """Norms named in trainable go their own way in the same optimizer."""
    torch.manual_seed(0)
    model = losia_fx.transform(Toy(layers=1).double(), compiler="eager", rank_factor=0.25, trainable=("*norm*",))
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    before = [norm.clone() for norm in norms]
    optimizer = optim.AdamW([{"params": norms, "weight_decay": 0.0}, {"params": [
        s.values for s in losia_fx.subnets(model).values()
    ]}], lr=1e-2)  # fmt: skip
    train(model, optimizer, [batch() for _ in range(3)])
    assert all(not torch.equal(a, b) for a, b in zip(before, norms, strict=True))
