"""Which linears make a group, and in what order: real architectures, and module trees made to mislead."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

import losia_fx
from losia_fx.model.blocks import block_of, find_blocks, find_heads, group_names, plain_name
from losia_fx.tools.tiny.architectures import build

# model type -> the groups as the part of the names that all members share
ARCHITECTURES: dict[str, list[str]] = {
    "llama": ["lm_head", "model.layers.0", "model.layers.1"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    "bart": ["model.encoder.layers.0", "model.encoder.layers.1", "model.decoder.layers.0", "model.decoder.layers.1"],
    "vit": ["vit.layers.0", "vit.layers.1"],
    "mamba": ["backbone.layers.0", "backbone.layers.1"],
    "jamba": ["lm_head", "model.layers.0", "model.layers.1"],
    "swin": [
        "swin.encoder.layers.0.blocks.0",
        "swin.encoder.layers.0.downsample.reduction",
        "swin.encoder.layers.1.blocks.0",
        "swin.encoder.layers.1.blocks.1",
        "swin.encoder.layers.1.downsample.reduction",
        "swin.encoder.layers.2.blocks.0",
        "swin.encoder.layers.2.downsample.reduction",
        "swin.encoder.layers.3.blocks.0",
    ],
    "convnext": [
        "convnext.encoder.stages.0.layers.0",
        "convnext.encoder.stages.1.layers.0",
        "convnext.encoder.stages.1.layers.1",
        "convnext.encoder.stages.2.layers.0",
        "convnext.encoder.stages.3.layers.0",
    ],
}


@pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_of_architectures(architecture: str) -> None:
    model = losia_fx.transform(build(architecture).model, compiler="eager")
    groups = losia_fx.controller(model).groups
    expected = ARCHITECTURES[architecture]
    assert len(groups) == len(expected)
    for group, block in zip(groups, expected, strict=True):
        assert all(name.startswith(f"{block}.") for name in group)
    assert sorted(name for group in groups for name in group) == sorted(losia_fx.subnets(model))


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(), linear()


class Routed(nn.Module):
    """Attention and experts, each an Mlp of its own in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.router = linear(), linear(), linear()
        self.experts = nn.ModuleList(Mlp() for _ in range(3))


class Sublayers(nn.Module):
    """A list of two different things: no stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.MultiheadAttention(4, 1), Mlp()])


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(2))
        self.downsample = linear()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList(Mlp() for _ in range(2))
        self.image = nn.Sequential(*(Mlp() for _ in range(2)))
        self.join = linear()


def listed(*modules: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(modules)})


def sequential() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 4), linear(), Mlp(), nn.ReLU(), Mlp(), nn.LayerNorm(4), linear())


def named_sequential() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 1), first=Mlp(), act=nn.GELU(), second=Mlp(), head=linear()))


def alone() -> nn.Module:
    return nn.ModuleDict({"encode": Mlp(), "decode": nn.ModuleDict({"out": linear()})})


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (listed(Mlp(), Mlp()), ["layers.0", "layers.1"]),
        (listed(Routed(), Routed()), ["layers.0", "layers.1"]),
        (listed(Sublayers(), Sublayers()), ["layers.0", "layers.1"]),
        (listed(nn.ReLU(), Mlp(), nn.LayerNorm(4), Routed()), ["layers.1", "layers.3"]),
        (
            listed(Stage(), Stage()),
            [f"layers.{i}{rest}" for i in range(2) for rest in (".blocks.0", ".blocks.1", "")],
        ),
        (
            listed(nn.ModuleList([Mlp(), Mlp()]), nn.ModuleList([Mlp()])),
            ["layers.0.0", "layers.0.1", "layers.0", "layers.1.0", "layers.1"],
        ),
        (Branches(), ["text.0", "text.1", "image.0", "image.1"]),
        (sequential(), ["2", "4"]),
        (named_sequential(), ["first", "second"]),
        (nn.Sequential(linear(), nn.ReLU(), linear()), ["0", "2"]),
        (nn.Sequential(linear(), nn.ReLU()), []),
        (nn.Sequential(Mlp(), nn.ReLU(), Routed()), ["2.experts.0", "2.experts.1", "2.experts.2"]),
        (nn.ModuleDict({"layers": nn.ModuleList([linear()] * 2), "blocks": nn.ModuleList([Mlp()])}), ["blocks.0"]),
        (alone(), []),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), []),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)  # fmt: skip
def test_blocks(model: nn.Module, blocks: list[str]) -> None:
    assert find_blocks(model) == blocks


def test_experts_stay_with_their_block() -> None:
    model = losia_fx.transform(listed(Routed(), Routed()), rank_factor=0.5, compiler="eager")
    groups = losia_fx.controller(model).groups
    assert [len(group) for group in groups] == [9, 9]
    assert all(name.startswith("layers.1.") for name in groups[1])


def test_a_stage_is_a_group_for_what_is_not_in_its_blocks() -> None:
    model = losia_fx.transform(listed(Stage(), Stage()), rank_factor=0.5, compiler="eager")
    assert [len(group) for group in losia_fx.controller(model).groups] == [2, 2, 1] * 2


def test_without_blocks_a_linear_is_a_group() -> None:
    model = losia_fx.transform(alone(), rank_factor=0.5, compiler="eager")
    expected = [["encode.up.weight"], ["encode.down.weight"], ["decode.out.weight"]]
    assert losia_fx.controller(model).groups == expected


def test_more_than_ten_blocks_are_in_order() -> None:
    model = losia_fx.transform(listed(*(Mlp() for _ in range(12))), rank_factor=0.5, compiler="eager")
    assert [group[0].split(".")[1] for group in losia_fx.controller(model).groups] == [str(i) for i in range(12)]


def test_group_names() -> None:
    names = ["stem.weight", "b.10.weight", "b.1.weight", "head.weight", "b.1.up.weight", "tail.weight"]
    grouped = group_names(names, ["head.weight"], ["b.1", "b.10"])
    assert grouped == [
        ["head.weight"], ["b.1.weight", "b.1.up.weight"], ["b.10.weight"], ["stem.weight"], ["tail.weight"],
    ]  # fmt: skip


def test_block_of_goes_by_whole_names() -> None:
    assert block_of("layers.10.up", ["layers.1", "layers.10"]) == "layers.10"
    assert block_of("layers.1", ["layers.1"]) == "layers.1"
    assert block_of("layers2.1", ["layers"]) is None


def test_plain_name() -> None:
    assert plain_name("_orig_mod.layers.0._orig_mod.up") == "layers.0.up"
    assert plain_name("layers.0._orig_mod") == "layers.0"


class WithHead(nn.Module):
    def __init__(self, head: nn.Module | None) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head


class Refusing(nn.Module):
    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_heads() -> None:
    head = linear()
    assert find_heads(WithHead(head)) == [head]
    assert find_heads(nn.ModuleList([WithHead(head), WithHead(head)])) == [head]
    assert find_heads(WithHead(None)) == find_heads(Refusing()) == find_heads(head) == []
