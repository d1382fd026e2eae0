"""What counts as the base, through everything that can happen to a model; and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import losia_fx
from losia_fx import DeltaError
from losia_fx.delta.history import history_tensors, restore_history
from losia_fx.delta.read import DeltaFile
from losia_fx.method.visits import BaseHistory, Place, place_after
from tests.delta.made import OPTIONS, Made, make, same, train, weights
from tests.support.toys import Toy


def assert_delta(model: nn.Module, base: nn.Module, folder: Path) -> None:
    """The delta of ``model`` turns ``base`` into it."""
    file, base = folder / "check.safetensors", copy.deepcopy(base)
    losia_fx.save_delta(model, file)
    losia_fx.load_delta(base, file)
    assert same(base, weights(model))


# -- copies, dtypes, loads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_the_base_travels_with_a_copy(tmp_path: Path, way: str) -> None:
    made = make(tmp_path, trainable=("norm",))
    twin: Any
    if way == "deepcopy":
        twin = copy.deepcopy(made.model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(made.model))
    else:
        stream = io.BytesIO()
        torch.save(made.model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    train(twin, 4)
    assert not same(twin, made.tuned)
    assert_delta(twin, made.base, tmp_path)
    assert same(made.model, made.tuned)
    assert_delta(made.model, made.base, tmp_path)


def test_what_happens_before_the_first_step_makes_the_base(tmp_path: Path) -> None:
    model, loaded = Toy(layers=2), Toy(layers=2)
    losia_fx.transform(model, trainable=("norm",), **OPTIONS)
    model.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        model.layers[0].mix.weight.mul_(2)  # type: ignore[union-attr,operator]
        loaded.layers[0].mix.weight.mul_(2)  # type: ignore[union-attr,operator]
    model.bfloat16()
    train(model, 6)
    assert_delta(model, loaded.bfloat16(), tmp_path)


def test_another_dtype_on_the_way(tmp_path: Path) -> None:
    made = make(tmp_path, trainable=("norm",))
    made.model.bfloat16()
    train(made.model, 4)
    assert_delta(made.model, made.base.bfloat16(), tmp_path)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_of_this_run_keep_the_base(tmp_path: Path, assign: bool) -> None:
    """As Trainer does at the end of a run with load_best_model_at_end."""
    made = make(tmp_path, steps=4, trainable=("norm",))
    train(made.model, 8)
    made.model.load_state_dict(made.tuned, assign=assign)
    losia_fx.save_delta(made.model, made.file)
    losia_fx.load_delta(made.base, made.file)
    assert same(made.base, made.tuned)


@pytest.mark.parametrize("sharded", [False, True])
def test_other_weights_are_a_base_of_their_own(tmp_path: Path, sharded: bool) -> None:
    made, other = make(tmp_path, trainable=("norm", "*.bias")), Toy(layers=2, bias=True)
    state = list(other.state_dict().items())
    for part in (dict(state[:7]), dict(state[7:])) if sharded else (dict(state),):
        made.model.load_state_dict(part, strict=False)
    with pytest.raises(DeltaError, match="no optimizer has stepped"):
        losia_fx.save_delta(made.model, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()
    train(made.model, 4)
    assert_delta(made.model, other, tmp_path)


@pytest.mark.parametrize("weights_first", [False, True])
def test_a_run_that_goes_on_elsewhere_keeps_its_base(tmp_path: Path, weights_first: bool) -> None:
    made = make(tmp_path, trainable=("norm",))
    history = {name: tensor.clone() for name, tensor in history_tensors(losia_fx.controller(made.model)).items()}
    resumed = copy.deepcopy(made.base)
    losia_fx.transform(resumed, trainable=("norm",), **{**OPTIONS, "seed": 9})
    if weights_first:
        resumed.load_state_dict(made.tuned)
        restore_history(losia_fx.controller(resumed), history)
    else:
        restore_history(losia_fx.controller(resumed), history)
        resumed.load_state_dict(made.tuned)
    again = history_tensors(losia_fx.controller(resumed))
    assert again.keys() == history.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in history.items())
    train(resumed, 4)
    assert not same(resumed, made.tuned)
    assert_delta(resumed, made.base, tmp_path)


def test_the_base_of_another_model_is_not_taken_over(tmp_path: Path) -> None:
    made = make(tmp_path)
    controller = losia_fx.controller(made.model)
    before = history_tensors(controller)
    with pytest.raises(DeltaError, match=r"subnet/layers\.7\.mix\.weight/checksum: this model has no such weight"):
        restore_history(controller, {**before, "subnet/layers.7.mix.weight/checksum": torch.tensor(1)})
    assert history_tensors(controller).keys() == before.keys()


def test_the_place_after_others() -> None:
    base, history = torch.arange(12.0).reshape(3, 4), BaseHistory()
    rows, cols = torch.tensor([0, 2]), torch.tensor([1, 3])
    history.open(base, rows, cols)
    place = place_after(history.pieces, torch.tensor([1, 2]), torch.tensor([2, 3]))
    assert place.read(base).tolist() == [6.0, 7.0, 10.0]  # not (2, 3)
    assert Place(rows, cols, None).read(base).tolist() == [1.0, 3.0, 9.0, 11.0]


# -- refused --------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, made: Made, undo: bool = False) -> str:
    before = weights(model)
    with pytest.raises(DeltaError) as caught:
        losia_fx.load_delta(model, made.file, undo=undo)
    assert same(model, before)
    assert made.file.name in str(caught.value)
    return str(caught.value)


def test_twice_and_undone_before_it_was_done(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert "is not applied: there is nothing to undo" in refused(made.base, made, undo=True)
    losia_fx.load_delta(made.base, made.file)
    assert "is applied already" in refused(made.base, made)
    assert "is applied already" in refused(made.model, made)


@pytest.mark.parametrize("undo", [False, True])
def test_weights_that_are_others(tmp_path: Path, undo: bool) -> None:
    made = make(tmp_path)
    if undo:
        losia_fx.load_delta(made.base, made.file)
    weight = made.base.layers[1].mlp.up.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight.view(-1)[5] += 1e-3  # type: ignore[operator]
    said = refused(made.base, made, undo)
    assert f"layers.1.mlp.up.weight: is not that of the {'tuned' if undo else 'base'} model" in said


def test_two_deltas_of_one_base_do_not_add_up(tmp_path: Path) -> None:
    made, other = make(tmp_path, seed=1), make(tmp_path, seed=2)
    made.base.load_state_dict(other.base.state_dict())
    assert "is not that of the base model" in refused(made.base, made)
    losia_fx.load_delta(made.base, other.file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.bfloat16(), "its dtype is torch.bfloat16 in the model and torch.float32 in the delta"),
        (lambda model: Toy(layers=1, bias=True), "the model has no such weight; the delta was made of a Toy"),
        (lambda model: Toy(layers=2, inner=32, bias=True), "its shape is (32, 16) in the model and (24, 16)"),
        (lambda model: model.to("meta"), "on the meta device"),
    ],
)
def test_models_that_do_not_fit(tmp_path: Path, change: Any, said: str) -> None:
    made = make(tmp_path)
    model = change(made.base)
    with pytest.raises(DeltaError) as caught:
        losia_fx.load_delta(model, made.file)
    assert said in str(caught.value)


def test_models_without_a_base(tmp_path: Path) -> None:
    made, file = make(tmp_path, steps=4, rank_factor=0.25), tmp_path / "none.safetensors"
    with pytest.raises(DeltaError, match="Toy has no subnets, so its base is not known"):
        losia_fx.save_delta(made.base, file)
    averaged = AveragedModel(copy.deepcopy(made.model))
    train(made.model, 8)
    averaged.update_parameters(made.model)
    averaged.update_parameters(made.model)
    with pytest.raises(DeltaError, match="changed by something else than training"):
        losia_fx.save_delta(averaged, file)
    with torch.no_grad():
        made.model.layers[0].mix.weight.mul_(2)  # type: ignore[union-attr,operator]
    with pytest.raises(DeltaError, match=r"layers\.0\.mix\.weight: was changed by something else than training"):
        losia_fx.save_delta(made.model, file)
    with pytest.raises(DeltaError, match=r"before losia_fx\.restore"):
        losia_fx.save_delta(losia_fx.restore(made.model), file)
    assert not list(tmp_path.glob("*none*"))


# -- whole or not at all --------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)
    old = made.file.read_bytes()
    train(made.model, 2)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            losia_fx.save_delta(made.model, made.file)
    assert made.file.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [made.file.name]
    losia_fx.save_delta(made.model, made.file)
    assert made.file.read_bytes() != old
    with pytest.raises(OSError, match="nowhere"):
        losia_fx.save_delta(made.model, tmp_path / "nowhere" / "d.safetensors")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_midway_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    made = make(tmp_path)
    before, write, written = weights(made.base), Place.write, 0
    parameters = {parameter.data_ptr() for parameter in made.base.parameters()}

    def fail_at_the_fifth(place: Place, weight: Any, values: Any) -> None:
        nonlocal written
        written += weight.data_ptr() in parameters
        if written == 5:
            written += 1
            raise error("midway")
        write(place, weight, values)

    monkeypatch.setattr(Place, "write", fail_at_the_fifth)
    with pytest.raises(error, match="midway"):
        losia_fx.load_delta(made.base, made.file)
    assert written == 10  # four there, the one that failed, four back
    assert same(made.base, before)
    losia_fx.load_delta(made.base, made.file)
    assert same(made.base, made.tuned)


def test_a_run_that_changed_nothing_is_an_empty_file(tmp_path: Path) -> None:
    model = Toy()
    losia_fx.transform(model, **OPTIONS)
    train(model, 2, torch.optim.SGD(model.parameters(), lr=0.0))
    losia_fx.save_delta(model, tmp_path / "d.safetensors")
    with DeltaFile(tmp_path / "d.safetensors") as delta:
        assert delta.records == ()
    losia_fx.load_delta(Toy(), tmp_path / "d.safetensors")


def test_a_model_that_is_sharded_without_subnets_is_loaded_all_the_same(tmp_path: Path) -> None:
    made = make(tmp_path, steps=2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.distributed.fsdp.fully_shard(made.base, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        losia_fx.load_delta(made.base, made.file)
        for name, weight in made.base.state_dict().items():
            assert torch.equal(weight.full_tensor(), made.tuned[name])
    finally:
        torch.distributed.destroy_process_group()
