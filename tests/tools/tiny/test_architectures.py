"""Tiny models of any architecture: real in structure, and every part of them with a gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from losia_fx.errors import LosiaError
from losia_fx.tools.tiny.architectures import build, names
from losia_fx.tools.tiny.shrink_config import common_ratio, shrink
from losia_fx.tools.tiny.size_rules import LAYERS, VOCABULARY, WIDTH

FAMILIES = {
    "llama": {"input_ids", "labels"},
    "mixtral": {"input_ids", "labels"},
    "t5": {"input_ids", "decoder_input_ids", "labels"},
    "vit": {"pixel_values", "labels"},
    "wav2vec2": {"input_values", "labels"},
    "llava": {"input_ids", "pixel_values", "labels"},
    "detr": {"pixel_values"},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plain_step(model_type: str) -> None:
    tiny = build(model_type)
    assert set(tiny.batch) == FAMILIES[model_type]
    assert tiny.model.training
    assert sum(p.numel() for p in tiny.model.parameters()) < 2_000_000
    loss = tiny.loss(tiny.model(**tiny.batch))
    loss.backward()
    assert torch.isfinite(loss)
    grads = [p.grad for p in tiny.model.parameters() if p.grad is not None]
    assert sum(bool(grad.any()) for grad in grads) > len(list(tiny.model.parameters())) // 2


def test_structure_is_kept() -> None:
    config = build("mixtral").model.config
    assert config.num_hidden_layers == LAYERS
    assert config.num_local_experts == 4
    assert config.num_experts_per_tok == 2
    assert config.num_key_value_heads < config.num_attention_heads
    kinds = set(build("qwen3_next").model.config.layer_types)
    assert kinds == {"linear_attention", "full_attention"}


def test_sizes_are_plain_numbers() -> None:
    """Dynamo breaks a graph at a shape with another kind of int in it (2.11)."""
    for architecture in ("mixtral", "bert"):
        config = vars(build(architecture).model.config)
        numbers = {name: type(value) for name, value in config.items() if isinstance(value, int)}
        assert set(numbers.values()) <= {int, bool}, numbers


def test_dtype() -> None:
    tiny = build("llama", torch.float64)
    assert {p.dtype for p in tiny.model.parameters()} == {torch.float64}
    assert tiny.model(**tiny.batch).logits.dtype == torch.float64
    floats = {v.dtype for v in build("vit", torch.float64).batch.values() if v.is_floating_point()}
    assert floats == {torch.float64}


def test_same_every_time() -> None:
    first, second = build("llama"), build("llama")
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(first.batch, second.batch, rtol=0, atol=0)


def test_nothing_is_zeros_or_ones() -> None:
    constant = [name for name, p in build("bert").model.named_parameters() if p.numel() > 1 and p.unique().numel() == 1]
    assert constant == []


def test_list() -> None:
    found = names()
    assert list(found) == sorted(set(found))
    assert set(FAMILIES) < set(found)
    assert len(found) > 280
    assert "clip" in found
    assert "qwen2_vl_text" not in found  # a part of qwen2_vl


def test_unknown_type() -> None:
    with pytest.raises(LosiaError, match="'lama': transformers has no such model type"):
        build("lama")


def test_widths_that_have_to_fit_are_divided_by_one_number() -> None:
    config = CONFIG_MAPPING["clvp"]()
    before = (config.text_config.hidden_size, config.text_config.num_attention_heads, config.text_config.projection_dim)
    assert common_ratio(config) == 4  # 12 heads
    shrink(config, common_ratio(config))
    text = config.text_config
    assert (text.hidden_size, text.num_attention_heads, text.projection_dim) == tuple(size // 4 for size in before)
    assert (text.num_hidden_layers, text.vocab_size) == (LAYERS, VOCABULARY)
    tiny = build("clvp")
    assert tiny.model.config.text_config.hidden_size == text.hidden_size
    assert tiny.note == ""


def test_a_part_stands_for_what_does_not_run_whole() -> None:
    tiny = build("bark")
    assert tiny.note == "its semantic alone"
    assert type(tiny.model).__name__ == "BarkSemanticModel"
    tiny.loss(tiny.model(**tiny.batch)).backward()


def test_float32_rather_than_other_sizes() -> None:
    with pytest.raises(LosiaError, match=r"mixtral: cannot be built: .*Double"):
        build("mixtral", torch.float64)
    assert build("mixtral").model.config.hidden_size == WIDTH
