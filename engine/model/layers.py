"""The mathematics a decoder is made of: pure functions over named shapes.

Knows nothing about caches, batches or checkpoints. Activations are in the weights' dtype;
norms, rotary angles, softmax and logits are float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import Rope
from engine.model.place import Place
from pallas_kernels import rms_norm as norms
from pallas_kernels.gated import gated
from pallas_kernels.matmul import matmul
from pallas_kernels.panels import Panels
from pallas_kernels.quantized import Quantized
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.target import Target

Params = dict[str, Any]  # arrays; matrices that `linear` multiplies may be `Quantized`


def linear(x: Array, weight: Array | Quantized | Panels, target: Target) -> Array:
    """x [tokens, in] times weight [in, out] (or a shape that flattens to it), accumulated in float32."""
    if isinstance(weight, Quantized):
        return quantized_matmul(x, weight, target=target)
    if not isinstance(weight, Panels):
        weight = weight.reshape(x.shape[1], -1)
    return matmul(x, weight, target=target, dtype=x.dtype)


def rms_norm(x: Array, weight: Array, eps: float, place: Place) -> Array:
    """Over the last axis; see `pallas_kernels.rms_norm`."""
    return norms.rms_norm(x, weight, eps, target=place.target, num_devices=place.shards.num_devices)


def add_rms_norm(x: Array, y: Array, weight: Array, eps: float, place: Place) -> tuple[Array, Array]:
    """x + y, and its norm."""
    return norms.add_rms_norm(x, y, weight, eps, target=place.target, num_devices=place.shards.num_devices)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / deviation * weight + bias over the last axis, in float32 (arXiv 1607.06450)."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * scale * weight[None] + bias[None]).astype(x.dtype)


def rope_cos_sin(rope: Rope, positions: Array) -> tuple[Array, Array]:
    """cos and sin, float32 [tokens, rotated], of position * inv_freq, once for each half (arXiv 2104.09864)."""
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(rope.inv_freq, jnp.float32)[None, :]
    angles = jnp.concatenate([angles, angles], axis=1)
    # XLA would draw them into every layer's rotation, and compute them again for every head.
    return jax.lax.optimization_barrier((jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale))


def gated_mlp(x: Array, weights: Params, activation: str, block: int, place: Place) -> Array:
    """down(act(gate(x)) * up(x)); x is [tokens, embed]; gate and up stand in turns of `block` columns."""
    x = place.all_tokens(x, "mlp")
    gate_up = linear(x, weights["gate_up"], place.target)
    if "gate_up_bias" in weights:
        gate_up = gate_up + weights["gate_up_bias"].reshape(1, -1)
    hidden = gated(gate_up, activation, block, target=place.target)
    out = place.sum(linear(hidden, weights["down"], place.target), "mlp")
    return out + weights["down_bias"][None] if "down_bias" in weights else out


def softcap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): bounds x smoothly (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
