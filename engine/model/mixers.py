"""How a layer's tokens see each other: projections, norms and rotation around `attend`.

`attend` is handed in and decides what each token sees and what is kept for later ones; nothing is
known here about sequences, pages, states or batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import LayerSpec, ModelConfig
from engine.model.layers import Params, linear, rms_norm
from engine.model.place import Place
from pallas_kernels.gated import ACTIVATIONS
from pallas_kernels.gated_delta.api import DeltaInput
from pallas_kernels.rope import rotate, split_rotated
from pallas_kernels.ssd.api import SSDInput


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionInput:
    """What a layer brings to attention.

    Latent (`Latent`): k is the cache's one vector a token, v is None, and `up` projects each head's key
    and value from its first kv_rank numbers; the rest is the rotary part of all heads' keys.
    """

    q: Array  # [tokens, q_heads, head_dim]
    k: Array  # [tokens, kv_heads, head_dim]; latent: [tokens, 1, row_dim]
    v: Array | None  # like k
    sinks: Array | None = None  # float32 [q_heads]
    up: tuple[Array, Array] | None = None  # [q_heads, kv_rank, nope_dim], [q_heads, kv_rank, value_dim]

    def part(self, start: int, end: int | None) -> AttentionInput:
        """Of queries [start, end) alone."""
        return replace(self, q=self.q[start:end])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentInput:
    """What a layer brings to a recurrence: what goes through its short convolution, and what is read beside that."""

    mixed: Array  # [tokens, channels]
    weight: Array  # [width, channels], the newest token's last
    bias: Array | None  # [channels]
    beside: tuple[Array, ...]  # what `RECURRENCES` takes of the layer's kind of mixer


# attend(config, layer, view, cache, brought) -> (values [tokens, heads, head_dim or value_dim], cache):
# a pure function; `view` is what all layers share, `cache` the layer's own memory.
Attend = Callable[[ModelConfig, LayerSpec, Any, Any, Any], tuple[Array, Any]]
See = Callable[[AttentionInput | RecurrentInput], tuple[Array, Any]]
Rotation = tuple[Array, Array] | None  # cos and sin of the tokens' positions


def attention(
    config: ModelConfig, place: Place, x: Array, weights: Params, rope: Rotation, see: See
) -> tuple[Array, Any]:
    """Grouped-query attention: project, norm, rotate, attend, project back."""
    tokens, group = x.shape[0], config.q_per_kv
    qkv = linear(x, weights["qkv"], place.target)
    if config.qkv_bias:
        qkv = qkv + weights["qkv_bias"].reshape(1, -1)
    qkv = qkv.reshape(tokens, config.num_kv_heads, group + 2, config.head_dim)
    if config.qk_norm != "none":
        qk = QK_NORMS[config.qk_norm](config, place, qkv[:, :, :-1], weights)
        qkv = jnp.concatenate([qk, qkv[:, :, -1:]], axis=2)
    q, k, v = _parted(qkv, rope, place)
    sinks = weights["sinks"].reshape(-1) if config.attention_sinks else None
    out, cache = see(AttentionInput(q, k, v, sinks))
    out = out.reshape(tokens, -1)
    if config.attention_gate:
        gate = linear(x, weights["attn_gate"], place.target).astype(jnp.float32)
        out = (out.astype(jnp.float32) * jax.nn.sigmoid(gate)).astype(x.dtype)
    out = place.sum(linear(out, weights["o"], place.target), "kv_heads")
    return out + weights["o_bias"][None] if config.output_bias else out, cache


def _parted(qkv: Array, rope: Rotation, place: Place) -> tuple[Array, Array, Array]:
    """(q, k, v), with positions where there are any; see `pallas_kernels.rope.split_rotated`."""
    if rope is not None:
        return split_rotated(qkv, *rope, target=place.target, num_devices=place.shards.num_devices)
    return qkv[:, :, :-2].reshape(qkv.shape[0], -1, qkv.shape[3]), qkv[:, :, -2], qkv[:, :, -1]


def latent_attention(
    config: ModelConfig, place: Place, x: Array, weights: Params, rope: Rotation, see: See
) -> tuple[Array, Any]:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1)."""
    latent, tokens = config.latent, x.shape[0]
    if latent is None or rope is None:
        raise ValueError("latent attention needs its sizes and a rope")
    queries = x
    if latent.q_rank is not None:
        queries = rms_norm(linear(x, weights["q_a"], place.target), weights["q_a_norm"], config.norm_eps, place)
    q = linear(queries, weights["q"], place.target).reshape(tokens, config.num_q_heads, -1)
    q = jnp.concatenate([q[..., : latent.nope_dim], rotate(q[..., latent.nope_dim :], *rope)], axis=-1)
    row = linear(x, weights["kv_a"], place.target)
    compressed = rms_norm(row[:, : latent.kv_rank], weights["kv_a_norm"], config.norm_eps, place)
    row = jnp.concatenate([compressed, rotate(row[:, latent.kv_rank :], *rope)], axis=-1)
    out, cache = see(AttentionInput(q, row[:, None], None, up=(weights["k_up"], weights["v_up"])))
    return place.sum(linear(out.reshape(tokens, -1), weights["o"], place.target), "q_heads"), cache


