"""Joint graphs before and after SinkGathers, counted, and the small blocks that make them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import losia_fx
from losia_fx import LosiaConfig
from losia_fx._compat import aot_compiler, install_call
from losia_fx.api.transform import CompiledCall
from losia_fx.compile.backend import LosiaBackend

aten = torch.ops.aten
WIDTH, INNER = 16, 24


@dataclass(frozen=True)
class Counted:
    of_x: int
    """Gathers of inputs of products, whether the backward alone needs them or not."""
    of_gradients: int
    indexed: int
    """What a gather that was moved has become: x[..., cols] further up."""
    random: int
    nodes: int


def count(graph: fx.Graph) -> Counted:
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        if "tangents" in str(node.target) or backward.intersection(node.all_input_nodes):
            backward.add(node)
    gathers = graph.find_nodes(op="call_function", target=aten.gather.default)
    overloads = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return Counted(
        of_x=len([node for node in gathers if node not in backward]),
        of_gradients=len([node for node in gathers if node in backward]),
        indexed=len(graph.find_nodes(op="call_function", target=aten.index.Tensor)),
        random=len([node for node in overloads if torch.Tag.nondeterministic_seeded in node.target.tags]),
        nodes=len(graph.nodes),
    )


class Attended(nn.Module):
    """Four linears around a norm, the first three of which share their x."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.o(self.q(h) * self.k(h) * self.v(h))


class Gated(nn.Module):
    def __init__(self, norm: nn.Module, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(self.act(self.gate(h)) * self.up(h))


class Mlp(nn.Module):
    def __init__(self, norm: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def rms() -> nn.Module:
    return nn.RMSNorm(WIDTH)


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "rms, q k v": lambda: Attended(rms()),
    "layer norm, q k v": lambda: Attended(layer_norm()),
    "gated": lambda: Gated(rms()),
    "gelu": lambda: Mlp(rms(), F.gelu),
    "gelu of tanh": lambda: Mlp(rms(), lambda x: F.gelu(x, approximate="tanh")),
    "silu": lambda: Mlp(rms(), F.silu),
    "gated by relu": lambda: Gated(rms(), F.relu),
    "gated by tanh": lambda: Gated(rms(), torch.tanh),
    "relu": lambda: Mlp(rms(), F.relu),
    "squared relu": lambda: Mlp(rms(), squared_relu),
    "dropout of none": lambda: Mlp(rms(), lambda x: F.dropout(F.gelu(x), 0.0)),
    "no norm": lambda: Mlp(nn.Identity(), F.gelu),
}


class Stack(nn.Module):
    """Blocks after one another; ``shows``: what the first block's norm gives is an output too."""

    def __init__(
        self, make: Callable[[], nn.Module], layers: int = 2, checkpointed: bool = False, shows: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.checkpointed, self.shows = checkpointed, shows

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        shown = self.layers[0].norm(x) if self.shows else x
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return (x, shown) if self.shows else x


def drawn(model: nn.Module) -> nn.Module:
    """Norms and biases drawn too: as ones and zeros they would hide what is left out."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def losia(model: nn.Module, decompositions: str = "aot_eager", **options: Any) -> nn.Module:
    """A transformed copy whose joint graphs have the decompositions of that compiler, and run uncompiled."""
    config = LosiaConfig.of(LosiaConfig(rank_factor=0.25, compiler="aot_eager"), options)
    twin = losia_fx.transform(copy.deepcopy(model), config)
    inner = aot_compiler(decompositions, lambda gm: None, lambda gm: None)
    install_call(twin, CompiledCall(twin, config, LosiaBackend(config, inner=inner)))
    return twin


def lively(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An x that asks for a gradient, as what an embedding gives does where it learns."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Of all outputs, no two elements alike in weight."""
    outputs = model(x)
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack(
        [(part.float() * torch.linspace(0.5, 1.5, part.numel()).view_as(part)).sum() for part in parts]
    ).sum()


def plain_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    twin = copy.deepcopy(model)
    loss_of(twin, x).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
