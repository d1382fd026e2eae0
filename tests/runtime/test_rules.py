"""The rules beside the paper's, in lockstep with an eager LoSiA of the tests' own (tests/support/rules.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losia_fx
from losia_fx import LosiaError, StateError
from losia_fx._compat import CompilerFailed
from losia_fx.method.schedule import profiled_groups
from tests.support.rules import Options, Rules
from tests.support.toys import VOCABULARY, Toy, batch, by_string, tiny_llama
from tests.support.toys import loss_of as loss_of_ids
from tests.support.twin import warned

PERIOD = 3
SIZES: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "output_rank_factor": 0.25, "period": PERIOD}


class Labelled(Toy):
    """Takes labels by name, and gives their loss."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(ids)
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def labelled_batch() -> tuple[Tensor, Tensor]:
    ids = batch()
    labels = torch.randint(0, VOCABULARY, ids.shape) ** 2 % VOCABULARY  # some far more often than others
    labels[:, 0] = -100
    return ids, labels


class Pair:
    """A transformed model and the rules beside it, in float64. micro: micro-batches a step."""

    def __init__(self, options: Options, micro: int = 1, **config: Any) -> None:
        torch.manual_seed(0)
        plain = Labelled(layers=2).double()
        given = {**SIZES, "schedule": options.schedule, "importance": options.importance, **config}
        self.model = losia_fx.transform(copy.deepcopy(plain), **given)
        self.controller, self.subnets = losia_fx.controller(self.model), losia_fx.subnets(self.model)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learning, options.lr, options.betas, options.eps)
        places = {name: self.place(name) for name in self.subnets}
        generator = torch.Generator().manual_seed(0)
        generator.set_state(self.controller.state_dict()["generator"])
        self.rules = Rules(
            plain, places, self.controller.groups, options, self.place,
            lambda count: torch.rand(count, generator=generator, dtype=torch.float64),
        )  # fmt: skip
        self.micro = micro

    def place(self, name: str) -> tuple[Tensor, Tensor]:
        return self.subnets[name].rows.clone(), self.subnets[name].cols.clone()

    def step(self) -> None:
        for _ in range(self.micro):
            ids, labels = labelled_batch()
            for model in (self.model, self.rules.model):
                (model(ids, labels=labels) / self.micro).backward()
            self.rules.count(labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rules.step()

    def assert_same(self) -> None:
        for name, subnet in self.rules.subnets.items():
            assert torch.equal(self.subnets[name].rows, subnet.rows), name
            assert torch.equal(self.subnets[name].cols, subnet.cols), name
            torch.testing.assert_close(
                self.model.get_parameter(name), self.rules.model.get_parameter(name), msg=lambda m, n=name: f"{n}: {m}"
            )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.assert_same()


CASES: dict[str, tuple[Options, dict[str, Any]]] = {
    "all, random": (Options(PERIOD, "all"), {}),
    "all, random, every step": (Options(1, "all"), {"period": 1}),
    "all, random, rewarmed": (Options(PERIOD, "all", rewarm_steps=2), {"rewarm_steps": 2}),
    "all, visits": (Options(PERIOD, "all", "visits"), {}),
    "async, visits": (Options(PERIOD, "async", "visits", rewarm_steps=PERIOD), {}),
    "all, sample": (Options(PERIOD, "all", "sample"), {}),
    "async, sample": (Options(PERIOD, "async", "sample", rewarm_steps=PERIOD), {}),
    "async, random, a rewarm of its own": (Options(PERIOD, rewarm_steps=5), {"rewarm_steps": 5}),
    "all, head by labels": (Options(PERIOD, "all", head="head.weight"), {"head_rows": "frequent"}),
    "async, head by labels": (
        Options(PERIOD, "async", "visits", rewarm_steps=PERIOD, head="head.weight"),
        {"head_rows": "frequent"},
    ),
    "every step, head by importance at its own pace": (
        Options(1, "all", head="head.weight", head_slot=(4, 2)),
        {"period": 1, "head_rows": "gradient", "head_period": 4, "profile_steps": 2},
    ),
    "all, head by importance beside sums": (
        Options(PERIOD, "all", "visits", head="head.weight", head_slot=(5, 5)),
        {"head_rows": "gradient", "head_period": 5},
    ),
    "all, moments carried": (Options(PERIOD, "all", carry=True), {"carry_moments": True}),
    "all, every step, moments carried": (Options(1, "all", carry=True), {"carry_moments": True, "period": 1}),
    "async, moments carried": (
        Options(PERIOD, "async", "visits", rewarm_steps=PERIOD, carry=True),
        {"carry_moments": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_cols_and_weights_are_those_of_the_rules(name: str) -> None:
    options, config = CASES[name]
    pair = Pair(options, micro=2, **config)
    pair.run(2 * 3 * PERIOD + 1)  # two rounds of three groups, and one more
    assert pair.controller.history


def test_a_head_that_has_counted_amid_a_slot_is_an_event_of_its_own() -> None:
    pair = Pair(Options(PERIOD, "all"), head_rows="frequent", count_steps=PERIOD - 1)
    for _ in range(PERIOD):
        ids, labels = labelled_batch()
        pair.model(ids, labels=labels).backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()
    assert [(event.step, event.group) for event in pair.controller.history] == [(PERIOD - 1, 0), (PERIOD, None)]


def test_a_head_with_an_importance_of_its_own_is_an_event_of_its_own() -> None:
    options, config = CASES["every step, head by importance at its own pace"]
    pair = Pair(options, **config)
    pair.run(4)
    events = [(event.step, event.group, event.captured is None) for event in pair.controller.history]
    assert events == [(1, None, True), (2, None, True), (3, None, True), (4, 0, False), (4, None, True)]
    assert [profiled_groups(pair.controller.config, 3, step, 0) for step in range(5)] == [(), (), (0,), (0,), ()]


def test_a_group_that_is_drawn_by_hand_says_what_has_moved() -> None:
    """It said nan: where nothing is scored nobody has waited for it."""
    pair = Pair(Options(PERIOD, "all"))
    event = pair.controller.select(1)
    assert event == pair.controller.history[-1]
    assert 0 < event.moved <= 1


def test_a_round_of_all_groups_is_one_event_with_what_has_moved() -> None:
    pair = Pair(Options(PERIOD, "all"))
    before = {name: pair.place(name) for name in pair.subnets}
    pair.run(PERIOD)
    (event,) = pair.controller.history
    assert (event.step, event.group, event.captured) == (PERIOD, None, None)
    new, elements = 0.0, 0
    for name, subnet in pair.subnets.items():
        rows, cols = (set(old.tolist()) for old in before[name])
        kept = sum(r in rows for r in subnet.rows.tolist()) * sum(c in cols for c in subnet.cols.tolist())
        new, elements = new + subnet.values.numel() - kept, elements + subnet.values.numel()
    assert event.moved == pytest.approx(new / elements)
    assert pair.controller.active is None


def test_sampling_takes_indices_in_proportion_to_their_sums() -> None:
    from losia_fx.method.sums import in_proportion

    sums = torch.tensor([1.0, 2.0, 0.0, 5.0])
    generator = torch.Generator().manual_seed(0)
    picked = torch.stack([in_proportion(sums, generator).argmax() for _ in range(4000)])
    shares = torch.bincount(picked, minlength=4) / 4000
    torch.testing.assert_close(shares, sums.cpu() / 8, atol=0.03, rtol=0.0)
    keys = in_proportion(sums, generator)
    assert keys.argsort(descending=True)[-1] == 2


def test_a_sampled_subnet_lies_where_gradients_are() -> None:
    """Half of the inputs are zero: no column of theirs has a sum, and none is drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 8, bias=False))
    losia_fx.transform(
        model, target=("0",), rank_factor=0.25, schedule="all", importance="sample", period=2, compiler="eager"
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    subnet = losia_fx.subnets(model)["0.weight"]
    for _ in range(4):
        x = torch.randn(5, 16)
        x[:, 8:] = 0
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert subnet.cols.max() < 8
    assert len(losia_fx.controller(model).history) == 2


# -- the head's rows --------------------------------------------------------------------------------------------------


def head_of(model: nn.Module) -> losia_fx.Subnet:
    return next(s for name, s in losia_fx.subnets(model).items() if "head" in name)


def train(model: nn.Module, steps: int, **optimizer: Any) -> None:
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        ids = batch()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()


@pytest.mark.parametrize(("how", "moves"), [("fixed", []), ("random", [3, 12]), ("importance", [3, 12])])
def test_how_the_heads_rows_are_chosen(how: str, moves: list[int]) -> None:
    model = losia_fx.transform(tiny_llama(), **SIZES, head_rows=how)
    first = head_of(model).rows.clone()
    train(model, 4 * PERIOD)
    events = [event for event in losia_fx.controller(model).history if event.group == 0]
    assert [event.step for event in events] == moves
    assert torch.equal(first, head_of(model).rows) is (how == "fixed")
    assert [event.captured is None for event in events] == [how != "importance"] * len(moves)


def test_labels_are_counted_for_so_many_steps_and_input_ids_stand_for_them() -> None:
    model = losia_fx.transform(tiny_llama(), **SIZES, head_rows="frequent", count_steps=2)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    counts = torch.zeros(VOCABULARY, dtype=torch.int64)
    for number in range(4):
        ids = batch()
        with torch.no_grad():
            model(input_ids=ids)  # nothing learns: not counted
        counts += torch.bincount(ids.flatten(), minlength=VOCABULARY) * (number < 2)
        logits = model(input_ids=ids).logits
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        adam.step()
        adam.zero_grad()
    expected = torch.sort(counts, descending=True, stable=True).indices[:10].sort().values
    assert torch.equal(head_of(model).rows, expected)
    assert [event.step for event in losia_fx.controller(model).history if event.group == 0] == [2]


def test_a_forward_without_labels_is_refused_by_name() -> None:
    model = losia_fx.transform(Toy(), **SIZES, head_rows="frequent")
    with pytest.raises(LosiaError, match=r"forward of Toy was given neither labels nor input_ids.*pass one of them"):
        loss_of_ids(model, batch())
    with torch.no_grad():
        model(batch())


def test_labels_of_a_step_that_a_scaler_leaves_out_count_with_the_next() -> None:
    model = losia_fx.transform(tiny_llama(layers=1), **SIZES, head_rows="frequent", count_steps=2)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(3):
        ids = torch.full((2, 6), number)
        loss = model(input_ids=ids, labels=ids).loss * (float("inf") if number == 0 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(adam)
        scaler.update()
        adam.zero_grad()
    head = next(state for state in losia_fx.controller(model).states if state.whole_cols)
    assert losia_fx.controller(model).step == 2
    assert head.label_counts is not None
    assert head.label_counts[:4].tolist() == [12, 12, 12, 0]


def test_labels_that_the_string_way_does_not_see_are_refused() -> None:
    model = by_string(tiny_llama(layers=1), head_rows="frequent")
    ids = batch()
    with pytest.raises(CompilerFailed, match=r'head_rows="frequent" counts the labels.*call losia_fx\.transform'):
        model(input_ids=ids, labels=ids)


def test_where_no_head_learns_nothing_is_counted() -> None:
    model = losia_fx.transform(Toy(), **{**SIZES, "output_rank_factor": 0.0}, head_rows="frequent")
    loss_of_ids(model, batch()).backward()


# -- state ------------------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "roaming": {"schedule": "all", "importance": "random", "period": 1, "head_rows": "frequent", "count_steps": 4},
    "own head": {
        "schedule": "all",
        "importance": "random",
        "period": 1,
        "head_rows": "mixed",
        "head_period": 4,
        "profile_steps": 3,
    },
    "visits": {"schedule": "all", "importance": "visits"},
    "sample": {"importance": "sample", "head_rows": "random"},
    "carried": {"schedule": "all", "importance": "random", "carry_moments": True, "head_rows": "frequent"},
}


@pytest.mark.parametrize(
    "name",
    ["roaming", "own head", "carried", *(pytest.param(name, marks=pytest.mark.slow) for name in ("visits", "sample"))],
)
@pytest.mark.parametrize("cut", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(6, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_to_the_bit(name: str, cut: int) -> None:
    batches = [batch() for _ in range(14)]

    def model_of(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = losia_fx.transform(tiny_llama(layers=1), **{**SIZES, **RESUMED[name]}, seed=seed)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, some: list[Tensor]) -> None:
        for ids in some:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = model_of(0)
    go(model, optimizer, batches[:cut])
    saved = copy.deepcopy((model.state_dict(), losia_fx.state_dict(model), optimizer.state_dict()))
    go(model, optimizer, batches[cut:])
    other, again = model_of(1)
    other.load_state_dict(saved[0])
    losia_fx.load_state_dict(other, saved[1])
    again.load_state_dict(saved[2])
    go(other, again, batches[cut:])
    assert losia_fx.controller(model).history == losia_fx.controller(other).history
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_a_copy_goes_its_own_way_from_the_same_state() -> None:
    model = losia_fx.transform(tiny_llama(layers=1), **SIZES, importance="visits", carry_moments=True)
    train(model, 4)
    other = copy.deepcopy(model)
    assert losia_fx.state_dict(model).keys() == losia_fx.state_dict(other).keys()
    train(model, 3)
    before = {name: subnet.values.clone() for name, subnet in losia_fx.subnets(other).items()}
    train(other, 3)
    assert all(not torch.equal(before[name], s.values) for name, s in losia_fx.subnets(other).items())


def test_an_optimizer_that_is_not_like_adam_is_named_once_and_starts_anew() -> None:
    model = losia_fx.transform(tiny_llama(layers=1), **SIZES, schedule="all", importance="random", carry_moments=True)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
    with warned() as said:
        for _ in range(2 * PERIOD):
            ids = batch()
            model(input_ids=ids, labels=ids).loss.backward()
            sgd.step()
            sgd.zero_grad()
    assert [text for text in said if "carry_moments=True: SGD keeps no step" in text] == said[:1]
    assert not any(sgd.state.get(subnet.values) for subnet in losia_fx.subnets(model).values())


WRONG_STATES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "label_counts": lambda counts: counts.float(),
    "row_stays": lambda stays: stays[:-1],
    "row_means": lambda means: means.double(),
    "col_visits": lambda visits: None,
}


@pytest.mark.parametrize("part", WRONG_STATES)
def test_a_part_that_does_not_fit_is_named(part: str) -> None:
    options = {**SIZES, "schedule": "all", "importance": "visits", "head_rows": "frequent", "carry_moments": True}
    model = losia_fx.transform(tiny_llama(layers=1), **options)
    train(model, 2 * PERIOD)
    state = losia_fx.state_dict(model)
    name = next(key for key in state if key.endswith(f":{part}"))
    changed = WRONG_STATES[part](state[name])
    wrong = {key: value for key, value in state.items() if key != name} | ({} if changed is None else {name: changed})
    with pytest.raises(StateError, match=name.replace(".", r"\.")):
        losia_fx.load_state_dict(model, wrong)
    losia_fx.load_state_dict(model, state)
    other = losia_fx.transform(tiny_llama(layers=1), **{**options, "head_rows": "importance"})
    with pytest.raises(StateError, match=r"head_rows was 'frequent' and is 'importance'"):
        losia_fx.load_state_dict(other, state)


def test_a_state_from_before_these_options_is_taken() -> None:
    model = losia_fx.transform(tiny_llama(layers=1), **SIZES)
    state = losia_fx.state_dict(model)
    for option in ("rewarm_steps", "head_rows", "count_steps", "head_period", "carry_moments"):
        del state["config"][option]
    losia_fx.load_state_dict(model, state)