def mamba2(config: ModelConfig, place: Place, x: Array, weights: Params, rope: Rotation, see: See) -> tuple[Array, Any]:
    """Mamba 2's mixer (arXiv 2405.21060, section 7): project, convolve, recur, gate and norm, project back."""
    ssm, tokens = config.state_space, x.shape[0]
    if ssm is None:
        raise ValueError("a mamba2 layer needs its sizes")
    projected = linear(x, weights["ssm_in"], place.target)
    if ssm.bias:
        projected = projected + weights["ssm_in_bias"][None]
    gate, mixed, steps = jnp.split(projected, [ssm.inner_dim, ssm.inner_dim + ssm.conv_channels], axis=1)
    dt = jax.nn.softplus(steps.astype(jnp.float32) + weights["dt_bias"][None])
    beside = (jnp.clip(dt, ssm.least_step, ssm.most_step), -jnp.exp(weights["a_log"]), weights["skip"])
    out, cache = see(RecurrentInput(mixed, weights["conv"], weights.get("conv_bias"), beside))
    out = out.reshape(tokens, -1).astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    norm = weights["ssm_norm"].reshape(ssm.groups, -1)
    out = rms_norm(out.reshape(tokens, ssm.groups, -1), norm, config.norm_eps, place).reshape(tokens, -1)
    out = linear(out.astype(x.dtype), weights["ssm_out"], place.target)
    return out + weights["ssm_out_bias"][None] if ssm.bias else out, cache


def _ssd_input(config: ModelConfig, convolved: Array, dt: Array, a: Array, skip: Array) -> SSDInput:
    ssm, tokens = config.state_space, convolved.shape[0]
    if ssm is None:
        raise ValueError("a mamba2 layer needs its sizes")
    active = ACTIVATIONS[config.activation](convolved.astype(jnp.float32)).astype(convolved.dtype)
    values, b, c = jnp.split(active, [ssm.inner_dim, ssm.inner_dim + ssm.groups * ssm.state_dim], axis=1)
    b, c = (each.reshape(tokens, ssm.groups, ssm.state_dim) for each in (b, c))
    return SSDInput(values.reshape(tokens, ssm.num_heads, ssm.head_dim), b, c, dt, a, skip)


def gated_delta(
    config: ModelConfig, place: Place, x: Array, weights: Params, rope: Rotation, see: See
) -> tuple[Array, Any]:
    """A gated delta net (arXiv 2412.06464) as in Qwen3-Next: project, convolve, recur, norm and gate, project back."""
    rule, tokens = config.delta_rule, x.shape[0]
    if rule is None:
        raise ValueError("a gated_delta layer needs its sizes")
    mixed, gate = jnp.split(linear(x, weights["delta_in"], place.target), [rule.conv_channels], axis=1)
    strength, steps = jnp.split(linear(x, weights["delta_steps"], place.target).astype(jnp.float32), 2, axis=1)
    log_decay = -jnp.exp(weights["a_log"])[None] * jax.nn.softplus(steps + weights["dt_bias"][None])
    out, cache = see(RecurrentInput(mixed, weights["conv"], None, (log_decay, jax.nn.sigmoid(strength))))
    out = rms_norm(out, weights["delta_norm"], config.norm_eps, place).astype(jnp.float32).reshape(tokens, -1)
    out = (out * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
    return linear(out, weights["delta_out"], place.target), cache


def _delta_input(config: ModelConfig, convolved: Array, log_decay: Array, beta: Array) -> DeltaInput:
    rule, tokens = config.delta_rule, convolved.shape[0]
    if rule is None:
        raise ValueError("a gated_delta layer needs its sizes")
    active, keys = ACTIVATIONS[config.activation](convolved.astype(jnp.float32)), rule.key_heads * rule.key_dim
    q, k, v = jnp.split(active, [keys, 2 * keys], axis=1)
    q, k = (_unit(a.reshape(tokens, rule.key_heads, rule.key_dim)) for a in (q, k))
    values = v.reshape(tokens, rule.value_heads, rule.value_dim).astype(convolved.dtype)
    return DeltaInput(q * rule.key_dim**-0.5, k, values, log_decay, beta)


def _unit(x: Array) -> Array:
    """Vectors along the last axis at length 1; the bound is that of the model's own code."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _norm_heads(config: ModelConfig, place: Place, qk: Array, weights: Params) -> Array:
    """RMS over each head's head_dim; qk is [tokens, kv_heads, queries and key, head_dim]."""
    query = jnp.broadcast_to(weights["q_norm"][None], (config.q_per_kv, config.head_dim))
    return rms_norm(qk, jnp.concatenate([query, weights["k_norm"][None]]), config.norm_eps, place)


def _norm_full(config: ModelConfig, place: Place, qk: Array, weights: Params) -> Array:
    """RMS over all query heads together, and over all keys together, wherever they are."""
    parts = place.count("kv_heads")

    def norm(x: Array, weight: Array) -> Array:  # [tokens, kv_heads, ...]
        axes, wide = tuple(range(1, x.ndim)), x.astype(jnp.float32)
        squares = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
        scale = jax.lax.rsqrt(place.sum(squares, "kv_heads") / parts + config.norm_eps)
        return (wide * scale * weight[None]).astype(x.dtype)

    q, k = norm(qk[:, :, :-1], weights["q_norm"]), norm(qk[:, :, -1], weights["k_norm"])
    return jnp.concatenate([q, k[:, :, None]], axis=2)


# What a recurrence reads, of (config, what was convolved [tokens, channels], *RecurrentInput.beside).
RECURRENCES: dict[str, Callable[..., SSDInput | DeltaInput]] = {"mamba2": _ssd_input, "gated_delta": _delta_input}
MIXERS = {"attention": attention, "latent": latent_attention, "mamba2": mamba2, "gated_delta": gated_delta}
QK_NORMS = {"head": _norm_heads, "full": _norm_full}
