"""Small models for the runtime tests, plain autograd to hold them against, and what several files ask of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import losia_fx
from losia_fx.compile.backend import losia_backend

VOCABULARY = 40


def needs_traced_experts() -> None:
    """Skips a test of a float32 mixture whose every weight learns in one graph.

    transformers 5.17's product of experts has a backward that reads the offsets, and torch.compile breaks the graph of
    a plain model at each; later ones hide it in an op. Under losia_fx it is one of ours, with any transformers.
    """
    import transformers.integrations.moe  # noqa: F401

    if not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        pytest.skip("this transformers' product of experts has a backward that no compiler traces")


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool, breaks: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.down(x)


class Block(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool, breaks: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width, bias=bias)
        self.mlp = Mlp(width, inner, bias, breaks)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x.cumsum(1) / 4)
        return x + self.mlp(self.norm(x))


class Toy(nn.Module):
    """A language model of linears: embedding, blocks, norm, head."""

    def __init__(
        self,
        layers: int = 2,
        width: int = 16,
        inner: int = 24,
        bias: bool = False,
        breaks: bool = False,
        checkpointed: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, inner, bias, breaks) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.checkpointed = checkpointed
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.head(self.norm(x))


def batch(size: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, VOCABULARY, (size, length))


def loss_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def plain_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter by plain autograd on a copy."""
    twin = copy.deepcopy(model).requires_grad_(True)
    loss_of(twin, ids).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def assert_subnet_gradients(
    model: nn.Module, expected: dict[str, Tensor], names: Iterable[str] | None = None, tolerance: float = 1e-5
) -> None:
    """Every subnet's gradient is its block of the plain gradient."""
    subnets = losia_fx.subnets(model)
    names = list(subnets) if names is None else list(names)
    assert names
    for name in names:
        subnet = subnets[name]
        assert subnet.values.grad is not None, f"{name} has no gradient"
        block = expected[name][subnet.rows][:, subnet.cols]
        assert block.abs().max() > 0, f"{name}: nothing to compare"
        torch.testing.assert_close(
            subnet.values.grad, block.to(subnet.values.dtype), rtol=tolerance, atol=tolerance * float(block.abs().max())
        )


def by_string(model: nn.Module, **options: Any) -> Any:
    """What torch.compile(model, backend="losia", options=...) gives, installed or not."""
    backend: Any = "losia" if "losia" in torch._dynamo.list_backends(()) else losia_backend
    return torch.compile(model, backend=backend, options={"compiler": "aot_eager", **options})


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What must be the same of two models that are said to be the same, tensors aside."""
    hooks = [key for key in nn.Module().__dict__ if "hooks" in key]
    seen: dict[str, Any] = {"type": type(model)}
    for name, module in model.named_modules():
        seen[name] = {
            "type": type(module),
            "attributes": sorted(module.__dict__),
            "hooks": {key: len(getattr(module, key)) for key in hooks},
            "buffers": sorted(module._non_persistent_buffers_set),
            "training": module.training,
        }
    seen["parameters"] = {name: (p.requires_grad, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}
    seen["buffers"] = sorted(name for name, _ in model.named_buffers())
    seen["keys"] = list(model.state_dict())
    return seen


def tiny_llama(layers: int = 2, tied: bool = False, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=True,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config)
