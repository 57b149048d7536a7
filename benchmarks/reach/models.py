"""One small random model of every image, backbone and text family of the installed ``transformers``.

Families are read from the auto mappings of ``transformers``, so a new release brings its new families along.
Their configurations are shrunk by the names of their fields; :mod:`benchmarks.reach.overrides` holds what a
family needs beyond that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto

from benchmarks.reach.overrides import CONFIGS, INPUTS, OUT_OF_SCOPE

VOCABULARY = 96
CLASSES = 5
# A family that several mappings name is taken from the first: BERT is an encoder, BART a sequence-to-sequence model.
MAPPINGS = (
    ("image", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("backbone", "MODEL_FOR_BACKBONE_MAPPING_NAMES"),
    ("seq2seq", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("encoder", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("decoder", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("encoder", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("encoder", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
)
KINDS = {"image": ("image",), "backbone": ("backbone",), "text": ("seq2seq", "encoder", "decoder")}

# Field names and their small values. Widths differ from one another, so that a mixed-up axis shows.
_WIDTHS = dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim"), 64)
_WIDTHS |= dict.fromkeys(("embedding_size", "word_embed_proj_dim", "embedding_dim", "cross_attention_hidden_size"), 64)
_INNER = dict.fromkeys(
    (
        "intermediate_size",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "ffn_dim",
        "d_ff",
        "n_inner",
        "ffn_hidden_size",
        "hidden_dim",
        "d_inner",
        "intermediate_size_mlp",
        "shared_intermediate_size",
        "dense_intermediate_size",
        "dim_ff",
        "dff",
    ),
    88,
)
_INNER |= dict.fromkeys(
    (
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_experts_intermediate_size",
        "expert_ffn_hidden_size",
        "prediction_head_size",
    ),
    40,
)
_LAYERS = dict.fromkeys(
    (
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
        "num_encoder_layers",
        "num_blocks",
        "depth",
    ),
    2,
)
_HEADS = dict.fromkeys(
    (
        "num_attention_heads",
        "num_heads",
        "n_head",
        "n_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "num_decoder_attention_heads",
        "num_encoder_attention_heads",
        "attention_heads",
        "swa_num_attention_heads",
    ),
    4,
)
_KV_HEADS = dict.fromkeys(("num_key_value_heads", "decoder_kv_heads", "num_kv_heads", "swa_num_key_value_heads"), 2)
# Rotary embeddings turn a quarter of some heads: that is two pairs of 16.
_HEAD_SIZES = dict.fromkeys(
    ("head_dim", "d_kv", "v_head_dim", "kv_channels", "dim_head", "d_head", "swa_head_dim", "query_pre_attn_scalar"), 16
)
_HEAD_SIZES |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "rotary_dim": 8}
_HEAD_SIZES |= {"kv_lora_rank": 20, "q_lora_rank": 28, "o_lora_rank": 12}
_POSITIONS = dict.fromkeys(
    (
        "max_encoder_position_embeddings",
        "max_decoder_position_embeddings",
        "num_hash_buckets",
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "max_source_positions",
        "max_target_positions",
        "max_sequence_length",
        "n_ctx",
        "model_max_length",
        "original_max_position_embeddings",
        "max_2d_position_embeddings",
    ),
    64,
)
_EXPERTS = dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4)
_EXPERTS |= dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token", "moe_k"), 2)
_EXPERTS |= dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1)
_EXPERTS |= dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1)
_STATE = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "n_mamba_heads": 2,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 4,
}
_IMAGES = {"projection_dim": 48, "pooler_output_size": 64, "window_size": 4, "num_register_tokens": 2}
SMALL: dict[str, Any] = {
    **_WIDTHS,
    **_INNER,
    **_LAYERS,
    **_HEADS,
    **_KV_HEADS,
    **_HEAD_SIZES,
    **_POSITIONS,
    **_EXPERTS,
    **_STATE,
    **_IMAGES,
}
# The same, for fields that hold one number per stage.
STAGES: dict[str, tuple[int, ...]] = {
    "hidden_sizes": (16, 32, 48, 64),
    "embed_dims": (16, 24, 32, 48),
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 4, 4, 4),
    "num_attention_heads": (2, 4, 4, 4),
    "mlp_ratios": (2, 2, 2, 2),
}
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "sep": 3, "cls": 1, "mask": 4, "decoder_start": 1, "forced_eos": 2}


@dataclass(frozen=True)
class Family:
    """One model type of ``transformers`` and the class that stands for it."""

    name: str
    kind: str  # "image", "backbone", "seq2seq", "encoder" or "decoder"
    architecture: str

    @property
    def is_namesake(self) -> bool:
        return self.architecture.lower().startswith(self.name.replace("-", "").replace("_", ""))

    @property
    def generates(self) -> bool:
        return self.kind == "decoder"


def families() -> list[Family]:
    """Every family, once; model types that share a class are one family, named as the class is."""
    found: dict[str, Family] = {}
    seen: set[str] = set()
    for kind, mapping in MAPPINGS:
        for name, entry in getattr(modeling_auto, mapping).items():
            architecture = entry if isinstance(entry, str) else entry[0]
            family, known = Family(name, kind, architecture), found.get(architecture)
            if known is None and name not in seen:
                found[architecture] = family
            elif known is not None and family.is_namesake and not known.is_namesake:
                found[architecture] = family  # Llama rather than InternLM3
            seen.add(name)
    return list(found.values())


def out_of_scope(family: Family) -> str | None:
    """Why ``family`` is neither an image, a backbone nor a text family, though a mapping lists it."""
    return OUT_OF_SCOPE.get(family.name)


def build(family: Family) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of ``family`` with random weights, and inputs for it (batch 2).

    Raises whatever ``transformers`` raises: optional packages that are missing, above all.
    """
    architecture = getattr(transformers, family.architecture)
    config = shrink(architecture.config_class, CONFIGS.get(family.name, {}))
    torch.manual_seed(0)
    model: nn.Module = architecture(config)
    return model, example(family, config)


