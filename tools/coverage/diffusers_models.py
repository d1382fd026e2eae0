"""Tiny models of diffusers: UNets, diffusion transformers, autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..tiny.model import Recipe, TinyModel, made

Batch = dict[str, Any]
B = 2
"""The size of a batch."""


def floats(*shape: int) -> Tensor:
    return torch.randn(B, *shape)


def steps() -> Tensor:
    return torch.randint(0, 1000, (B,))


def ones(*shape: int) -> Tensor:
    return torch.ones(B, *shape, dtype=torch.bool)


def of(name: str, batch: Callable[[], Batch], **config: Any) -> tuple[str, Recipe]:
    return name, Recipe(lambda: getattr(diffusers, name)(**config), batch)


def share() -> Tensor:
    return torch.rand(B)


def conditioned(
    text: int, *shape: int, length: int = 5, time: Callable[[], Tensor] = steps, **more: Any
) -> Callable[[], Batch]:
    """A latent image or video of this shape, a time, and ``length`` tokens of a text in ``text`` numbers each.

    more: other inputs, or what draws them.
    """
    return lambda: {
        "hidden_states": floats(*shape),
        "encoder_hidden_states": floats(length, text),
        "timestep": time(),
        **{name: make() if callable(make) else make for name, make in more.items()},
    }


def places(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 4, shape).float()


def sizes(side: int) -> Callable[[], Tensor]:
    return lambda: torch.full((B, 2), side)


def sample(*shape: int, text: int = 0) -> Callable[[], Batch]:
    """What a UNet takes."""
    return lambda: {
        "sample": floats(*shape),
        "timestep": steps(),
        **({"encoder_hidden_states": floats(4, text)} if text else {}),
    }


def picture(*shape: int) -> Callable[[], Batch]:
    return lambda: {"sample": floats(*shape)}


IO: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
UNET: dict[str, Any] = {**IO, "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1,
                        "sample_size": 16}  # fmt: skip
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
JOINT: dict[str, Any] = {**HEADS, "in_channels": 4, "joint_attention_dim": 24}
KL: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 4, "latent_channels": 4}

# fmt: off
RECIPES = dict((
    of("AllegroTransformer3DModel",
       conditioned(24, 4, 2, 8, 8),
       **HEADS, **IO, cross_attention_dim=32, sample_width=8, sample_height=8,
       sample_frames=8, caption_channels=24),
    of("AsymmetricAutoencoderKL",
       picture(3, 16, 16),
       down_block_out_channels=(16, 32), up_block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
       up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4),
    of("AuraFlowTransformer2DModel",
       conditioned(24, 4, 8, 8),
       sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16,
       num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=24, out_channels=4, pos_embed_max_size=64),
    of("AutoencoderKL",
       picture(3, 16, 16),
       **KL, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
    of("ChromaTransformer2DModel",
       conditioned(24, 16, 4, time=share, img_ids=places(16, 3), txt_ids=places(5, 3)),
       **JOINT, patch_size=1, num_single_layers=2, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
       approximator_hidden_dim=24, approximator_layers=2),
    of("CogVideoXTransformer3DModel",
       conditioned(24, 1, 4, 8, 8, length=8),
       **HEADS, **IO, time_embed_dim=16, text_embed_dim=24, sample_width=8, sample_height=8,
       sample_frames=8, max_text_seq_length=8),
    of("CogView4Transformer2DModel",
       conditioned(24, 4, 8, 8, original_size=sizes(64), target_size=sizes(64), crop_coords=sizes(0)),
       **HEADS, **IO, text_embed_dim=24, time_embed_dim=16, condition_dim=8),
    of("ControlNetModel",
       lambda: {**sample(4, 16, 16, text=24)(), "controlnet_cond": floats(3, 32, 32)},
       block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
       down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=24, attention_head_dim=4,
       conditioning_embedding_out_channels=(8, 16)),
    of("CosmosTransformer3DModel",
       conditioned(24, 4, 1, 8, 8, fps=30),
       in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
       text_embed_dim=24, adaln_lora_dim=16, max_size=(4, 32, 32), concat_padding_mask=False),
    of("DiTTransformer2DModel",
       lambda: {"hidden_states": floats(4, 8, 8), "timestep": steps(), "class_labels": torch.randint(0, 4, (B,))},
       **HEADS, in_channels=4, out_channels=8, num_embeds_ada_norm=8, sample_size=8),
    of("Flux2Transformer2DModel",
       conditioned(24, 16, 4, time=share, img_ids=places(B, 16, 4), txt_ids=places(B, 5, 4), guidance=share),
       **JOINT, num_single_layers=2, axes_dims_rope=(4, 4, 4, 4)),
    of("FluxTransformer2DModel",
       conditioned(24, 16, 4, time=share, img_ids=places(16, 3), txt_ids=places(5, 3),
           pooled_projections=lambda: floats(20)),
       **JOINT, num_single_layers=2, pooled_projection_dim=20, axes_dims_rope=(4, 4, 8)),
    of("HiDreamImageTransformer2DModel",
       lambda: {"hidden_states": floats(4, 8, 8), "encoder_hidden_states_t5": floats(5, 24),
           "encoder_hidden_states_llama3": torch.randn(2, B, 5, 20), "pooled_embeds": floats(16),
           "timesteps": steps()},
       **HEADS, patch_size=2, in_channels=4, out_channels=4, num_single_layers=2, caption_channels=[24, 20],
       text_emb_dim=16, num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(8, 4, 4),
       max_resolution=(32, 32), llama_layers=(0, 1, 0, 1), force_inference_output=True),
    of("HunyuanDiT2DModel",
       conditioned(24, 4, 8, 8, length=4, time=share, text_embedding_mask=lambda: ones(4),
           encoder_hidden_states_t5=lambda: floats(4, 24), text_embedding_mask_t5=lambda: ones(4),
           image_meta_size=lambda: torch.randint(1, 64, (B, 6)).float(), style=lambda: torch.tensor([0] * B),
           image_rotary_emb=lambda: [torch.rand(16, 16), torch.rand(16, 16)]),
       **HEADS, sample_size=8, patch_size=2, in_channels=4, cross_attention_dim=24, cross_attention_dim_t5=24,
       pooled_projection_dim=16, hidden_size=32, text_len=4, text_len_t5=4),
    of("HunyuanVideoTransformer3DModel",
       conditioned(24, 4, 1, 8, 8, pooled_projections=lambda: floats(16), encoder_attention_mask=lambda: ones(5),
           guidance=steps),
       **HEADS, **IO, num_single_layers=2, num_refiner_layers=2, text_embed_dim=24,
       pooled_projection_dim=16, rope_axes_dim=(4, 4, 8)),
    of("LTXVideoTransformer3DModel",
       conditioned(24, 32, 4, time=share, encoder_attention_mask=lambda: ones(5), num_frames=2, height=4,
           width=4),
       **HEADS, **IO, cross_attention_dim=32, caption_channels=24),
    of("LatteTransformer3DModel",
       conditioned(24, 4, 2, 8, 8),
       **HEADS, sample_size=8, patch_size=2, caption_channels=24, in_channels=4, cross_attention_dim=32,
       out_channels=8, attention_bias=True, norm_type="ada_norm_single", video_length=2),
    of("Lumina2Transformer2DModel",
       conditioned(24, 4, 8, 8, encoder_attention_mask=lambda: ones(5)),
       sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=2, num_attention_heads=2,
       num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 8), axes_lens=(32, 32, 32), cap_feat_dim=24),
    of("MochiTransformer3DModel",
       conditioned(24, 4, 2, 8, 8, encoder_attention_mask=lambda: ones(5)),
       **HEADS, in_channels=4, pooled_projection_dim=24, text_embed_dim=24, time_embed_dim=16, max_sequence_length=5),
    of("PixArtTransformer2DModel",
       conditioned(24, 4, 8, 8, added_cond_kwargs={"aspect_ratio": None, "resolution": None}),
       **HEADS, sample_size=8, in_channels=4, out_channels=8, cross_attention_dim=32, caption_channels=24,
       use_additional_conditions=False),
    of("PriorTransformer",
       lambda: {"hidden_states": floats(24), "timestep": steps(), "proj_embedding": floats(24),
           "encoder_hidden_states": floats(7, 24)},
       **HEADS, embedding_dim=24, num_embeddings=7, additional_embeddings=4),
    of("QwenImageTransformer2DModel",
       conditioned(24, 16, 16, time=share, encoder_hidden_states_mask=lambda: ones(5).long(),
           img_shapes=[(1, 4, 4)] * B),
       **{**JOINT, "in_channels": 16}, out_channels=4, axes_dims_rope=(8, 4, 4)),
    of("SD3Transformer2DModel",
       conditioned(24, 4, 8, 8, pooled_projections=lambda: floats(20)),
       **JOINT, sample_size=8, patch_size=1, caption_projection_dim=32, pooled_projection_dim=20, out_channels=4,
       pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm"),
    of("SanaTransformer2DModel",
       conditioned(24, 4, 8, 8),
       **HEADS, **IO, num_cross_attention_heads=2, cross_attention_head_dim=16,
       cross_attention_dim=32, caption_channels=24, sample_size=8),
    of("StableAudioDiTModel",
       lambda: {"hidden_states": floats(4, 8), "timestep": share(), "encoder_hidden_states": floats(5, 24),
           "global_hidden_states": floats(1, 20)},
       **HEADS, **IO, sample_size=8, num_key_value_attention_heads=1, cross_attention_dim=24,
       cross_attention_input_dim=24, global_states_input_dim=20, time_proj_dim=16),
    of("StableCascadeUNet",
       lambda: {"sample": floats(4, 8, 8), "timestep_ratio": share(), "clip_text_pooled": floats(1, 24),
           "clip_text": floats(5, 24), "clip_img": floats(1, 24)},
       in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, patch_size=1, conditioning_dim=32,
       block_out_channels=(16, 32), num_attention_heads=(2, 2), down_num_layers_per_block=(2, 2),
       up_num_layers_per_block=(2, 2), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
       block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
       clip_text_in_channels=24,
       clip_text_pooled_in_channels=24, clip_image_in_channels=24, clip_seq=4, self_attn=True, dropout=(0.0, 0.0),
       switch_level=[False]),
    of("Transformer2DModel",
       conditioned(24, 16, 8, 8),
       **HEADS, in_channels=16, norm_num_groups=4, cross_attention_dim=24, only_cross_attention=False),
    of("UNet1DModel",
       sample(14, 16),
       block_out_channels=(8, 8, 16, 16), in_channels=14, out_channels=14, time_embedding_type="positional",
       use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1.0, out_block_type="OutConv1DBlock",
       mid_block_type="MidResTemporalBlock1D", down_block_types=("DownResnetBlock1D",) * 4,
       up_block_types=("UpResnetBlock1D",) * 3, act_fn="swish"),
    of("UNet2DConditionModel",
       sample(4, 16, 16, text=24),
       **UNET, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
       up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=4),
    of("UNet2DModel",
       sample(4, 16, 16),
       **UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
       attention_head_dim=4),
    of("UNet3DConditionModel",
       sample(4, 2, 8, 8, text=24),
       **UNET, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
       up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=24, attention_head_dim=4),
    of("UNetMotionModel",
       lambda: {"sample": floats(4, 2, 8, 8), "timestep": torch.tensor([10]),
           "encoder_hidden_states": torch.randn(2 * B, 4, 24)},
       **UNET, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
       up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=24, num_attention_heads=2,
       motion_num_attention_heads=2),
    of("UNetSpatioTemporalConditionModel",
       lambda: {"sample": floats(2, 4, 8, 8), "timestep": torch.tensor([10]), "encoder_hidden_states": floats(1, 24),
           "added_time_ids": torch.rand(B, 3)},
       block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
       up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=24,
       num_attention_heads=2, out_channels=4, in_channels=4, layers_per_block=1, sample_size=8,
       projection_class_embeddings_input_dim=48, addition_time_embed_dim=16),
    of("UVit2DModel",
       lambda: {"input_ids": torch.randint(0, 32, (B, 8, 8)), "encoder_hidden_states": floats(5, 24),
           "pooled_text_emb": floats(24), "micro_conds": torch.rand(B, 5)},
       hidden_size=32, cond_embed_dim=24, micro_cond_encode_dim=8, micro_cond_embed_dim=40, encoder_hidden_size=24,
       vocab_size=32, codebook_size=32, in_channels=32, block_out_channels=32, num_res_blocks=1, num_hidden_layers=2,
       num_attention_heads=2, block_num_heads=2, intermediate_size=48, sample_size=8),
    of("VQModel",
       picture(3, 16, 16),
       block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
       up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=8),
    of("WanTransformer3DModel",
       conditioned(24, 4, 2, 8, 8),
       **{**HEADS, "attention_head_dim": 12}, in_channels=4, out_channels=4, text_dim=24, freq_dim=16, ffn_dim=48,
       rope_max_seq_len=32),
))
# fmt: on


def names() -> tuple[str, ...]:
    return tuple(RECIPES)


def build(name: str, dtype: torch.dtype = torch.float32) -> TinyModel:
    return made(RECIPES, name, dtype)
