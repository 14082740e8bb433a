"""Gemma 2 and Gemma 3 (text): sandwich norms, alternating windows, softcaps, two ropes."""

from __future__ import annotations

import math
from typing import Any

from engine.model.config import LayerSpec, ModelConfig
from engine.model.families.common import ACTIVATIONS, LAYER_TYPES, attention_bias, dims_of, layer_count, windows_of
from engine.model.families.keys import Keys

_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
          "query_pre_attn_scalar": 256, "tie_word_embeddings": True, "hidden_size": 2304,
          "intermediate_size": 9216, "num_hidden_layers": 26}  # fmt: skip
GEMMA2_DEFAULTS = {**_GEMMA, "vocab_size": 256_000, "max_position_embeddings": 8192,
           "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # fmt: skip
GEMMA3_DEFAULTS = {**_GEMMA, "vocab_size": 262_208, "max_position_embeddings": 131_072, "rope_theta": 1_000_000.0,
           "rope_local_base_freq": 10_000.0}  # fmt: skip


def _gemma_fields(keys: Keys) -> dict[str, Any]:
    """What Gemma 2 and 3 share. hidden_act is not read by either: hidden_activation rules."""
    keys.value("hidden_act")
    dims = dims_of(keys)
    return {
        **dims,
        "activation": keys.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "norm_place": "sandwich",
        "attention_scale": keys.positive("query_pre_attn_scalar") ** -0.5,
        "final_softcap": keys.optional_positive("final_logit_softcapping"),
        "embedding_multiplier": math.sqrt(dims["hidden_size"]),
        **attention_bias(keys),
    }


def gemma2(keys: Keys) -> ModelConfig:
    fields, num_layers = _gemma_fields(keys), layer_count(keys)
    kinds = keys.per_layer("layer_types", num_layers, LAYER_TYPES)
    kinds = kinds or [LAYER_TYPES[(i + 1) % 2] for i in range(num_layers)]
    if keys.value("sliding_window_size") not in (None, keys.value("sliding_window")):
        raise keys.wrong("sliding_window_size", "differs from sliding_window")
    rope = keys.rope(fields["head_dim"])
    return ModelConfig(
        family="gemma2",
        layers=tuple(LayerSpec(rope, window) for window in windows_of(keys, kinds)),
        attention_softcap=keys.optional_positive("attn_logit_softcapping"),
        **fields,
    )


def gemma3(keys: Keys) -> ModelConfig:
    fields, num_layers = _gemma_fields(keys), layer_count(keys)
    pattern = keys.count("sliding_window_pattern", default=keys.count("_sliding_window_pattern", default=6))
    kinds = keys.per_layer("layer_types", num_layers, LAYER_TYPES)
    kinds = kinds or [LAYER_TYPES[(i + 1) % pattern != 0] for i in range(num_layers)]
    scaling, where = keys.rope_fields()
    if where.endswith("rope_parameters"):  # new spelling: one dict for each layer type
        if not set(scaling) <= set(LAYER_TYPES):
            raise keys.wrong("rope_parameters", f"must have the keys {LAYER_TYPES} and no others")
        by_kind = {kind: dict(scaling.get(kind) or {}) for kind in LAYER_TYPES}
    else:  # old spelling: rope_scaling is for the layers that see everything
        by_kind = {"full_attention": scaling, "sliding_attention": {}}
    theta_keys = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    ropes = {
        kind: keys.make_rope(by_kind[kind], fields["head_dim"], f"{where}.{kind}", theta_keys[kind])
        for kind in LAYER_TYPES
    }
    windows = windows_of(keys, kinds)
    layers = tuple(LayerSpec(ropes[kind], window) for kind, window in zip(kinds, windows, strict=True))
    return ModelConfig(family="gemma3", layers=layers, qk_norm="head", **fields)