def shrink(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration with small widths, few layers and a small vocabulary; ``overrides`` have the last word.

    An override of a nested configuration is a dict of overrides for it.
    """
    values = dict(_small_values(config_class, overrides))
    for name, value in overrides.items():
        if not isinstance(values.get(name), PreTrainedConfig):
            values[name] = value
    return config_class(**values)


def _small_values(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        default = config_class()
    except Exception:  # a class without a valid default: the overrides must say more
        default = config_class(**overrides)
    names = {config_class.attribute_map.get(f.name, f.name): f.name for f in fields(config_class)}
    for stored, value in vars(default).items():
        name = names.get(stored, stored)
        if isinstance(value, PreTrainedConfig):
            nested = overrides.get(name, {})
            yield name, shrink(type(value), nested if isinstance(nested, dict) else {})
        elif stored in names and name not in overrides:
            small = _small(name, value)
            if small is not None:
                yield name, small


def _small(name: str, value: Any) -> Any:
    """The small value of one field, or None to leave it."""
    if isinstance(value, (list, tuple)):
        stages = STAGES.get(name)
        short = stages is not None and len(value) <= len(stages) and all(isinstance(v, int) for v in value)
        return type(value)(stages[: len(value)]) if short and stages is not None else None
    if name.endswith("num_labels"):
        return CLASSES
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name == "vocab_size" or name.endswith("_vocab_size") or name.startswith("vocab_size"):
        return VOCABULARY
    if name.endswith(("_token_id", "_token_index")):
        return TOKENS.get(name.rpartition("_token")[0], VOCABULARY - 1)
    if name == "image_size":
        return 64
    if name == "patch_size":
        return min(value, 16)
    return SMALL.get(name)


def example(family: Family, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Small random inputs by keyword for a model of ``family``."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        return torch.randint(5, VOCABULARY - 10, (2, length), generator=generator)

    if family.name in INPUTS:
        return INPUTS[family.name](tokens, generator)
    if family.kind in ("image", "backbone"):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 64)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
    inputs = {"input_ids": tokens(7)}
    if family.kind == "seq2seq":
        inputs["decoder_input_ids"] = tokens(5)
    return inputs
