"""gated in plain JAX: what a TPU and a GPU run, the fallback on a CPU, and the oracle."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.target import Target

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def run(x: Array, activation: str, block: int, clamp: float | None, target: Target) -> Array:
    """See `api.gated`."""
    turns = x.reshape(x.shape[0], -1, 2, block)
    gate, up = turns[:, :, 0].astype(jnp.float32), turns[:, :, 1]
    if clamp is None:
        gate = ACTIVATIONS[activation](gate).astype(up.dtype)
    else:
        gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp) + 1
        gate = (gate * jax.nn.sigmoid(1.702 * gate)).astype(up.dtype)
    return (gate * up).reshape(x.shape[0], -1)
