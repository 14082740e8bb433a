"""greedy in plain JAX: what a TPU and a GPU run, the fallback on a CPU, and the oracle."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from pallas_kernels.target import Target


def run(logits: Array, target: Target) -> tuple[Array, Array]:
    """See `api.greedy`."""
    token = _by_blocks(logits) if target.platform == "cpu" else jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return token, ~jnp.all(jnp.isfinite(logits), axis=-1)


def _by_blocks(logits: Array) -> Array:
    """A CPU finds the highest of a block in vectors, but its place one number at a time."""
    block = math.gcd(logits.shape[1], 64)
    blocks = logits.reshape(logits.shape[0], -1, block)
    first = jnp.argmax(jnp.max(blocks, axis=2), axis=1)
    inside = jnp.argmax(jnp.take_along_axis(blocks, first[:, None, None], axis=1)[:, 0], axis=1)
    return (first * block + inside).astype(jnp.int32)
