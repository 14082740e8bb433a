"""What several families read from a config in the same way. No family's name appears here."""

from __future__ import annotations

from typing import Any

from engine.model.families.keys import MAX_LAYERS, Keys

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
LAYER_TYPES = ("full_attention", "sliding_attention")


def layer_count(keys: Keys) -> int:
    return keys.count("num_hidden_layers", limit=MAX_LAYERS)


def dims_of(keys: Keys) -> dict[str, Any]:
    """The `ModelConfig` fields that every family spells alike."""
    hidden, q_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    head_dim = keys.count("head_dim", default=max(hidden // q_heads, 1))
    return {
        "vocab_size": keys.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": keys.count("intermediate_size"),
        "num_q_heads": q_heads,
        "num_kv_heads": keys.count("num_key_value_heads", default=q_heads),
        "head_dim": head_dim,
        "max_position": keys.max_position,
        "norm_eps": keys.positive("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "attention_scale": head_dim**-0.5,
    }


def gate_activation(keys: Keys) -> Any:
    return keys.choice("hidden_act", ACTIVATIONS, "silu")


def attention_bias(keys: Keys) -> dict[str, bool]:
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def granite_multipliers(keys: Keys) -> dict[str, Any]:
    return {
        "attention_scale": keys.number("attention_multiplier", 1.0),
        "embedding_multiplier": keys.number("embedding_multiplier", 1.0),
        "residual_multiplier": keys.number("residual_multiplier", 1.0),
        "logits_multiplier": 1.0 / keys.positive("logits_scaling", 1.0),
    }


def windows_of(keys: Keys, layer_types: list[str], key: str = "sliding_window") -> list[int | None]:
    """The window of each layer, in tokens."""
    if "sliding_attention" not in layer_types:
        keys.value(key)
        return [None] * len(layer_types)
    window = keys.count(key)
    return [window if kind == "sliding_attention" else None for kind in layer_types]
