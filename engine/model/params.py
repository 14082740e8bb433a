"""Every weight of the decoder, declared once.

The tree is a flat dict: path -> ParamSpec. Layer weights are "layers.{i}.{name}".
Norm weights are float32 and are stored as what multiplies (Gemma's 1 + w is folded at load).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from engine.model.config import ModelConfig
from sharding.params import ParamSpec

LANES = 128  # of a TPU's vector registers


def param_specs(config: ModelConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    """All parameters of `config`, in the order of computation.

    qkv is grouped by KV head so that it is cut along kv_heads alone:
    [embed, kv_heads, q_per_kv + 2, head_dim] holds, per KV head, its query heads, key, value.
    Query head h belongs to KV head h // q_per_kv. gate_up is [embed, mlp_blocks, 2, block]: gate
    and up in turns of a lane tile, so that it is cut along mlp alone.
    embed and lm_head are [vocab, embed]; lm_head exists only when not tied.
    """
    dtype = jnp.dtype(dtype)
    hidden, vocab = config.hidden_size, config.vocab_size
    specs = {"embed": ParamSpec((vocab, hidden), dtype, ("vocab", "embed"), fan_in=hidden)}
    for i in range(config.num_layers):
        for name, spec in _layer_specs(config, dtype).items():
            specs[f"layers.{i}.{name}"] = spec
    specs["final_norm"] = _norm(hidden)
    if not config.tie_embeddings:
        specs["lm_head"] = ParamSpec((vocab, hidden), dtype, ("vocab", "embed"), fan_in=hidden)
    return specs


def mlp_block(config: ModelConfig) -> int:
    """Columns of gate that stand together in gate_up, before as many of up."""
    return math.gcd(config.intermediate_size, LANES)


def _norm(*shape: int, axes: tuple[str | None, ...] = ("embed",)) -> ParamSpec:
    return ParamSpec(shape, jnp.dtype(jnp.float32), axes, init="ones")


def _layer_specs(config: ModelConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    hidden, mlp, head = config.hidden_size, config.intermediate_size, config.head_dim
    kv, group = config.num_kv_heads, config.q_per_kv
    specs: dict[str, ParamSpec] = {}
    if config.norm_place in ("pre", "sandwich"):
        specs["attn_norm"] = _norm(hidden)
    specs["qkv"] = ParamSpec(
        (hidden, kv, group + 2, head),
        dtype,
        ("embed", "kv_heads", None, "head_dim"),
        fan_in=hidden,
        rows=1,
        packable=True,
    )
    if config.qkv_bias:
        specs["qkv_bias"] = ParamSpec((kv, group + 2, head), dtype, ("kv_heads", None, "head_dim"), init="zeros")
    if config.qk_norm == "head":
        specs["q_norm"] = _norm(head, axes=("head_dim",))
        specs["k_norm"] = _norm(head, axes=("head_dim",))
    elif config.qk_norm == "full":
        specs["q_norm"] = _norm(kv, group, head, axes=("kv_heads", None, "head_dim"))
        specs["k_norm"] = _norm(kv, head, axes=("kv_heads", "head_dim"))
    specs["o"] = ParamSpec(
        (kv, group, head, hidden),
        dtype,
        ("kv_heads", None, "head_dim", "embed"),
        fan_in=kv * group * head,
        rows=3,
        packable=True,
    )
    if config.output_bias:
        specs["o_bias"] = ParamSpec((hidden,), dtype, ("embed",), init="zeros")
    if config.norm_place in ("post", "sandwich"):
        specs["attn_post_norm"] = _norm(hidden)
    if config.norm_place in ("pre", "sandwich"):
        specs["mlp_norm"] = _norm(hidden)
    blocks, block = mlp // mlp_block(config), mlp_block(config)
    specs["gate_up"] = ParamSpec(
        (hidden, blocks, 2, block), dtype, ("embed", "mlp", None, None), fan_in=hidden, rows=1, packable=True
    )
    specs["down"] = ParamSpec((mlp, hidden), dtype, ("mlp", "embed"), fan_in=mlp, packable=True)
    if config.mlp_bias:
        specs["gate_up_bias"] = ParamSpec((blocks, 2, block), dtype, ("mlp", None, None), init="zeros")
        specs["down_bias"] = ParamSpec((hidden,), dtype, ("embed",), init="zeros")
    if config.norm_place in ("post", "sandwich"):
        specs["mlp_post_norm"] = _norm(hidden)
    return specs
