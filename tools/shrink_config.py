"""Makes any transformers configuration tiny, by the names of its attributes; nothing here knows an architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

WIDTH, INNER, HEADS, HEAD_DIM = 64, 96, 4, 16
VOCABULARY = 99
IMAGE, PATCH = 64, 16
LAYERS, MOST_LAYERS = 2, 6

# The first pattern that matches the whole name of an attribute gives its size. None: the value stays.
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"num_channels|in_chan\w*|audio_channels|channels|out_channels|.*(kernel|stride|padding|ratio|factor).*", None),
    (r"num_conv_pos_embedding.*|.*temperature.*|chunk_size_feed_forward|.*_layer_offset|.*dropout.*|num_labels", None),
    (r"n_positions|n_ctx|max_.*position_embeddings|context_length|max_(source|target)_positions|seq_length", 64),
    (r"type_vocab_size", 3),
    (r".*codebook_size", 64),
    (r".*vocab_size.*|num_embeddings|vocab_offset", VOCABULARY),
    (r".*(key_value_heads|kv_heads|head_kv|key_heads|multi_query_group_num)", 2),
    (r"(?!.*dim).*(heads|n_head|num_head)", HEADS),
    (r"rotary_dim|.*(head_dim|dim_head|d_head|d_kv|head_size|kv_channels|headdim)|query_pre_attn_scalar", HEAD_DIM),
    (r".*(lora_rank|low_rank_dim|low_rank|rank_dim)", 16),
    (r".*(state_size|d_state|time_step_rank|dt_rank)", 8),
    (r".*(intermediate|ffn|inner|mlp|feedforward|feed_forward)_?\w*(size|dim|channels)|d_ff|n_inner|d_inner", INNER),
    (r".*(experts_per_tok|experts_per_token|moe_topk|moe_k|moe_top_k|top_k_experts|num_selected_experts)", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|topk_group|num_nextn_predict_layers", 1),
    (r".*num_experts|n_routed_experts|num_local_experts|n_experts", 4),
    (r"n_groups?|num_groups?|num_expert_groups?", 2),
    (r"first_k_dense_replace|moe_layer_start_index", 1),
    (r"num_kv_shared_layers", 0),
    (r".*(layer_period|layer_frequency|layer_interval|sliding_window_pattern|cross_attention_frequency)", 2),
    (r"(image|crop|input|pretrain_image)_size", IMAGE),
    (r"patch_size|.*_patch_size", PATCH),
    (r"\w*window_size\w*", 2),
    (r"sliding_window.*|local_attention|attention_chunk_size|block_size|attention_window", 8),
    (r"chunk_size|\w*_chunk_size|index_topk|mm_tokens_per_image", 8),
    (
        r".*(hidden_size|hidden_dim|d_model|d_latents|n_embd|embed_dim|hidden_channels|embedding_size|embedding_dim)\w*",
        WIDTH,
    ),
    (r"(?!kv|pad).*(_dim|output_size|_channels|proj_size|width)|hidden_sizes|embed_dims", WIDTH),
    (r"num_queries|num_query_tokens|num_latents|num_image_tokens|image_seq_length|num_denoising|latent_len", 8),
    (r"num_mel_bins", 16),
    (r"train_num_points", 32),
)
LAYER_COUNTS = re.compile(r"(?!.*(feature|adapter|nextn|shared)).*(_layers|n_layer|num_blocks|depth|num_stages_layers)")
# State space models: heads x head_dim = expand x hidden_size.
SSM = (
    ("expand", "num_heads", "head_dim"),
    ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
    ("mamba_expand", "n_mamba_heads", "mamba_headdim"),
)
DEPTHS = re.compile(r"\w*depths?|blocks_per_stage|stage_num_blocks|num_blocks")
STOPPED = re.compile(
    r".*(dropout|dropout_prob|drop_?prob|pdrop|drop|drop_path_rate|drop_rate|layerdrop|jitter_noise)"
    r"|mask_(time|feature)_prob|.*_dropout_\w+"
)
TOKEN = re.compile(r".*(_token_id|_token_index|_token_ids|start_id|end_id)")
ORDINARY_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# What cannot be built where a configuration leaves it open.
DEFAULTS = {
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
OFF = ("use_cache", "apply_spec_augment", "use_timm_backbone", "use_pretrained_backbone", "output_router_logits")


def shrink(config: PretrainedConfig) -> None:
    """Edits ``config`` and the configurations in it: widths, layers, heads, experts, vocabularies; no dropout."""
    tokens: dict[str, int] = {}
    for part in nested(config):
        _shrink(part, tokens)


def nested(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """``config`` and every configuration inside it."""
    yield config
    for value in vars(config).values():
        values = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        for item in values:
            if isinstance(item, PretrainedConfig):
                yield from nested(item)


def _shrink(config: PretrainedConfig, tokens: dict[str, int]) -> None:
    kept = kept_layers(config)
    before = dict(vars(config))
    for name, value in before.items():
        new = _shrunk(name, value, tokens, kept)
        if new is not value:
            setattr(config, name, new)
    _repair(config, before)


def layer_counts(config: PretrainedConfig) -> dict[str, int]:
    values = vars(config)
    return {k: v for k, v in values.items() if type(v) is int and v > 0 and LAYER_COUNTS.fullmatch(k)}


def kept_layers(config: PretrainedConfig) -> dict[int, list[int]]:
    """By the number of layers that a count of the configuration gives: the layers to keep, one of each kind at least."""
    kept = {}
    stages = next((len(v) for k, v in vars(config).items() if DEPTHS.fullmatch(k) and isinstance(v, (list, tuple))), 0)
    for count in set(layer_counts(config).values()) - {stages}:
        lists = [v for k, v in vars(config).items() if _per_layer(k, v) and len(v) == count > LAYERS]
        kinds: dict[Any, int] = {}
        for index in range(count):
            kinds.setdefault(tuple(str(values[index]) for values in lists if _is_kind(values)), index)
        least = max(LAYERS, 0 if stages else len(getattr(config, "_out_indices", None) or ()))
        chosen = sorted(kinds.values())[:MOST_LAYERS]
        chosen += [index for index in range(count) if index not in chosen][: max(0, least - len(chosen))]
        kept[count] = sorted(chosen)
    return kept


def _per_layer(name: str, values: Any) -> bool:
    return isinstance(values, (list, tuple)) or (isinstance(values, str) and "pattern" in name)


def _is_kind(values: Any) -> bool:
    return all(isinstance(value, (str, bool, list, tuple)) for value in values) or len(set(values)) <= 3


def _shrunk(name: str, value: Any, tokens: dict[str, int], kept: dict[int, list[int]]) -> Any:
    if value is None:
        return DEFAULTS.get(name)
    if isinstance(value, PretrainedConfig):
        return value
    if name in OFF:
        return False
    if TOKEN.fullmatch(name):
        return _token(name, value, tokens)
    if STOPPED.fullmatch(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return type(value)(0)
    if isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        if value in kept and LAYER_COUNTS.fullmatch(name):
            return min(value, len(kept[value]))
        return _size(name, value)
    if isinstance(value, (str, list, tuple)) and value:
        return _sequence(name, value, kept)
    if isinstance(value, dict):
        return _rope(value) if name in ("rope_parameters", "rope_scaling") else value
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    value = {key: _rope(item) if isinstance(item, dict) else item for key, item in value.items()}
    if "rope_theta" in value:
        half = int(HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
        third = 3 * half // 8
        value["mrope_section"] = [half - 2 * third, third, third]
    if "original_max_position_embeddings" in value:
        value["original_max_position_embeddings"] = 32
    for key in ("short_factor", "long_factor"):
        if key in value:
            value[key] = [1.0] * (HEAD_DIM // 2)
    return value


def _token(name: str, value: Any, tokens: dict[str, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_token(f"{name}{i}", item, tokens) for i, item in enumerate(value))
    if not isinstance(value, int) or value < 0:
        return value
    if name in ORDINARY_TOKENS:
        return ORDINARY_TOKENS[name]
    return tokens.setdefault(name.removesuffix("_id").removesuffix("_index"), VOCABULARY - 1 - len(tokens))


def _size(name: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return value if size is None else min(value, size)
    return value


def _sequence(name: str, values: Any, kept: dict[int, list[int]]) -> Any:
    if isinstance(values, str):
        if "pattern" not in name:
            return values
        return "".join(values[i] for i in kept[len(values)]) if len(values) in kept and len(values) > LAYERS else values
    make = list if isinstance(values, list) else tuple
    if DEPTHS.fullmatch(name) and all(type(v) is int for v in values):
        return make(2 if i == 1 else 1 for i in range(len(values)))
    if len(values) in kept and len(values) > LAYERS:
        values = make(values[i] for i in kept[len(values)])
    elif (
        re.fullmatch(r"(?!_)\w*(index|indexes|indices|layers|block_ids|layer_ids|global_attention_blocks)", name)
        and kept
    ):
        return _indices(values, kept)
    if all(type(v) is int for v in values):
        return make(_stages(name, values))
    return values


def _indices(values: Any, kept: dict[int, list[int]]) -> Any:
    """Layer numbers, spread over the layers that are left."""
    make = list if isinstance(values, list) else tuple
    if not all(type(v) is int for v in values):
        return values
    count = max(kept)
    last = len(kept[count]) - 1
    return make(v if v < 0 else min(last, round(v * last / max(1, count - 1))) for v in values)


def _stages(name: str, values: Any) -> list[int]:
    """Sizes stage by stage: the same ones stay the same, bigger ones stay bigger."""
    size = _size(name.removesuffix("s"), max(values))
    if size == max(values):
        size = _size(name, max(values))
    if size == max(values):
        return list(values)
    if "image" in name or size not in (WIDTH, INNER):
        return [min(v, 2 if size == HEADS else size) for v in values]
    order = sorted(set(values))
    return [min(v, size if len(order) == 1 else 16 * (order.index(v) + 1)) for v in values]


def _repair(config: PretrainedConfig, before: dict[str, Any]) -> None:
    """What has to fit together beyond each size by itself."""
    values = vars(config)
    for name in values:
        heads = name.replace("key_value", "attention")
        if heads != name and before.get(heads) == before[name]:
            setattr(config, name, values[heads])
    if "stage_names" in values and isinstance(values["stage_names"], list):
        _repair_stages(config)
    for inner, heads, head_dim in SSM:
        if {inner, heads, head_dim} <= values.keys() and "hidden_size" in values:
            setattr(config, head_dim, values[inner] * values["hidden_size"] // values[heads])
    if "embed_dim_per_stage" in values:
        config.hidden_size = values["embed_dim_per_stage"][0]
    if "qk_rope_head_dim" in values and "partial_rotary_factor" in (values.get("rope_parameters") or {}):
        config.rope_parameters["partial_rotary_factor"] = 1.0
    if {"qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim"} <= values.keys():
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim


def _repair_stages(config: PretrainedConfig) -> None:
    values = vars(config)
    names = values["stage_names"]
    counts = values.get("depths") or values.get("blocks_per_stage")
    stages = len(counts) if counts else getattr(config, "num_hidden_layers", len(names) - 1)
    if stages >= len(names) - 1:
        return
    config.stage_names = names[: stages + 1]
    wanted = len(values.get("_out_indices") or (0,))
    config._out_indices = list(range(stages + 1 - wanted, stages + 1))
    config._out_features = [config.stage_names[i] for i in config._out_indices]
