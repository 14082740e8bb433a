"""Hugging Face config -> `ModelConfig`: one small pure function per family, and the table of them.

Knows the spelling of config.json, old and new; reads no files and no weights.
Defaults are those of transformers' config classes, for checkpoints that leave keys out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ModelError
from engine.model.config import LayerSpec, ModelConfig
from engine.model.families.common import (
    LAYER_TYPES,
    attention_bias,
    dims_of,
    gate_activation,
    granite_multipliers,
    layer_count,
    windows_of,
)
from engine.model.families.deepseek import DEEPSEEK_V2_DEFAULTS, DEEPSEEK_V3_DEFAULTS, deepseek_v2, deepseek_v3
from engine.model.families.gemma import GEMMA2_DEFAULTS, GEMMA3_DEFAULTS, gemma2, gemma3
from engine.model.families.keys import Keys
from engine.model.families.moe import (
    GPT_OSS_DEFAULTS,
    GRANITE_DEFAULTS,
    MIXTRAL_DEFAULTS,
    QWEN2_DEFAULTS,
    QWEN3_DEFAULTS,
    gpt_oss,
    granite_moe,
    mixtral,
    qwen2_moe,
    qwen3_moe,
)
from engine.model.families.qwen import qwen_layers
from engine.model.families.recurrent import (
    GRANITE_HYBRID_DEFAULTS,
    MAMBA2_DEFAULTS,
    QWEN3_NEXT_DEFAULTS,
    granite_hybrid,
    mamba2,
    qwen3_next,
)


@dataclass(frozen=True)
class Family:
    """A model_type: its function, its class names, and the defaults of keys left out."""

    make: Callable[[Keys], ModelConfig]
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def model_config(hf: Mapping[str, Any], max_model_len: int | None = None) -> ModelConfig:
    """`ModelConfig` of a config.json.

    `max_model_len` (tokens; None: max_position_embeddings) picks LongRoPE's long factors when it
    exceeds original_max_position_embeddings. Raises ModelError that names the key for whatever
    is unknown, missing, or not supported.
    """
    model_type = hf.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(f"config.json: model_type = {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    architectures = hf.get("architectures") or []
    if not isinstance(architectures, list) or any(a not in family.architectures for a in architectures):
        raise ModelError(f"config.json: architectures = {architectures!r} is not supported for {model_type}; "
                         f"known: {', '.join(family.architectures)}")  # fmt: skip
    if model_type == "gemma3":
        return model_config(_text_config(hf), max_model_len)
    keys = Keys(hf, family.defaults, max_model_len)
    try:
        config = family.make(keys)
    except ValueError as error:  # ModelConfig's own checks
        raise ModelError(f"config.json: {error}") from error
    keys.finish(config.family)
    return config


def _text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model inside a multimodal Gemma 3 config."""
    keys = Keys(hf, {}, None)
    text = keys.value("text_config")
    if not isinstance(text, dict):
        raise keys.wrong("text_config", "must be an object")
    for key in ("vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index",
                "image_token_id", "boi_token_id", "eoi_token_id"):  # fmt: skip
        keys.value(key)
    tie = keys.value("tie_word_embeddings")
    keys.finish("gemma3")
    return {"tie_word_embeddings": True if tie is None else tie, **text, "model_type": "gemma3_text"}


def _llama(keys: Keys) -> ModelConfig:
    dims = dims_of(keys)
    layer = LayerSpec(keys.rope(dims["head_dim"]))
    return ModelConfig(
        family="llama",
        layers=(layer,) * layer_count(keys),
        activation=gate_activation(keys),
        mlp_bias=keys.flag("mlp_bias"),
        **attention_bias(keys),
        **dims,
    )


def _mistral(keys: Keys) -> ModelConfig:
    dims = dims_of(keys)
    layer = LayerSpec(keys.rope(dims["head_dim"]), keys.optional_count("sliding_window"))
    return ModelConfig(family="mistral", layers=(layer,) * layer_count(keys), activation=gate_activation(keys), **dims)


def _qwen2(keys: Keys) -> ModelConfig:
    dims = dims_of(keys)
    layers = qwen_layers(keys, dims["head_dim"])
    return ModelConfig(family="qwen2", layers=layers, activation=gate_activation(keys), qkv_bias=True, **dims)


def _qwen3(keys: Keys) -> ModelConfig:
    dims = dims_of(keys)
    return ModelConfig(
        family="qwen3",
        layers=qwen_layers(keys, dims["head_dim"]),
        activation=gate_activation(keys),
        qk_norm="head",
        **attention_bias(keys),
        **dims,
    )


