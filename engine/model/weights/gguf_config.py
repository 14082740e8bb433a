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

# Keys of an architecture without effect on its results.
INERT = frozenset({"vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "attention.causal"})
ROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
ROPE_FREQS = "rope_freqs.weight"

ReadTensor = Callable[[str], np.ndarray]


class Metadata:
    """The keys of the file's architecture, whose reads are counted; `finish` refuses what nobody read."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self.file, self.arch = file, arch
        self._read: set[str] = set(INERT)

    def value(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: int | float | None = None) -> Any:
        """A number, or a list of one equal number per layer. Without `default` the key is required."""
        value = self.value(key, default)
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                raise self.file.fail(f"{self.arch}.{key} differs between layers, which is not supported")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            missing = "is missing" if value is None else f"must be a number, got {str(value)[:60]}"
            raise self.file.fail(f"{self.arch}.{key} {missing}")
        return value

    @property
    def head_dim(self) -> int:
        hidden, heads = self.number("embedding_length"), self.number("attention.head_count")
        head_dim = self.number("attention.key_length", hidden // heads if heads else 0)
        if head_dim < 1:
            raise self.file.fail(f"{self.arch}.attention.head_count {heads} does not divide embedding_length {hidden}")
        return head_dim

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def finish(self) -> None:
        prefix = f"{self.arch}."
        for key, value in self.file.metadata.items():
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._read and value not in (0, False, []):
                raise self.file.fail(f"{key} = {str(value)[:60]} is not supported for {self.arch} and could change "
                                     "its results")  # fmt: skip


def gguf_model_config(file: GgufFile, read: ReadTensor, max_model_len: int | None = None) -> ModelConfig:
    """`ModelConfig` of an opened file. Raises ModelError that names the key or architecture."""
    arch = file.metadata.get("general.architecture")
    family = ARCHITECTURES.get(arch) if isinstance(arch, str) else None
    if family is None:
        raise file.fail(f"general.architecture {arch!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    meta = Metadata(file, str(arch))
    keys = {**_common(meta), **_rope(meta, read), **family(meta)}
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
    if meta.number("attention.value_length", head_dim) != head_dim:
        raise meta.file.fail(f"{meta.arch}.attention.value_length differs from key_length, which is not supported")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": meta.number("embedding_length"),
        "intermediate_size": meta.number("feed_forward_length"),
        "num_hidden_layers": meta.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.number("attention.head_count_kv", heads),
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
        keys["rope_scaling"] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind == "linear" or (kind == "none" and factor != 1.0):
        keys["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise meta.file.fail(f"{meta.arch}.rope.scaling.type {kind!r} is not supported here")
    return keys


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


def _qwen_moe(meta: Metadata) -> dict[str, Any]:
    """Which layers have experts the tensors tell; llama.cpp adds up the weights to one for Qwen3 alone."""
    layers = range(meta.number("block_count"))
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
}


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
