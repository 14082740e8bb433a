"""BERT's forward, and its parameters: a short file beside the decoder, built from the same layers.

Works on a flat token axis. `attend` is handed in and decides which tokens see each other; texts,
rows and batches are not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.model.decoder import layer_params
from engine.model.encoder_config import EncoderConfig
from engine.model.layers import Params, layer_norm, linear
from pallas_kernels.gated import ACTIVATIONS
from pallas_kernels.target import Target
from sharding.params import ParamSpec

# attend(q, k, v) -> values; all [tokens, heads, head_dim].
Attend = Callable[[Array, Array, Array], Array]


def encoder_specs(config: EncoderConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    """All parameters, in the order of computation; norms and biases are float32."""
    dtype, hidden = jnp.dtype(dtype), config.hidden_size

    def table(rows: int, axis: str | None) -> ParamSpec:
        return ParamSpec((rows, hidden), dtype, (axis, "embed"), fan_in=hidden)

    specs = {"embed": table(config.vocab_size, "vocab"), "positions": table(config.num_positions, None)}
    specs["types"] = table(config.num_types, None)
    specs |= _norm("embed_norm", hidden)
    for i in range(config.num_layers):
        specs |= {f"layers.{i}.{name}": spec for name, spec in _layer_specs(config, dtype).items()}
    if config.head != "none":
        specs |= _dense("head_dense", (hidden,), (hidden,), dtype)
        specs |= _dense("head_out", (hidden,), (config.num_labels,), dtype)
    return specs


def _layer_specs(config: EncoderConfig, dtype: np.dtype) -> dict[str, ParamSpec]:
    hidden, mlp, heads = (config.hidden_size,), (config.intermediate_size,), (config.num_heads, config.head_dim)
    return {
        **_dense("qkv", hidden, (3, *heads), dtype, ("embed", None, "q_heads", "head_dim")),
        **_dense("o", heads, hidden, dtype, ("q_heads", "head_dim", "embed")),
        **_norm("attn_norm", config.hidden_size),
        **_dense("up", hidden, mlp, dtype, ("embed", "mlp")),
        **_dense("down", mlp, hidden, dtype, ("mlp", "embed")),
        **_norm("mlp_norm", config.hidden_size),
    }


def _norm(name: str, size: int) -> dict[str, ParamSpec]:
    wide = jnp.dtype(jnp.float32)
    weight = ParamSpec((size,), wide, ("embed",), init="ones")
    return {name: weight, f"{name}_bias": ParamSpec((size,), wide, ("embed",), init="zeros")}


def _dense(
    name: str,
    ins: tuple[int, ...],
    outs: tuple[int, ...],
    dtype: np.dtype,
    axes: tuple[str | None, ...] = ("embed", None),
) -> dict[str, ParamSpec]:
    """A matrix [*ins, *outs] that stands as [in, out] on the device, and its bias [*outs]."""
    matrix = ParamSpec((*ins, *outs), dtype, axes, fan_in=int(np.prod(ins)), rows=len(ins), packable="head" not in name)
    bias = ParamSpec(outs, jnp.dtype(jnp.float32), axes[len(ins) :], init="zeros")
    return {name: matrix, f"{name}_bias": bias}


def hidden_states(
    config: EncoderConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    types: Array,
    attend: Attend,
    target: Target,
) -> Array:
    """Last hidden states [tokens, embed]. tokens, positions (rows of the table), types: int32 [tokens]."""
    x = params["embed"][tokens] + params["positions"][positions] + params["types"][types]
    x = layer_norm(x, params["embed_norm"], params["embed_norm_bias"], config.norm_eps)
    for i in range(config.num_layers):
        x = _layer(config, target, layer_params(params, i), x, attend)
    return x


def _layer(config: EncoderConfig, target: Target, weights: Params, x: Array, attend: Attend) -> Array:
    dense = partial(_dense_of, weights, target)
    qkv = dense(x, "qkv").reshape(x.shape[0], 3, config.num_heads, config.head_dim)
    seen = attend(qkv[:, 0], qkv[:, 1], qkv[:, 2])
    x = _normed(config, weights, "attn_norm", x + dense(seen.reshape(x.shape), "o"))
    wide = ACTIVATIONS[config.activation](dense(x, "up").astype(jnp.float32)).astype(x.dtype)
    return _normed(config, weights, "mlp_norm", x + dense(wide, "down"))


def label_logits(params: Params, first: Array, target: Target) -> Array:
    """float32 [rows, labels] from the last hidden states of each text's first token, [rows, embed]."""
    pooled = jnp.tanh(_dense_of(params, target, first, "head_dense").astype(jnp.float32)).astype(first.dtype)
    return _dense_of(params, target, pooled, "head_out").astype(jnp.float32)


def _dense_of(weights: Params, target: Target, x: Array, name: str) -> Array:
    out = linear(x, weights[name], target).astype(jnp.float32)
    return (out + weights[f"{name}_bias"].reshape(1, -1)).astype(x.dtype)


def _normed(config: EncoderConfig, weights: Params, name: str, x: Array) -> Array:
    return layer_norm(x, weights[name], weights[f"{name}_bias"], config.norm_eps)