def _smollm3(keys: Keys) -> ModelConfig:
    dims, num_layers = dims_of(keys), layer_count(keys)
    keys.value("max_window_layers")  # written by some exporters; the family has no such rule
    interval = keys.count("no_rope_layer_interval")
    has_rope = keys.per_layer("no_rope_layers", num_layers, (0, 1))  # 1 means: this layer has rope
    if has_rope is None:
        has_rope = [int((i + 1) % interval != 0) for i in range(num_layers)]
    sliding = keys.flag("use_sliding_window") and keys.value("sliding_window") is not None
    kinds = keys.per_layer("layer_types", num_layers, LAYER_TYPES)
    if kinds is None:
        kinds = [LAYER_TYPES[sliding and not rope] for rope in has_rope]
    if not sliding and "sliding_attention" in kinds:
        raise keys.wrong("use_sliding_window", "contradicts layer_types, which names sliding_attention")
    rope = keys.rope(dims["head_dim"])
    windows = windows_of(keys, kinds)
    return ModelConfig(
        family="smollm3",
        layers=tuple(LayerSpec(rope if has_rope[i] else None, windows[i]) for i in range(num_layers)),
        activation=gate_activation(keys),
        mlp_bias=keys.flag("mlp_bias"),
        **attention_bias(keys),
        **dims,
    )


def _phi3(keys: Keys) -> ModelConfig:
    dims = dims_of(keys)
    keys.neutral("full_attn_mod", 1)  # written by Phi-4-mini, whose code reads neither
    keys.neutral("interpolate_factor", 1)
    fields, where = keys.rope_fields()
    if fields.get("rope_type", fields.get("type")) == "su":  # LongRoPE's name before it had one
        fields = {**fields, "type": None, "rope_type": "longrope"}
    rope = keys.make_rope(fields, dims["head_dim"], where)
    layer = LayerSpec(rope, keys.optional_count("sliding_window"))
    return ModelConfig(family="phi3", layers=(layer,) * layer_count(keys), activation=gate_activation(keys), **dims)


def _granite(keys: Keys) -> ModelConfig:
    dims = dims_of(keys) | granite_multipliers(keys)
    layer = LayerSpec(keys.rope(dims["head_dim"]))
    return ModelConfig(
        family="granite",
        layers=(layer,) * layer_count(keys),
        activation=gate_activation(keys),
        mlp_bias=keys.flag("mlp_bias"),
        **attention_bias(keys),
        **dims,
    )


def _olmo2(keys: Keys) -> ModelConfig:
    dims = dims_of(keys)
    layer = LayerSpec(keys.rope(dims["head_dim"]))
    return ModelConfig(
        family="olmo2",
        layers=(layer,) * layer_count(keys),
        activation=gate_activation(keys),
        norm_place="post",
        qk_norm="full",
        **attention_bias(keys),
        **dims,
    )


_QWEN = {"sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, ("LlamaForCausalLM",), {"max_position_embeddings": 2048}),
    "mistral": Family(_mistral, ("MistralForCausalLM",),
                      {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}),
    "qwen2": Family(_qwen2, ("Qwen2ForCausalLM",), {**_QWEN, "max_position_embeddings": 32_768}),
    "qwen3": Family(_qwen3, ("Qwen3ForCausalLM",), {**_QWEN, "head_dim": 128, "max_position_embeddings": 32_768}),
    "mixtral": Family(mixtral, ("MixtralForCausalLM",), MIXTRAL_DEFAULTS),
    "qwen2_moe": Family(qwen2_moe, ("Qwen2MoeForCausalLM",), QWEN2_DEFAULTS),
    "qwen3_moe": Family(qwen3_moe, ("Qwen3MoeForCausalLM",), QWEN3_DEFAULTS),
    "granitemoe": Family(granite_moe, ("GraniteMoeForCausalLM",), GRANITE_DEFAULTS),
    "gpt_oss": Family(gpt_oss, ("GptOssForCausalLM",), GPT_OSS_DEFAULTS),
    "deepseek_v2": Family(deepseek_v2, ("DeepseekV2ForCausalLM",), DEEPSEEK_V2_DEFAULTS),
    "deepseek_v3": Family(deepseek_v3, ("DeepseekV3ForCausalLM",), DEEPSEEK_V3_DEFAULTS),
    "granitemoehybrid": Family(granite_hybrid, ("GraniteMoeHybridForCausalLM",), GRANITE_HYBRID_DEFAULTS),
    "qwen3_next": Family(qwen3_next, ("Qwen3NextForCausalLM",), QWEN3_NEXT_DEFAULTS),
    "mamba2": Family(mamba2, ("Mamba2ForCausalLM",), MAMBA2_DEFAULTS),
    "smollm3": Family(_smollm3, ("SmolLM3ForCausalLM",),
                      {"no_rope_layer_interval": 4, "tie_word_embeddings": True, "rope_theta": 2_000_000.0,
                       "max_position_embeddings": 32_768, "num_key_value_heads": 4}),
    "phi3": Family(_phi3, ("Phi3ForCausalLM",), {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
                                                 "original_max_position_embeddings": 4096}),
    "gemma2": Family(gemma2, ("Gemma2ForCausalLM",), GEMMA2_DEFAULTS),
    "gemma3_text": Family(gemma3, ("Gemma3ForCausalLM",), GEMMA3_DEFAULTS),
    "gemma3": Family(gemma3, ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"), GEMMA3_DEFAULTS),
    "granite": Family(_granite, ("GraniteForCausalLM",), {"max_position_embeddings": 2048}),
    "olmo2": Family(_olmo2, ("Olmo2ForCausalLM",), {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}),
}  # fmt: skip
