"""rms_norm in plain JAX: what a TPU and a GPU run, the fallback on a CPU, and the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.target import Target


def run(x: Array, y: Array | None, weight: Array, eps: float, target: Target) -> tuple[Array, Array]:
    """See `api.add_rms_norm`; without y, x and its norm."""
    x = x if y is None else x + y
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return x, (wide * scale * weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)).astype(x.dtype)
