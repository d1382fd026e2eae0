"""transform and restore: what a user's model is before, during and after."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import losia_fx
from losia_fx import LosiaWarning
from tests.support.toys import Toy, assert_subnet_gradients, batch, fingerprint, loss_of, plain_gradients, tiny_llama

OPTIONS: dict[str, Any] = {"compiler": "eager", "rank_factor": 0.25, "period": 2}


def train(model: nn.Module, steps: int = 3, lr: float = 0.05, call: Any = None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model if call is None else call, batch()).backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# -- what transform does to a model --------------------------------------------------------------------------------


def test_the_same_object_comes_back() -> None:
    model = Toy()
    kind = type(model)
    assert losia_fx.transform(model, **OPTIONS) is model
    assert type(model) is kind


def test_only_subnets_and_trainable_require_grad() -> None:
    model = Toy(bias=True)
    losia_fx.transform(model, trainable=("norm", "*.mix.bias"), **OPTIONS)
    subnets = losia_fx.subnets(model)
    values = {id(subnet.values) for subnet in subnets.values()}
    learning = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in values}
    norms = {f"{where}norm.{part}" for where in ("", "layers.0.", "layers.1.") for part in ("weight", "bias")}
    assert learning == norms | {"layers.0.mix.bias", "layers.1.mix.bias"}
    assert len(values) == 7
    assert all(subnet.values.requires_grad and subnet.values.is_leaf for subnet in subnets.values())


def test_a_subnet_is_what_it_says() -> None:
    model = Toy()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    losia_fx.transform(model, **OPTIONS)
    subnets = losia_fx.subnets(model)
    assert set(subnets) == {f"{name}.weight" for name in names}
    parameters = dict(model.named_parameters())
    for name, subnet in subnets.items():
        out, into = subnet.weight.shape
        assert subnet.name == name
        assert subnet.weight is parameters[name]
        head = name == "head.weight"
        assert subnet.values.shape == (out // (8 if head else 4), into if head else into // 4)
        for index, size in ((subnet.rows, out), (subnet.cols, into)):
            assert index.dtype == torch.int64
            assert index.tolist() == sorted(set(index.tolist()))
            assert 0 <= index[0]
            assert index[-1] < size
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols])
    assert losia_fx.controller(model).groups == [
        ["head.weight"],
        *[[f"layers.{i}.{part}.weight" for part in ("mix", "mlp.up", "mlp.down")] for i in (0, 1)],
    ]


def test_rows_and_cols_never_move_in_memory() -> None:
    model = Toy()
    losia_fx.transform(model, **{**OPTIONS, "period": 1})
    before = {name: (s.rows.data_ptr(), s.cols.data_ptr(), s.values) for name, s in losia_fx.subnets(model).items()}
    train(model, steps=3)
    assert len(losia_fx.controller(model).history) == 3
    for name, s in losia_fx.subnets(model).items():
        assert (s.rows.data_ptr(), s.cols.data_ptr()) == before[name][:2]
        assert s.values is before[name][2]


def test_the_seed_decides_the_first_subnets() -> None:
    picked = []
    for seed in (1, 1, 2):
        model = Toy()
        losia_fx.transform(model, seed=seed, **OPTIONS)
        picked.append([subnet.rows.tolist() for subnet in losia_fx.subnets(model).values()])
    assert picked[0] == picked[1] != picked[2]


def test_the_global_generator_is_left_alone() -> None:
    model = Toy()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losia_fx.transform(model, **OPTIONS)
    assert torch.equal(torch.rand(3), expected)


def test_target_names_what_learns() -> None:
    model = Toy()
    losia_fx.transform(model, target=("mlp.up", "layers.1.mix"), **OPTIONS)
    assert set(losia_fx.subnets(model)) == {"layers.0.mlp.up.weight", "layers.1.mlp.up.weight", "layers.1.mix.weight"}
    ids = batch()
    expected = plain_gradients(_plain(model), ids)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)


def test_exclude_names_what_does_not() -> None:
    model = Toy()
    losia_fx.transform(model, exclude=("layers.0", "head"), **OPTIONS)
    assert set(losia_fx.subnets(model)) == {f"layers.1.{part}.weight" for part in ("mix", "mlp.up", "mlp.down")}
    rows = {row.name: row for row in losia_fx.report(model).weights}
    assert rows["layers.0.mix.weight"].trained == "frozen"
    assert "layers.0" in rows["layers.0.mix.weight"].why
    assert "head" in rows["head.weight"].why


def test_an_output_rank_factor_of_zero_freezes_the_head() -> None:
    model = Toy()
    losia_fx.transform(model, output_rank_factor=0, **OPTIONS)
    assert "head.weight" not in losia_fx.subnets(model)
    assert not model.head.weight.requires_grad
    assert losia_fx.controller(model).groups[0][0].startswith("layers.0")
    head = next(row for row in losia_fx.report(model).weights if row.name == "head.weight")
    assert head.trained == "frozen"
    assert "output_rank_factor" in head.why


def test_a_tied_head_stays_dense_and_the_report_says_so() -> None:
    model = Toy(tied=True)
    ids = batch()
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, **OPTIONS)
    assert len(losia_fx.subnets(model)) == 6
    assert not model.head.weight.requires_grad
    assert model.head.weight is model.embed.weight
    (row,) = [row for row in losia_fx.report(model).weights if row.shape == tuple(model.embed.weight.shape)]
    assert row.trained == "frozen"
    assert "tied" in row.why
    assert "tied" in "".join(losia_fx.report(model).notes)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Toy()
        self.classifier = nn.Linear(40, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.body(ids).mean(1))


def test_a_frozen_classification_head_warns() -> None:
    model = Classifier()
    with pytest.warns(LosiaWarning, match="classifier"):
        losia_fx.transform(model, **OPTIONS)
    text = str(losia_fx.report(model))
    assert "classifier" in text.split("outside the repeated blocks", 1)[1]


def test_a_classification_head_named_in_trainable_learns_without_a_warning() -> None:
    model = Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LosiaWarning)
        losia_fx.transform(model, trainable=("classifier",), **OPTIONS)
    before = model.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch()).sum().backward()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, before)
    row = next(row for row in losia_fx.report(model).weights if row.name == "classifier.weight")
    assert row.trained == "full"


def test_a_classification_head_outside_of_target_warns_too() -> None:
    with pytest.warns(LosiaWarning, match="classifier"):
        losia_fx.transform(Classifier(), target=("layers",), **OPTIONS)


def test_a_weight_shared_by_two_linears_learns_from_both() -> None:
    model, ids = Toy(), batch()
    model.layers[1].mix.weight = model.layers[0].mix.weight
    keys = list(model.state_dict())
    expected = plain_gradients(model, ids)
    losia_fx.transform(model, **OPTIONS)
    assert len(losia_fx.subnets(model)) == 6
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    train(model, steps=1)
    assert list(model.state_dict()) == keys
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.bfloat16()
    assert model.layers[1].mix.weight is model.layers[0].mix.weight
    losia_fx.restore(model)
    assert model.layers[1].mix.weight is model.layers[0].mix.weight


def test_subnets_that_are_everything_train_as_plain_fine_tuning() -> None:
    model = Toy(bias=True)
    plain = copy.deepcopy(model)
    everything: dict[str, Any] = {"rank_factor": 1, "output_rank_factor": 1, "trainable": ("embed", "norm", "*bias")}
    losia_fx.transform(model, rewarm=False, period=2, compiler="eager", **everything)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.3) for each in (model, plain)]
    for _ in range(7):
        ids = batch()
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(each, ids).backward()
            optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    assert [(event.step, event.moved) for event in losia_fx.controller(model).history] == [(2, 0.0), (4, 0.0), (6, 0.0)]


def test_the_report_lists_every_parameter_once_with_its_truth() -> None:
    model = Toy(bias=True)
    plain = [name for name, _ in model.named_parameters()]
    losia_fx.transform(model, trainable=("norm",), exclude=("mlp.down",), **OPTIONS)
    report = losia_fx.report(model)
    assert [row.name for row in report.weights] == plain
    subnets = losia_fx.subnets(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, steps=2)
    for row in report.weights:
        parameter = dict(model.named_parameters())[row.name]
        assert row.why
        assert row.shape == tuple(parameter.shape)
        changed = not torch.equal(parameter, before[row.name])
        assert changed == (row.trained in ("subnet", "full")), row
        assert (row.subnet is not None) == (row.name in subnets)
        if row.subnet is not None:
            assert row.subnet == tuple(subnets[row.name].values.shape)
            assert row.group == subnets[row.name].group
        assert row.name in str(report)
    totals = report.totals()
    assert totals["subnet"] == sum(subnet.values.numel() for subnet in subnets.values())
    assert totals["full"] == 2 * 16 * 3
    assert sum(totals.values()) == sum(p.numel() for name, p in model.named_parameters() if name in plain)
    assert report.round_steps == 2 * 3


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_state_dict_keys_are_the_plain_models() -> None:
    model = Toy()
    plain = list(model.state_dict())
    losia_fx.transform(model, **OPTIONS)
    assert list(model.state_dict()) == plain
    assert list(model.layers[0].state_dict()) == [
        k.removeprefix("layers.0.") for k in plain if k.startswith("layers.0.")
    ]
    assert list(model.head.state_dict()) == ["weight"]


@pytest.mark.parametrize("assign", [False, True])
def test_strict_loading_gathers_the_subnets_anew(assign: bool) -> None:
    model, other, ids = Toy(), Toy(), batch()
    losia_fx.transform(model, **OPTIONS)
    result = model.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, subnet in losia_fx.subnets(model).items():
        assert torch.equal(subnet.weight, other.get_parameter(name)), name
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols]), name
        assert not subnet.weight.requires_grad
    expected = plain_gradients(other, ids)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)
    other.load_state_dict(model.state_dict(), strict=True)


def test_strict_loading_still_refuses_what_is_wrong() -> None:
    model = Toy()
    good = copy.deepcopy(model.state_dict())
    losia_fx.transform(model, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"layers\.0\.mix\.weight"):
        model.load_state_dict({k: v for k, v in good.items() if k != "layers.0.mix.weight"})
    with pytest.raises(RuntimeError, match="stranger"):
        model.load_state_dict({**good, "stranger": torch.zeros(1)})


def test_a_transformed_checkpoint_loads_into_a_transformed_model() -> None:
    model, other = Toy(), Toy()
    losia_fx.transform(model, **OPTIONS)
    losia_fx.transform(other, **{**OPTIONS, "seed": 9})
    train(model)
    other.load_state_dict(model.state_dict())
    for subnet in losia_fx.subnets(other).values():
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols])


def test_loading_keeps_a_subnet_that_rounds_to_what_is_loaded() -> None:
    model = Toy().bfloat16()
    losia_fx.transform(model, **OPTIONS)
    subnet = losia_fx.subnets(model)["layers.0.mix.weight"]
    with torch.no_grad():
        subnet.values.mul_(1 + 2**-12)  # below bfloat16's resolution
    fine = subnet.values.detach().clone()
    saved = copy.deepcopy(model.state_dict())
    changed = int(subnet.rows[0]), int(subnet.cols[0])
    saved["layers.0.mix.weight"][changed] = 3.0
    model.load_state_dict(saved)
    assert subnet.values[0, 0] == 3.0
    kept = torch.ones_like(fine, dtype=torch.bool)
    kept[0, 0] = False
    assert torch.equal(subnet.values[kept], fine[kept])
    assert not torch.equal(fine[kept], fine[kept].bfloat16().float())


def test_save_pretrained_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    names = {name for name, _ in model.named_parameters()}
    losia_fx.transform(model, **OPTIONS)
    train(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {name for name, _ in loaded.named_parameters()} == names
    ids = batch()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded(ids).logits, rtol=0, atol=0)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names


def test_generate_gives_the_plain_models_tokens_and_compiles_nothing() -> None:
    model = tiny_llama().eval()
    ids = batch(2, 5)
    losia_fx.transform(model, **OPTIONS)
    train(model, steps=2)
    plain = tiny_llama().eval()
    plain.load_state_dict(model.state_dict())
    expected = plain.generate(ids, max_new_tokens=8, do_sample=False)
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("fail_on_recompile"):
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, expected)
    assert not torch._dynamo.utils.counters["stats"]
    assert not torch._dynamo.utils.counters["frames"]


def test_no_grad_runs_the_original_forward() -> None:
    model, ids = Toy(), batch()
    plain = copy.deepcopy(model)
    losia_fx.transform(model, **OPTIONS)
    torch._dynamo.utils.counters.clear()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(ids), plain(ids))
    assert not torch._dynamo.utils.counters["stats"]


# -- restore -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["toy", "tied", "llama"])
def test_restore_gives_a_plain_model_with_the_trained_weights(kind: str) -> None:
    def build() -> nn.Module:
        if kind == "llama":
            return tiny_llama()
        return Toy(bias=True, tied=kind == "tied")

    model = build()
    model.get_parameter("norm.weight" if kind != "llama" else "model.norm.weight").requires_grad_(False)
    before, plain_weights = fingerprint(model), copy.deepcopy(model.state_dict())
    losia_fx.transform(model, trainable=("*bias",) if kind == "toy" else (), **OPTIONS)
    assert fingerprint(model) != before
    train(model)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    moved = [name for name in trained if not torch.equal(trained[name], plain_weights[name])]
    assert set(losia_fx.subnets(model)) <= set(moved)
    assert losia_fx.restore(model) is model
    assert fingerprint(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name])
    with pytest.raises(losia_fx.TransformError):
        losia_fx.controller(model)
    torch._dynamo.utils.counters.clear()
    ids = batch()
    model.zero_grad()
    expected = plain_gradients(model, ids)
    loss_of(model, ids).backward()
    assert not torch._dynamo.utils.counters["stats"]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_restore_writes_the_subnets_back_first() -> None:
    model = Toy().bfloat16()
    losia_fx.transform(model, **OPTIONS)
    subnet = losia_fx.subnets(model)["layers.0.mix.weight"]
    with torch.no_grad():
        subnet.values.add_(1.0)
        subnet.weight.index_put_((subnet.rows[:, None], subnet.cols), subnet.values.bfloat16())
    expected = subnet.weight.detach().clone()
    losia_fx.restore(model)
    assert torch.equal(model.layers[0].mix.weight, expected)


def test_restored_weights_can_be_transformed_again() -> None:
    model, ids = Toy(), batch()
    losia_fx.transform(model, **OPTIONS)
    train(model, steps=1)
    losia_fx.restore(model)
    losia_fx.transform(model, **{**OPTIONS, "seed": 3})
    expected = plain_gradients(_plain(model), ids)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected)


def _plain(model: nn.Module) -> nn.Module:
    twin = Toy(bias=any("mix.bias" in name for name, _ in model.named_parameters()))
    twin.load_state_dict(model.state_dict())
    return twin


# -- dtypes and copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to", "to_keyword"])
def test_casting_keeps_the_subnets_wide(cast: str) -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    subnet = losia_fx.subnets(model)["layers.0.mix.weight"]
    fine, grad = subnet.values.detach().clone(), torch.ones_like(subnet.values)
    subnet.values.grad = grad.clone()
    if cast == "to":
        model.to(torch.bfloat16)
    elif cast == "to_keyword":
        model.layers[0].mix.to(dtype=torch.float16)
    else:
        getattr(model, cast)()
    subnet = losia_fx.subnets(model)["layers.0.mix.weight"]
    assert subnet.weight.dtype != torch.float32
    wide = torch.float64 if cast == "double" else torch.float32
    assert subnet.values.dtype == wide
    assert subnet.values.grad is not None
    assert subnet.values.grad.dtype == wide
    assert torch.equal(subnet.values.float(), fine)
    assert subnet.rows.dtype == torch.int64
    assert "layers.0.mix.weight_subnet" not in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_trains(dtype: torch.dtype) -> None:
    model, ids = Toy(), batch()
    losia_fx.transform(model, **OPTIONS)
    loss_of(model, ids).backward()
    model.zero_grad()
    model.to(dtype)
    expected = plain_gradients(_plain(model).to(dtype), ids)
    loss_of(model, ids).backward()
    assert_subnet_gradients(model, expected, tolerance=3e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_deepcopy_trains_by_itself() -> None:
    model, ids = Toy(), batch()
    losia_fx.transform(model, **OPTIONS)
    train(model, steps=3)
    twin = copy.deepcopy(model)
    ours, theirs = losia_fx.controller(model), losia_fx.controller(twin)
    assert theirs is not ours
    assert (theirs.step, theirs.groups, theirs.history) == (3, ours.groups, ours.history)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = {name: s.rows.clone() for name, s in losia_fx.subnets(model).items()}
    for name, subnet in losia_fx.subnets(twin).items():
        assert subnet.values is not losia_fx.subnets(model)[name].values
        assert torch.equal(subnet.rows, rows[name])
        assert subnet.rows.data_ptr() != losia_fx.subnets(model)[name].rows.data_ptr()
    expected = plain_gradients(_plain(twin), ids)
    twin.zero_grad()
    loss_of(twin, ids).backward()
    assert_subnet_gradients(twin, expected)
    train(twin, steps=5, lr=0.1)
    assert (ours.step, theirs.step) == (3, 8)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for name, subnet in losia_fx.subnets(twin).items():
        assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols])
        assert torch.equal(losia_fx.subnets(model)[name].rows, rows[name])
    losia_fx.restore(twin)
    assert losia_fx.controller(model) is ours
    assert_still_trains(model)


def test_a_copy_and_its_original_go_the_same_way() -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    train(model, steps=3)  # the middle of a slot
    twin = copy.deepcopy(model)
    for each in (model, twin):
        torch.manual_seed(4)
        train(each, steps=5)
    assert losia_fx.controller(twin).history == losia_fx.controller(model).history
    for (name, mine), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)


def assert_still_trains(model: nn.Module) -> None:
    before = {name: s.weight.detach().clone() for name, s in losia_fx.subnets(model).items()}
    train(model, steps=1)
    for name, subnet in losia_fx.subnets(model).items():
        assert not torch.equal(subnet.weight, before[name]), name


def test_pickle_round_trip_trains() -> None:
    model, ids = Toy(), batch()
    losia_fx.transform(model, **OPTIONS)
    train(model, steps=3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert losia_fx.controller(loaded).step == 3
    assert losia_fx.controller(loaded) is not losia_fx.controller(model)
    expected = plain_gradients(_plain(loaded), ids)
    loaded.zero_grad()
    loss_of(loaded, ids).backward()
    assert_subnet_gradients(loaded, expected)
    assert_still_trains(loaded)
    assert losia_fx.controller(loaded).step == 4
    assert losia_fx.controller(model).step == 3
    assert list(loaded.state_dict()) == list(model.state_dict())


def test_a_deepcopy_of_a_part_trains_or_says_that_it_does_not() -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    layer = copy.deepcopy(model.layers[0])
    before = layer.mix.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(2, 4, 16)).square().sum().backward()
    try:
        optimizer.step()
    except losia_fx.LosiaError:
        return
    assert not torch.equal(layer.mix.weight, before)


def test_a_transformers_model_is_copied_and_pickled() -> None:
    model, ids = tiny_llama(), batch()
    losia_fx.transform(model, **OPTIONS)
    train(model, steps=1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert losia_fx.controller(twin) is not losia_fx.controller(model)
        with torch.no_grad():
            assert torch.equal(twin(ids).logits, model(ids).logits)
        assert_still_trains(twin)


def test_an_averaged_model_averages_and_runs() -> None:
    model, ids = Toy(), batch()
    losia_fx.transform(model, **OPTIONS)
    average = AveragedModel(model)
    weights = []
    for _ in range(3):
        train(model, steps=1)
        average.update_parameters(model)
        weights.append(model.layers[0].mix.weight.detach().clone())
    mean = torch.stack(weights).mean(0)
    torch.testing.assert_close(average.module.layers[0].mix.weight, mean)
    with torch.no_grad():
        averaged = average(ids)
    plain = _plain(average.module)
    with torch.no_grad():
        torch.testing.assert_close(averaged, plain(ids))
    assert losia_fx.controller(model).step == 3
    assert losia_fx.controller(average) is not losia_fx.controller(model)


# -- wrappers ------------------------------------------------------------------------------------------------------


def test_the_views_take_what_torch_compile_returns() -> None:
    model, ids = Toy(), batch()
    losia_fx.transform(model, **OPTIONS)
    expected = plain_gradients(_plain(model), ids)
    compiled = torch.compile(model, backend="aot_eager")
    assert losia_fx.controller(compiled) is losia_fx.controller(model)
    assert set(losia_fx.subnets(compiled)) == set(losia_fx.subnets(model))
    assert [row.name for row in losia_fx.report(compiled).weights] == [
        row.name for row in losia_fx.report(model).weights
    ]
    loss_of(compiled, ids).backward()
    assert_subnet_gradients(compiled, expected)
    train(compiled, steps=2, call=compiled)
    assert losia_fx.controller(compiled).step == 2
    assert losia_fx.restore(compiled) is model


@pytest.mark.parametrize("compiled", [False, True])
def test_the_views_take_a_ddp_wrapper(one_process: None, compiled: bool) -> None:
    model, ids = Toy(), batch()
    losia_fx.transform(model, **OPTIONS)
    expected = plain_gradients(_plain(model), ids)
    wrapped: Any = DistributedDataParallel(model)
    if compiled:
        wrapped = torch.compile(wrapped, backend="aot_eager")
    assert losia_fx.controller(wrapped) is losia_fx.controller(model)
    assert set(losia_fx.subnets(wrapped)) == set(losia_fx.subnets(model))
    assert str(losia_fx.report(wrapped)) == str(losia_fx.report(model))
    loss_of(wrapped, ids).backward()
    assert_subnet_gradients(wrapped, expected)
    wrapped.zero_grad()
    train(model, steps=5, call=wrapped)
    assert losia_fx.controller(wrapped).step == 5
    assert len(losia_fx.controller(wrapped).history) == 2
    assert losia_fx.controller(wrapped).left_out == 0
    assert losia_fx.restore(wrapped) is model


def test_the_views_take_a_part_of_the_model() -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    assert losia_fx.controller(model.layers[0]) is losia_fx.controller(model)


def test_the_views_refuse_a_plain_model() -> None:
    for view in (losia_fx.subnets, losia_fx.controller, losia_fx.report, losia_fx.restore):
        with pytest.raises(losia_fx.TransformError):
            view(Toy())


def test_a_transform_in_inference_mode_trains() -> None:
    model = Toy(layers=1)
    with torch.inference_mode():
        losia_fx.transform(model, compiler="eager")
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    before = model.head.weight.detach().clone()
    for _ in range(2):
        loss_of(model, batch()).backward()
        optimizer.step()
    assert not torch.equal(model.head.weight, before)
