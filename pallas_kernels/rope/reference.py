"""rope in plain JAX: what a TPU and a GPU run, the fallback on a CPU, and the oracle."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.target import Target


def run(qkv: Array, cos: Array, sin: Array, target: Target) -> tuple[Array, Array, Array]:
    """See `api.split_rotated`."""
    tokens, _, _, head_dim = qkv.shape
    qk = rotate(qkv[:, :, :-1], cos, sin)
    return qk[:, :, :-1].reshape(tokens, -1, head_dim), qk[:, :, -1], qkv[:, :, -1]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """[tokens, ..., head_dim] in the halves layout; numbers past those of cos [tokens, rotated] are kept."""
    rotated = cos.shape[-1]
    half = rotated // 2
    shape = (cos.shape[0], *(1,) * (x.ndim - 2), half)
    cos, sin = cos[:, :half].reshape(shape), sin[:, :half].reshape(shape)
    left, right = x[..., :half].astype(jnp.float32), x[..., half:rotated].astype(jnp.float32)
    turned = ((left * cos - right * sin).astype(x.dtype), (right * cos + left * sin).astype(x.dtype))
    return jnp.concatenate([*turned, x[..., rotated:]], axis=-1)
