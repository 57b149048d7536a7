"""What single families of ``transformers`` need beyond the general rules of :mod:`benchmarks.reach.models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tokens = Callable[[int], Tensor]

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 4}  # latent attention has a key for every query head
# Of each stage the blocks: kernel, channels in and out, stride, squeeze-and-excitation.
_STAGES = [[[3, 16, 24, 1, False]], [[3, 24, 32, 2, False]], [[3, 32, 40, 2, False]], [[3, 40, 48, 2, False]]]
_STAGES += [[[5, 48, 64, 1, True]]]
_V4_STAGES = [[[3, 16, 16, 1, True]], [[3, 16, 24, 2, False]], [[3, 24, 32, 2, True]], [[3, 32, 48, 2, True]]]
_AUDIO = {"num_filters": 8, "depths": [1] * 7}

CONFIGS: dict[str, dict[str, Any]] = {
    # images
    "bit": {"embedding_size": 16, "num_groups": 4},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [2, 4, 4], "depth": [1, 2, 3]},
    "donut-swin": {"embed_dim": 16, "num_heads": [2, 4, 4, 4], "image_size": 128},
    "efficientnet": {"hidden_dim": 640, "width_coefficient": 0.5, "depth_coefficient": 0.5},
    "focalnet": {"embed_dim": 16, "hidden_sizes": [32, 64, 128, 128]},
    "hgnet_v2": {
        "hidden_sizes": [32, 64, 128, 256],
        "stem_channels": [3, 16, 24],
        "stage_in_channels": [24, 32, 64, 128],
        "stage_mid_channels": [16, 24, 32, 48],
        "stage_out_channels": [32, 64, 128, 256],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {"embed_dim": 16, "depths": [1, 2, 2, 1], "num_heads": [2, 4, 4, 4], "image_size": [64, 64]},
    "levit": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 4, 4], "depths": [1, 1, 1], "key_dim": [8] * 3},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.5},
    "mobilevit": {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
    "mobilevitv2": {"width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
    "perceiver": {"num_latents": 10, "d_latents": 40, "num_self_attends_per_block": 2, "num_blocks": 1}
    | {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "image_size": 16},
    "poolformer": {"hidden_sizes": [16, 32, 48, 64]},
    "pp_lcnet": {"block_configs": _STAGES, "class_expand": 80},
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "groups_width": 8},
    "swiftformer": {"depths": [1, 1, 2, 1], "embed_dims": [16, 24, 32, 48]},
    "swin": {"embed_dim": 16, "image_size": 128},
    "swinv2": {"embed_dim": 16, "image_size": 128},
    "textnet": {"hidden_sizes": [16, 16, 24, 32, 48], "stem_out_channels": 16, "image_size": [64, 64]},
    # backbones
    "maskformer-swin": {"embed_dim": 16, "image_size": 128},
    "pp_lcnet_v3": {"block_configs": _STAGES},
    "pp_lcnet_v4": {"stem_channels": [3, 8, 16], "block_configs": _V4_STAGES},
    "sapiens2": {"num_hidden_layers": 3, "num_first_full_attention_layers": 1, "num_last_full_attention_layers": 1}
    | {"num_key_value_attention_heads": 2},
    "vitpose_backbone": {"image_size": [64, 48], "patch_size": [16, 16], "part_features": 8, "num_experts": 1},
    # text
    "afmoe": {"num_shared_experts": 1},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT | _HYBRID,
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]}
    | {"encoder_config": {"hidden_size_global": 128}, "decoder_config": {"hidden_size_global": 128}}
    | {"global_config": {"hidden_size": 128}},
    "canine": {"local_transformer_stride": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]}
    | {
        "rope_parameters": {
            t: {"rope_type": "default", "rope_theta": 1e4} for t in ("sliding_attention", "full_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": _LATENT,
    "esm": {"vocab_size": 96, "mask_token_id": 4, "pad_token_id": 0},
    "esmc": _LATENT,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    | {"num_hidden_layers": 4, "hidden_size_per_layer_input": 12, "laurel_rank": 6, "intermediate_size": 56}
    | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _HYBRID,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_text": {"rel_extent": 16, "d_rel": 4},
    "inkling_text": {"rel_extent": 16, "d_rel": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LATENT | _HYBRID,
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 4},
    "longcat_flash": _LATENT | {"zero_expert_num": 2, "head_dim": 8},
    "markuplm": {"max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20, "max_depth": 4}
    | {"tag_pad_id": 18, "subs_pad_id": 18, "xpath_unit_hidden_size": 6},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "minicpm3": _LATENT,
    "ministral": {"head_dim": 16},
    "mistral4": _LATENT,
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 16, "embedding_rank": 20},
    "qwen3_5": _HYBRID,
    "qwen3_5_moe": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": _HYBRID
    | {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4}
    | {"indexer_compress_ratio": 2},
    "qwen3_asr": {"audio_config": {"downsample_hidden_size": 16, "output_dim": 64}},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [24, 40]}
    | {"attention_head_size": 16, "feed_forward_size": 88, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4}
    | {"num_buckets": 2, "hash_seed": 0, "max_position_embeddings": 16},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 10, "no_token_index": 11},
    "siglip2": {"vision_config": {"num_patches": 16, "patch_size": 8}},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # it rounds the sizes of heads up to 64
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _AUDIO, "semantic_tokenizer_encoder_config": _AUDIO},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {"layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 3}
    | {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def _codes(tokens: Tokens, generator: torch.Generator) -> dict[str, Tensor]:
    """Four codebooks for each of two examples."""
    return {"input_ids": tokens(7).repeat(4, 1)}


def _patches(tokens: Tokens, generator: torch.Generator) -> dict[str, Tensor]:
    """An image that was cut into 4 x 4 patches of 8 x 8 pixels beforehand."""
    return {
        "pixel_values": torch.randn(2, 16, 3 * 8 * 8, generator=generator),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _image_and_text(tokens: Tokens, generator: torch.Generator) -> dict[str, Tensor]:
    """An image of four tokens (of index 95), then text."""
    ids = torch.cat([torch.full((2, 4), 95), tokens(5)], dim=1)
    types = (ids == 95).long()
    return {"input_ids": ids, "token_type_ids": types, "pixel_values": torch.randn(2, 3, 64, 64, generator=generator)}


def _two_streams(tokens: Tokens, _: torch.Generator) -> dict[str, Any]:
    """As ``generate`` calls it: the last token is predicted in a stream of its own."""
    hidden = torch.zeros(2, 8, 8)
    hidden[:, :, -1] = 1.0
    return {"input_ids": tokens(8), "perm_mask": hidden, "target_mapping": hidden[:, -1:]}


INPUTS: dict[str, Callable[[Tokens, torch.Generator], dict[str, Any]]] = {
    "blt": lambda tokens, _: {"input_ids": tokens(8), "use_cache": False},
    "imagegpt": lambda tokens, _: {"input_ids": tokens(9)},
    "musicgen": _codes,
    "musicgen_melody": _codes,
    "reformer": lambda tokens, _: {"input_ids": tokens(16)},
    "shieldgemma2": _image_and_text,
    "siglip2": _patches,
    "xlnet": _two_streams,
}

OUT_OF_SCOPE: dict[str, str] = {
    "gemma4_assistant": "drafts from the keys and values of another model",
    "gemma4_unified_assistant": "drafts from the keys and values of another model",
    "nemo_speechlm": "needs speech",
    "voxtral_realtime": "needs speech",
}
