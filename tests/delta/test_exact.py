"""A delta turns the base into the tuned model and back, to the bit, in every kind of model and dtype."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import losia_fx
from losia_fx.delta.format import WeightRecord, digest, write_delta
from losia_fx.delta.read import DeltaFile
from losia_fx.method.subnet import gather
from losia_fx.method.visits import BaseHistory, Piece, as_integers, walk
from tests.delta.made import OPTIONS, make, same, train, weights
from tests.support.toys import VOCABULARY, Toy, batch, by_string, loss_of, tiny_llama

FULL = ("norm", "*.bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("importance", ["random", "mixed"])
def test_there_and_back_after_many_reselections(tmp_path: Path, dtype: torch.dtype, importance: str) -> None:
    made = make(tmp_path, dtype, importance=importance, trainable=FULL, steps=20)
    assert len(losia_fx.controller(made.model).history) >= 9
    base = weights(made.base)
    assert not same(made.base, made.tuned)
    losia_fx.load_delta(made.base, made.file)
    assert same(made.base, made.tuned)
    losia_fx.load_delta(made.base, made.file, undo=True)
    assert same(made.base, base)


def test_what_is_not_a_number_comes_back_too(tmp_path: Path) -> None:
    made = make(tmp_path, steps=2)
    subnet = losia_fx.subnets(made.model)["layers.0.mix.weight"]
    with torch.no_grad():
        subnet.values[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.0)
    optimizer.step()
    losia_fx.save_delta(made.model, made.file)
    base = weights(made.base)
    losia_fx.load_delta(made.base, made.file)
    assert bool(made.base.layers[0].mix.weight.isnan().any())  # type: ignore[union-attr,operator]
    losia_fx.load_delta(made.base, made.file, undo=True)
    assert same(made.base, base)


def test_every_element_is_in_the_file_once_and_the_file_is_small(tmp_path: Path) -> None:
    made = make(tmp_path, steps=20, rank_factor=0.25)
    states = {state.name: state for state in losia_fx.controller(made.model).states}
    visits = 1 + len(losia_fx.controller(made.model).history) // 3 + 1
    with DeltaFile(made.file) as delta:
        for record in delta.records:
            state, pieces = states[record.name], delta.pieces(record)
            counts = torch.zeros(record.shape, dtype=torch.int64)
            for piece, place in walk(pieces):
                place.write(counts, place.read(counts) + torch.ones_like(piece.values, dtype=torch.int64))
            assert int(counts.max()) == 1
            changed = as_integers(made.base.get_parameter(record.name)) != as_integers(state.weight)
            assert bool((counts.bool() | ~changed).all())
            assert 1 < record.visits <= visits
            rows, cols = state.size
            assert delta.nbytes(record) <= record.visits * 4 * (rows * cols + rows + cols)
    assert made.file.stat().st_size < sum(p.nbytes for p in made.base.parameters())


def test_the_base_is_kept_in_little_memory(tmp_path: Path) -> None:
    made = make(tmp_path, steps=2, rank_factor=0.25)
    state = losia_fx.controller(made.model).states[0]
    assert state.base.nbytes <= state.values.nbytes + 8 * (state.rows.numel() + state.cols.numel())
    train(made.model, 40)
    for state in losia_fx.controller(made.model).states:
        assert 0 < state.base.nbytes <= state.weight.nbytes
    tuned, base = weights(made.model), weights(made.base)
    losia_fx.save_delta(made.model, made.file)
    with DeltaFile(made.file) as delta:
        assert not all(record.visits for record in delta.records)  # so much was reached that a whole copy is less
    losia_fx.load_delta(made.base, made.file)
    assert same(made.base, tuned)
    losia_fx.load_delta(made.base, made.file, undo=True)
    assert same(made.base, base)


def test_a_visit_that_changed_nothing_costs_nothing(tmp_path: Path) -> None:
    made = make(tmp_path, steps=1, importance="random", period=1, schedule="sync")
    with DeltaFile(made.file) as delta:
        assert {record.visits for record in delta.records} == {1}
    assert all(len(state.base.pieces) == 2 for state in losia_fx.controller(made.model).states)


@pytest.mark.parametrize("how", ["transformed", "compiled", "ddp"])
def test_on_a_transformed_model_the_subnets_follow(tmp_path: Path, how: str) -> None:
    made = make(tmp_path)
    target = copy.deepcopy(made.base)
    losia_fx.transform(target, **OPTIONS)
    wrapped: Any = torch.compile(target, backend="eager") if how == "compiled" else target
    if how == "ddp":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        wrapped = DistributedDataParallel(target)
    try:
        for undo, expected in ((False, made.tuned), (True, weights(made.base)), (False, made.tuned)):
            losia_fx.load_delta(wrapped, made.file, undo=undo)
            assert same(target, expected)
            for subnet in losia_fx.subnets(wrapped).values():
                assert torch.equal(subnet.values, subnet.weight[subnet.rows][:, subnet.cols])
    finally:
        if how == "ddp":
            torch.distributed.destroy_process_group()
    train(target, 4)
    losia_fx.save_delta(wrapped, tmp_path / "more.safetensors")  # on top of what was loaded
    more = weights(target)
    losia_fx.load_delta(made.base, made.file)
    losia_fx.load_delta(made.base, tmp_path / "more.safetensors")
    assert same(made.base, more)


def test_the_trained_model_itself_goes_back_and_on(tmp_path: Path) -> None:
    made = make(tmp_path)
    losia_fx.load_delta(made.model, made.file, undo=True)
    assert same(made.model, weights(made.base))
    train(made.model, 4)
    other = tmp_path / "other.safetensors"
    losia_fx.save_delta(made.model, other)
    tuned = weights(made.model)
    losia_fx.load_delta(made.base, other)
    assert same(made.base, tuned)


@pytest.mark.parametrize("transformed", [True, False])
def test_switching_deltas_in_a_compiled_model_compiles_nothing(tmp_path: Path, transformed: bool) -> None:
    first, second = make(tmp_path, seed=1), make(tmp_path, seed=2)
    second.base.load_state_dict(first.base.state_dict())
    losia_fx.transform(second.base, **{**OPTIONS, "seed": 5})
    train(second.base, 6)
    losia_fx.save_delta(second.base, second.file)
    second_tuned = weights(second.base)
    model, ids = first.base, batch()
    if transformed:
        losia_fx.transform(model, compiler="aot_eager")
    call: Any = model if transformed else torch.compile(model, backend="aot_eager")
    before = loss_of(call, ids)
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses = []
    for file, tuned in ((first.file, first.tuned), (second.file, second_tuned)):
        losia_fx.load_delta(call, file)
        assert same(model, tuned)
        loss = loss_of(call, ids)
        loss.backward()
        losses.append(loss.item())
        losia_fx.load_delta(call, file, undo=True)
    torch.testing.assert_close(loss_of(call, ids), before, rtol=0, atol=0)
    assert len({before.item(), *losses}) == 3
    assert not counters["stats"]["unique_graphs"]
    assert not counters["frames"]["total"]


def test_by_string_everything_that_learns_is_in_it(tmp_path: Path) -> None:
    model = Toy(layers=2, bias=True)
    base = copy.deepcopy(model)
    call = by_string(model, **OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        loss_of(call, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.embed.weight, base.embed.weight)
    losia_fx.save_delta(call, tmp_path / "d.safetensors")
    start = weights(base)
    losia_fx.load_delta(base, tmp_path / "d.safetensors")
    assert same(base, weights(model))
    losia_fx.load_delta(base, tmp_path / "d.safetensors", undo=True)
    assert same(base, start)


def test_what_an_optimizer_of_its_own_trains_is_in_it(tmp_path: Path) -> None:
    model = Toy(layers=2)
    base = copy.deepcopy(model)
    losia_fx.transform(model, trainable=("norm",), **OPTIONS)
    values = [subnet.values for subnet in losia_fx.subnets(model).values()]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(values, lr=1e-2),
        torch.optim.AdamW(model.norm.parameters(), lr=1e-2),
    ]
    for step in range(4):
        if step == 2:  # and what is thawed on the way
            model.embed.requires_grad_(True)
            optimizers.append(torch.optim.SGD(model.embed.parameters(), lr=1e-2))
        loss_of(model, batch()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    losia_fx.save_delta(model, tmp_path / "d.safetensors")
    losia_fx.load_delta(base, tmp_path / "d.safetensors")
    assert same(base, weights(model))


def test_a_tied_head_and_a_real_architecture(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    base = copy.deepcopy(model)
    losia_fx.transform(model, trainable=("embed_tokens",), **OPTIONS)
    train(model, 4)
    losia_fx.save_delta(model, tmp_path / "d.safetensors")
    start = weights(base)
    losia_fx.load_delta(base, tmp_path / "d.safetensors")
    assert same(base, weights(model))
    assert base.lm_head.weight is base.model.embed_tokens.weight
    losia_fx.load_delta(base, tmp_path / "d.safetensors", undo=True)
    assert same(base, start)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 6))


def test_a_weight_of_several_matrices(tmp_path: Path) -> None:
    """Each expert has rows and columns of its own: (E, r) and (E, c)."""
    model, weight = Experts(), Experts().weight
    with torch.no_grad():
        weight.copy_(model.weight)
    history, base = BaseHistory(), weights(model)
    generator = torch.Generator().manual_seed(0)
    for visit in range(3):
        rows = torch.stack([torch.randperm(8, generator=generator)[:3].sort().values for _ in range(3)])
        cols = torch.stack([torch.randperm(6, generator=generator)[:2].sort().values for _ in range(3)])
        if visit:
            history.visit(weight, rows, cols, gather(weight, rows, cols))
        else:
            history.open(weight, rows, cols)
        with torch.no_grad():
            for expert in range(3):
                weight[expert, rows[expert][:, None], cols[expert]] += 1
    assert torch.equal(history.base_of(weight), base["weight"])
    assert history.holds(history.base_of(weight))
    assert len(history.pieces) == 3
    assert sum(piece.values.numel() for piece in history.pieces) == int((weight != base["weight"]).sum()) < 54
    bits = [
        Piece(as_integers(piece.values) ^ place.read(as_integers(weight)), piece.rows, piece.cols)
        for piece, place in walk(history.pieces)
    ]
    record = WeightRecord("weight", (3, 8, 6), torch.float32, 3, digest(base["weight"]), digest(weight))
    write_delta(tmp_path / "d.safetensors", "Experts", [record], {"weight": bits})
    losia_fx.load_delta(model, tmp_path / "d.safetensors")
    assert torch.equal(model.weight, weight)
    losia_fx.load_delta(model, tmp_path / "d.safetensors", undo=True)
    assert same(model, base)


def test_experts_that_were_trained(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = MixtralForCausalLM(config).bfloat16()
    base = copy.deepcopy(model)
    losia_fx.transform(model, **OPTIONS)
    experts = [name for name, subnet in losia_fx.subnets(model).items() if subnet.weight.dim() == 3]
    assert experts
    train(model, 8)
    losia_fx.save_delta(model, tmp_path / "d.safetensors")
    with DeltaFile(tmp_path / "d.safetensors") as delta:
        records = {record.name: record for record in delta.records}
        for name in experts:
            assert records[name].visits > 1
            rows = delta.pieces(records[name])[0].rows
            assert rows is not None
            assert rows.dim() == 2
    start = weights(base)
    losia_fx.load_delta(base, tmp_path / "d.safetensors")
    assert same(base, weights(model))
    losia_fx.load_delta(base, tmp_path / "d.safetensors", undo=True)
    assert same(base, start)
