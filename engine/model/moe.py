"""Mixture of experts: choose, sort the tokens by expert, two grouped products, weigh and add up.

A token's result depends on no other token: routing looks at it alone, `grouped_matmul` keeps rows
apart bit for bit, and its experts are added in the order of their weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import Experts
from engine.model.layers import Params
from engine.model.params import mlp_block
from engine.model.place import Place
from pallas_kernels.gated import gated
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.products import product
from pallas_kernels.quantized import Quantized
from pallas_kernels.target import Target


def expert_mlps(experts: Experts, activation: str, x: Array, weights: Params, place: Place) -> tuple[Array, Array]:
    """x [tokens, embed] -> the same shape: each token's experts, weighed and added in float32; and which they were,
    int32 [tokens, per_token].

    Where experts are cut, each device computes those that it has, for every token.
    """
    x = place.all_tokens(x, "experts", "expert_mlp")
    tokens, k = x.shape[0], experts.per_token
    here = experts.num_experts // place.count("experts")
    weight, chosen = route(experts, x, weights)
    # Of slot (token, choice), counted from this device's first expert; those of other devices come last.
    expert = (chosen.reshape(-1) - place.index("experts") * here) % experts.num_experts
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.zeros((experts.num_experts,), jnp.int32).at[expert].add(1)[:here]
    mine = jnp.minimum(expert[order], here - 1)
    hidden = _grouped(x[order // k], weights["experts_gate_up"], sizes, place.target)
    if experts.biases:
        hidden = hidden + weights["experts_gate_up_bias"].reshape(here, -1)[mine]
    block = mlp_block(experts.intermediate_size)
    hidden = gated(hidden, activation, block, target=place.target, clamp=experts.clamp)
    out = _grouped(hidden, weights["experts_down"], sizes, place.target)[:, : x.shape[1]]  # see `ParamSpec.by_rows`
    if experts.biases:
        first = place.index("expert_mlp") == 0  # a bias counts once
        out = out + jnp.where(first, weights["experts_down_bias"], 0)[mine]
    back = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=order.dtype))
    out = out[back].reshape(tokens, k, -1).astype(jnp.float32)
    weight = jnp.where(expert.reshape(tokens, k) < here, weight, 0)
    total = jnp.sum(out * weight[:, :, None], axis=1).astype(x.dtype)
    return place.sum(total, "experts", "expert_mlp"), place.own_tokens(chosen, "experts", "expert_mlp")


def _grouped(x: Array, w: Array | Quantized, sizes: Array, target: Target) -> Array:
    """`linear` with a weight [experts, in, out] (or a shape that flattens to it) of which each row takes its own."""
    if not isinstance(w, Quantized):
        w = w.reshape(w.shape[0], x.shape[1], -1)
    return grouped_matmul(x, w, sizes, target=target)


def route(experts: Experts, x: Array, weights: Params) -> tuple[Array, Array]:
    """(weight, expert) of each token's choices, float32 and int32 [tokens, per_token], first choice first."""
    scores = product("th,he->te", x, weights["router"])
    if experts.router_bias:
        scores = scores + weights["router_bias"][None]
    scores = jax.nn.softmax(scores, axis=-1) if experts.scoring == "softmax" else jax.nn.sigmoid(scores)
    ranked = scores + weights["router_correction"][None] if experts.correction else scores
    _, chosen = jax.lax.top_k(_in_best_groups(experts, ranked), experts.per_token)
    weight = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalize:
        weight = weight / (jnp.sum(weight, axis=-1, keepdims=True) + 1e-20)
    return weight * experts.scale, chosen.astype(jnp.int32)


def _in_best_groups(experts: Experts, ranked: Array) -> Array:
    """`ranked` [tokens, experts] with -inf for the experts of closed groups (device-limited routing of DeepSeek-V2)."""
    if experts.groups == 1:
        return ranked
    grouped = ranked.reshape(ranked.shape[0], experts.groups, -1)
    best = jnp.sum(jax.lax.top_k(grouped, experts.group_best)[0], axis=-1)
    _, kept = jax.lax.top_k(best, experts.groups_kept)
    is_open = jnp.any(kept[:, :, None] == jnp.arange(experts.groups)[None, None], axis=1)
    return jnp.where(is_open[:, :, None], grouped, -jnp.inf).reshape(ranked.shape)
