"""GGUF metadata -> `ModelConfig`, by way of the Hugging Face keys that `families` already checks.

One small function an architecture. Knows keys and tensor names, reads no weights but rope factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.errors import ModelError
from engine.model.config import ModelConfig, Rope
from engine.model.families import model_config
from engine.model.gguf_file import GgufFile
from engine.model.weights.gguf_metadata import Metadata
from engine.model.weights.gguf_recurrent import granite_hybrid, mamba2, qwen3_next

ROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
ROPE_FREQS = "rope_freqs.weight"

ReadTensor = Callable[[str], np.ndarray]


def gguf_model_config(file: GgufFile, read: ReadTensor, max_model_len: int | None = None) -> ModelConfig:
    """`ModelConfig` of an opened file. Raises ModelError that names the key or architecture."""
    arch = file.metadata.get("general.architecture")
    family = ARCHITECTURES.get(arch) if isinstance(arch, str) else None
    if family is None:
        raise file.fail(f"general.architecture {arch!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    meta = Metadata(file, str(arch))
    attends = {} if arch in WITHOUT_ATTENTION else {**_common(meta), **_rope(meta, read)}
    keys = {**attends, **family(meta)}
    meta.finish()
    try:
        config = model_config(keys, max_model_len)
    except ModelError as error:
        what = str(error).removeprefix("config.json: ")
        raise file.fail(f"({arch}, metadata in Hugging Face's words) {what}") from error
    return _with_tensors(config, file, read)


def _common(meta: Metadata) -> dict[str, Any]:
    """What every architecture spells alike."""
    heads, head_dim = meta.number("attention.head_count"), meta.head_dim
    embedding = meta.file.tensors.get("token_embd.weight")
    if embedding is None:
        raise meta.file.fail("tensor 'token_embd.weight' is missing")
    if meta.number("attention.value_length", head_dim) != head_dim and meta.arch != "deepseek2":
        raise meta.file.fail(f"{meta.arch}.attention.value_length differs from key_length, which is not supported")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": meta.number("embedding_length"),
        "intermediate_size": meta.number("feed_forward_length"),
        "num_hidden_layers": meta.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": meta.number("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not meta.has("output.weight"),
    }


def _rope(meta: Metadata, read: ReadTensor) -> dict[str, Any]:
    """The old spelling: rope_theta and rope_scaling. Llama 3's factors are a tensor, see `_with_tensors`."""
    keys: dict[str, Any] = {
        "rope_theta": float(meta.number("rope.freq_base", 10_000.0)),
        "partial_rotary_factor": meta.number("rope.dimension_count", meta.head_dim) / meta.head_dim,
    }
    kind = meta.value("rope.scaling.type", "none")
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    original = meta.value("rope.scaling.original_context_length")
    if all(meta.has(tensor) for tensor in ROPE_FACTORS.values()):
        scaling = {name: read(tensor).reshape(-1).tolist() for name, tensor in ROPE_FACTORS.items()}
        keys["rope_scaling"] = {
            "rope_type": "longrope",
            "attention_factor": meta.value("rope.scaling.attn_factor"),
            "original_max_position_embeddings": original,
            **scaling,
        }
    elif kind == "yarn":
        keys["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": meta.value("rope.scaling.yarn_beta_fast"),
            "beta_slow": meta.value("rope.scaling.yarn_beta_slow"),
            "attention_factor": meta.value("rope.scaling.yarn_attn_factor"),
            **_yarn_of(meta),
        }
    elif kind == "linear" or (kind == "none" and factor != 1.0):
        keys["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise meta.file.fail(f"{meta.arch}.rope.scaling.type {kind!r} is not supported here")
    return keys


def _yarn_of(meta: Metadata) -> dict[str, Any]:
    """What a model was trained with. llama.cpp rounds gpt-oss's ramp to whole dimensions, which the model does not."""
    if meta.arch == "gpt-oss":
        return {"truncate": False}
    if meta.arch == "deepseek2":
        both = 10 * meta.number("rope.scaling.yarn_log_multiplier", 0.0)  # the file has 0.1 mscale_all_dim, no mscale
        return {"mscale": both, "mscale_all_dim": both}
    return {}


def _llama(meta: Metadata) -> dict[str, Any]:
    """Llama, SmolLM2, Mistral, a Llama with a window, and Mixtral, a Llama with experts."""
    window = meta.value("attention.sliding_window") or None
    if meta.value("expert_count"):
        return {"model_type": "mixtral", "sliding_window": window, "num_local_experts": meta.number("expert_count"),
                "num_experts_per_tok": meta.number("expert_used_count")}  # fmt: skip
    return {"model_type": "mistral", "sliding_window": window} if window else {"model_type": "llama"}


def _plain(model_type: str) -> Callable[[Metadata], dict[str, Any]]:
    return lambda meta: {"model_type": model_type}


def _phi3(meta: Metadata) -> dict[str, Any]:
    original = meta.value("rope.scaling.original_context_length") or meta.number("context_length")
    window = meta.value("attention.sliding_window") or None
    return {"model_type": "phi3", "sliding_window": window, "original_max_position_embeddings": original}


def _gemma(meta: Metadata, largest_layers: int) -> dict[str, Any]:
    """Only the 27B models scale by hidden_size / heads; the file does not say so, the depth does."""
    heads, hidden = meta.number("attention.head_count"), meta.number("embedding_length")
    largest = meta.number("block_count") == largest_layers
    softcap = meta.value("final_logit_softcapping")
    return {
        "query_pre_attn_scalar": hidden // heads if largest else meta.head_dim,
        "sliding_window": meta.number("attention.sliding_window"),
        **({} if softcap is None else {"final_logit_softcapping": softcap}),
    }


def _gemma2(meta: Metadata) -> dict[str, Any]:
    softcap = meta.value("attn_logit_softcapping")
    return {
        "model_type": "gemma2",
        **_gemma(meta, largest_layers=46),
        **({} if softcap is None else {"attn_logit_softcapping": softcap}),
    }


def _gemma3(meta: Metadata) -> dict[str, Any]:
    pattern = meta.value("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
        layers: dict[str, Any] = {"layer_types": kinds}
    else:
        layers = {"sliding_window_pattern": pattern}
    local = float(meta.number("rope.freq_base_swa", 10_000.0))
    return {"model_type": "gemma3_text", "rope_local_base_freq": local, **layers, **_gemma(meta, largest_layers=62)}


def _granite(meta: Metadata) -> dict[str, Any]:
    return {
        "model_type": "granite",
        "attention_multiplier": meta.number("attention.scale"),
        "embedding_multiplier": meta.number("embedding_scale", 1.0),
        "residual_multiplier": meta.number("residual_scale", 1.0),
        "logits_scaling": meta.number("logit_scale", 1.0),
    }


def _granite_moe(meta: Metadata) -> dict[str, Any]:
    return {
        **_granite(meta),
        "model_type": "granitemoe",
        "num_local_experts": meta.number("expert_count"),
        "num_experts_per_tok": meta.number("expert_used_count"),
    }


def _gpt_oss(meta: Metadata) -> dict[str, Any]:
    pattern = meta.value("attention.sliding_window_pattern", 2)
    if pattern != 2:
        raise meta.file.fail(f"{meta.arch}.attention.sliding_window_pattern must be 2, got {str(pattern)[:60]}")
    return {
        "model_type": "gpt_oss",
        "sliding_window": meta.number("attention.sliding_window"),
        "intermediate_size": meta.number("expert_feed_forward_length"),
        "num_local_experts": meta.number("expert_count"),
        "num_experts_per_tok": meta.number("expert_used_count"),
    }


def _deepseek2(meta: Metadata) -> dict[str, Any]:
    """DeepSeek-V2 scores by softmax, V3 by sigmoid. Files from before the cache held the latent have no "_mla" keys."""
    scoring, groups = meta.value("expert_gating_func") or 1, meta.number("expert_group_count", 1)
    if scoring not in (1, 2):
        raise meta.file.fail(
            f"{meta.arch}.expert_gating_func = {scoring} is not supported; 1 (softmax), 2 (sigmoid) are"
        )
    rope_dim = meta.number("rope.dimension_count")
    keys: dict[str, Any] = {
        "num_key_value_heads": meta.number("attention.head_count"),
        "head_dim": rope_dim,
        "partial_rotary_factor": 1.0,
        "q_lora_rank": meta.value("attention.q_lora_rank"),
        "kv_lora_rank": meta.number("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": meta.number("attention.key_length_mla", meta.head_dim) - rope_dim,
        "v_head_dim": meta.number("attention.value_length_mla", meta.value("attention.value_length")),
        "first_k_dense_replace": meta.number("leading_dense_block_count", 0),
        "n_routed_experts": meta.number("expert_count"),
        "num_experts_per_tok": meta.number("expert_used_count"),
        "n_shared_experts": meta.number("expert_shared_count"),
        "moe_intermediate_size": meta.number("expert_feed_forward_length"),
        "routed_scaling_factor": meta.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(meta.value("expert_weights_norm", False)),
        "n_group": groups,
        "topk_group": meta.number("expert_group_used_count", 1),
    }
    if scoring == 2:
        return {"model_type": "deepseek_v3", **keys}
    return {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy" if groups > 1 else "greedy", **keys}


def _qwen_moe(meta: Metadata) -> dict[str, Any]:
    """Which layers have experts the tensors tell; llama.cpp adds up the weights to one for Qwen3 alone."""
    layers = range(meta.num_layers)
    keys = {
        "model_type": f"{meta.arch.removesuffix('moe')}_moe",
        "num_experts": meta.number("expert_count"),
        "num_experts_per_tok": meta.number("expert_used_count"),
        "moe_intermediate_size": meta.number("expert_feed_forward_length"),
        "norm_topk_prob": meta.arch == "qwen3moe",
        "mlp_only_layers": [i for i in layers if not meta.has(f"blk.{i}.ffn_gate_inp.weight")],
    }
    if meta.arch == "qwen2moe":
        keys["shared_expert_intermediate_size"] = meta.number("expert_shared_feed_forward_length")
    return keys


ARCHITECTURES: dict[str, Callable[[Metadata], Mapping[str, Any]]] = {
    "llama": _llama,
    "smollm3": _plain("smollm3"),
    "qwen2": _plain("qwen2"),
    "qwen3": _plain("qwen3"),
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "granite": _granite,
    "granitemoe": _granite_moe,
    "qwen2moe": _qwen_moe,
    "qwen3moe": _qwen_moe,
    "olmo2": _plain("olmo2"),
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
    "mamba2": mamba2,
    "granitehybrid": lambda meta: {**_granite(meta), **granite_hybrid(meta)},
    "qwen3next": lambda meta: {**_qwen_moe(meta), **qwen3_next(meta)},
}
WITHOUT_ATTENTION = frozenset({"mamba2"})


def _with_tensors(config: ModelConfig, file: GgufFile, read: ReadTensor) -> ModelConfig:
    """What only the tensors tell: which biases there are, and Llama 3's divisors of the rope frequencies."""
    fused = "attn_qkv" if config.family == "phi3" else "attn_q"
    config = dataclasses.replace(
        config,
        qkv_bias=config.qkv_bias or f"blk.0.{fused}.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
    )
    if ROPE_FREQS not in file.tensors:
        return config
    factors = read(ROPE_FREQS).reshape(-1)

    def divided(rope: Rope | None) -> Rope | None:
        if rope is None:
            return None
        if len(factors) != len(rope.inv_freq) or not (np.isfinite(factors) & (factors > 0)).all():
            raise file.fail(f"tensor {ROPE_FREQS!r} must hold {len(rope.inv_freq)} positive numbers")
        scaled = np.asarray(rope.inv_freq, np.float32) / factors
        return Rope(tuple(float(f) for f in scaled), rope.scale)

    layers = tuple(dataclasses.replace(layer, rope=divided(layer.rope)) for layer in config.layers)
    return dataclasses.replace(config, layers=layers)
