"""The one way in which plain JAX multiplies here: summed in float32, float32 operands at full precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def product(equation: str, x: Array, y: Array) -> Array:
    """float32 einsum of two arrays of one dtype. A TPU or GPU would otherwise round float32 operands."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
