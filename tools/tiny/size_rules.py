"""How small each attribute of a configuration becomes, by its name; data for shrink_config."""

from __future__ import annotations

import re


class Width(int):
    """A size that others have to fit: where these do not, all of a model's own are divided by one number instead."""


class Unit(int):
    """A size that widths are multiples of: left as it is where they are divided."""


WIDTH, INNER, HEADS, KEY_HEADS, HEAD_DIM = Width(64), Width(96), Width(4), Width(2), Unit(16)
VOCABULARY = 99
IMAGE, PATCH, WINDOW = Unit(64), Unit(16), Unit(2)
MOST_PIXELS = 256  # of a side, where patches and windows keep their sizes
LAYERS, MOST_LAYERS = 2, 6

# The first pattern that matches the whole name of an attribute gives its size. None: the value stays.
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"num_channels|in_chan\w*|audio_channels|channels|out_channels|.*(kernel|stride|padding|ratio|factor).*", None),
    (
        r"num_conv_pos_embedding.*|patch_embed_hidden_size|.*temperature.*|chunk_size_feed_forward|.*_layer_offset|.*dropout.*|num_labels",
        None,
    ),
    (r"n_positions|n_ctx|max_.*position_embeddings|context_length|max_(source|target)_positions|seq_length", 64),
    (r"type_vocab_size", 3),
    (r".*codebook_size", 64),
    (r".*(vocab_size|group_vocab).*|num_embeddings|vocab_offset", VOCABULARY),
    (r".*(key_value_heads|kv_heads|head_kv|key_heads|multi_query_group_num)(_per_layer)?", KEY_HEADS),
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
    (r"\w*window_size\w*", WINDOW),
    (r"sliding_window.*|local_attention|attention_chunk_size|block_size|attention_window", 8),
    (r"chunk_size|\w*_chunk_size|index_topk|mm_tokens_per_image", 8),
    (r".*(hidden_size|hidden_dim|d_model|d_latents|n_embd|embed_dim|hidden_channels)\w*", WIDTH),
    (r".*(embedding_size|embedding_dim)\w*", WIDTH),
    (r"(?!kv|pad).*(_dim|output_size|_channels|proj_size|width)|hidden_sizes|embed_dims|backbone_channel_list", WIDTH),
    (r"num_queries|num_query_tokens|num_latents|num_image_tokens|image_seq_length|num_denoising|latent_query_num", 8),
    (r"num_mel_bins", 16),
    (r"upsample_groups", WIDTH),
    (r"train_num_points", 32),
    (r"n_filters|num_filters", 8),
    (r"context_size", 32),
)
LAYER_COUNTS = re.compile(r"(?!.*(feature|adapter|nextn|shared)).*(_layers|n_layer|num_blocks|depth|num_stages_layers)")
# Numbers of layers: which of them have something, or whose outputs are taken.
LAYER_NUMBERS = re.compile(r"(?!_|out_)\w*(index|indexes|indices|layers|block_ids|layer_ids|global_attention_blocks)")
# State space models: heads x head_dim = expand x hidden_size.
SSM = (
    ("expand", "num_heads", "head_dim"),
    ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
    ("mamba_expand", "n_mamba_heads", "mamba_headdim"),
)
DEPTHS = re.compile(r"\w*depths?|blocks_per_stage|stage_num_blocks|num_blocks")
STOPPED = re.compile(
    r".*(dropout|dropout_prob|drop_?prob|pdrop|drop|drop_path_rate|drop_rate|dropout_rate|layerdrop|jitter_noise)"
    r"|mask_(time|feature)_prob|.*_dropout_\w+"
)
TOKEN = re.compile(r".*(_token_id|_token_index|_token_ids|start_id|end_id)")
ORDINARY_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# What cannot be built where a configuration leaves it open. Plain numbers: Dynamo knows no others.
DEFAULTS = {
    "head_dim": int(HEAD_DIM),
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "moe_intermediate_size": int(INNER),
    "top_k_experts": 2,
    "prediction_length": 8,
    "context_length": 16,
    "indexer_n_heads": int(HEADS),
    "indexer_kv_heads": 1,
    "indexer_head_dim": int(HEAD_DIM),
    "num_key_value_heads": int(HEADS),
}
FITTED_DEFAULTS = ("head_dim", "moe_intermediate_size", "num_key_value_heads")
"""Of these, the ones that follow from widths, which a configuration that keeps its own derives."""
OFF = ("use_cache", "apply_spec_augment", "use_timm_backbone", "use_pretrained_backbone", "output_router_logits")
