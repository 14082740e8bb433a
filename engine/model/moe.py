"""Mixture of experts: choose, sort the tokens by expert, two grouped products, weigh and add up.

A token's result depends on no other token: routing looks at it alone, `grouped_matmul` keeps rows
apart bit for bit, and its experts are added in the order of their weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import Experts
from engine.model.layers import Params, gated
from engine.model.params import mlp_block
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantized import Quantized
from pallas_kernels.target import Target


def expert_mlps(experts: Experts, activation: str, x: Array, weights: Params, target: Target) -> Array:
    """x [tokens, embed] -> the same shape: each token's experts, weighed and added in float32."""
    tokens, k = x.shape[0], experts.per_token
    weight, chosen = route(experts, x, weights["router"])
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # slot of (token, choice) by expert
    sizes = jnp.zeros((experts.num_experts,), jnp.int32).at[chosen.reshape(-1)].add(1)
    hidden = _grouped(x[order // k], weights["experts_gate_up"], sizes, target)
    hidden = gated(hidden, activation, mlp_block(experts.intermediate_size))
    out = _grouped(hidden, weights["experts_down"], sizes, target)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=order.dtype))
    out = out[back].reshape(tokens, k, -1).astype(jnp.float32)
    return jnp.sum(out * weight[:, :, None], axis=1).astype(x.dtype)


def _grouped(x: Array, w: Array | Quantized, sizes: Array, target: Target) -> Array:
    """`linear` with a weight [experts, in, out] (or a shape that flattens to it) of which each row takes its own."""
    if not isinstance(w, Quantized):
        w = w.reshape(w.shape[0], x.shape[1], -1)
    return grouped_matmul(x, w, sizes, target=target)


def route(experts: Experts, x: Array, router: Array) -> tuple[Array, Array]:
    """(weight, expert) of each token's choices, float32 and int32 [tokens, per_token], heaviest first."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    scores = jnp.dot(x, router, precision=precision, preferred_element_type=jnp.float32)
    weight, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), experts.per_token)
    if experts.normalize:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return weight, chosen.astype(jnp.int32)
