"""Families whose layers hold a mixture of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, Granite-MoE, gpt-oss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.model.config import Experts, LayerSpec, ModelConfig
from engine.model.families.common import (
    LAYER_TYPES,
    attention_bias,
    dims_of,
    gate_activation,
    granite_multipliers,
    layer_count,
    windows_of,
)
from engine.model.families.keys import Keys
from engine.model.families.qwen import qwen_layers

# Keys of training and of outputs that serving does not have.
_LOSS_KEYS = ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
MIXTRAL_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072, "rope_theta": 1_000_000.0,
}  # fmt: skip
QWEN_DEFAULTS: dict[str, Any] = {
    "sliding_window": 4096, "max_window_layers": 28, "decoder_sparse_step": 1, "norm_topk_prob": False,
    "max_position_embeddings": 32_768,
}  # fmt: skip
QWEN2_DEFAULTS = QWEN_DEFAULTS | {
    "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_key_value_heads": 16, "qkv_bias": True,
}  # fmt: skip
QWEN3_DEFAULTS = QWEN_DEFAULTS | {
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "num_key_value_heads": 4,
}  # fmt: skip


GRANITE_DEFAULTS: dict[str, Any] = {
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 2048,
}  # fmt: skip
GPT_OSS_DEFAULTS: dict[str, Any] = {
    "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072, "head_dim": 64, "num_key_value_heads": 8, "attention_bias": True,
    "rope_theta": 150_000.0,
}  # fmt: skip


def mixtral(keys: Keys) -> ModelConfig:
    dims = dims_of(keys)
    skip_losses(keys)
    layer = LayerSpec(keys.rope(dims["head_dim"]), keys.optional_count("sliding_window"), ffn="experts")
    experts = Experts(
        num_experts=keys.count("num_local_experts"),
        per_token=keys.count("num_experts_per_tok"),
        intermediate_size=dims["intermediate_size"],
    )
    return ModelConfig(
        family="mixtral",
        layers=(layer,) * layer_count(keys),
        activation=gate_activation(keys),
        experts=experts,
        **dims,
    )


def qwen2_moe(keys: Keys) -> ModelConfig:
    return _qwen("qwen2_moe", keys, shared_expert(keys), qkv_bias=keys.flag("qkv_bias"))


def shared_expert(keys: Keys) -> dict[str, Any]:
    """Qwen's expert for every token, which has a gate."""
    return {"shared_size": keys.count("shared_expert_intermediate_size"), "shared_gate": True}


def qwen3_moe(keys: Keys) -> ModelConfig:
    return _qwen("qwen3_moe", keys, {}, qk_norm="head", **attention_bias(keys))


def _qwen(family: str, keys: Keys, shared: dict[str, Any], **fields: Any) -> ModelConfig:
    """Layer i has experts when it is not in mlp_only_layers and i + 1 is a multiple of decoder_sparse_step."""
    dims = dims_of(keys)
    return ModelConfig(
        family=family,
        activation=gate_activation(keys),
        **with_experts(keys, qwen_layers(keys, dims["head_dim"]), shared),
        **fields,
        **dims,
    )


def with_experts(keys: Keys, layers: tuple[LayerSpec, ...], shared: dict[str, Any]) -> dict[str, Any]:
    """Qwen's `experts`, and its `layers` with them where the config says so."""
    skip_losses(keys)
    step, dense = keys.count("decoder_sparse_step"), keys.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise keys.wrong("mlp_only_layers", "must be a list of layer numbers")
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(len(layers))]
    experts = Experts(
        num_experts=keys.count(keys.spelling("num_experts", "num_local_experts")),
        per_token=keys.count("num_experts_per_tok"),
        intermediate_size=keys.count("moe_intermediate_size"),
        normalize=keys.flag("norm_topk_prob"),
        **shared,
    )
    layers = tuple(replace(layer, ffn="experts" if sparse[i] else "gated") for i, layer in enumerate(layers))
    return {"layers": layers, "experts": experts if any(sparse) else None}


def granite_moe(keys: Keys) -> ModelConfig:
    dims = dims_of(keys) | granite_multipliers(keys)
    skip_losses(keys)
    layer = LayerSpec(keys.rope(dims["head_dim"]), ffn="experts")
    return ModelConfig(
        family="granitemoe",
        layers=(layer,) * layer_count(keys),
        activation=gate_activation(keys),
        experts=Experts(
            num_experts=keys.count("num_local_experts"),
            per_token=keys.count("num_experts_per_tok"),
            intermediate_size=dims["intermediate_size"],
        ),
        **attention_bias(keys),
        **dims,
    )


def gpt_oss(keys: Keys) -> ModelConfig:
    """OpenAI's gpt-oss: sinks, windows in every other layer, a clamped gate, biases everywhere."""
    dims = dims_of(keys)
    skip_losses(keys)
    keys.neutral("swiglu_alpha", 1.702)
    keys.value("initial_context_length")  # of training; rope_scaling has it too
    num_layers = layer_count(keys)
    kinds = keys.per_layer("layer_types", num_layers, LAYER_TYPES)
    windows = windows_of(keys, kinds or [LAYER_TYPES[i % 2 == 0] for i in range(num_layers)])
    rope = keys.rope(dims["head_dim"])
    return ModelConfig(
        family="gpt_oss",
        layers=tuple(LayerSpec(rope, window, ffn="experts") for window in windows),
        activation=gate_activation(keys),
        attention_sinks=True,
        experts=Experts(
            num_experts=keys.count(keys.spelling("num_local_experts", "num_experts")),
            per_token=keys.count(keys.spelling("num_experts_per_tok", "experts_per_token")),
            intermediate_size=dims["intermediate_size"],
            router_bias=True,
            biases=True,
            clamp=keys.positive("swiglu_limit", 7.0),
        ),
        **attention_bias(keys),
        **dims,
    )


def skip_losses(keys: Keys) -> None:
    for key in _LOSS_KEYS:
        keys.value(key)
