"""quantized_matmul in plain JAX: the fallback on every backend and the oracle of the kernels.

The weight is dequantized a block of columns at a time, which stays in a CPU's cache (see
docs/kernels/quantized_matmul.md for what that gains), so a whole copy never exists.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.products import product
from pallas_kernels.quantized import BLOCK, LARGEST, Quantized, as_bits, dequantize
from pallas_kernels.quantized import numbers as packed_numbers
from pallas_kernels.target import Target

_CPU_BLOCK = 1 << 20  # weights that are dequantized at once, 4 MiB
_BLOCK = 1 << 24


def run(x: Array, w: Quantized, *, target: Target, dtype: np.dtype) -> Array:
    """x [tokens, K] @ w [K, N] -> [tokens, N] in dtype; see `api.quantized_matmul`."""
    numbers, row_scales = rounded(x, w)
    rows, columns = w.shape
    width = max(64, (_CPU_BLOCK if target.platform == "cpu" else _BLOCK) // rows // 64 * 64)
    wide = _product_dtype(numbers, target)
    if width >= columns:
        return _scaled(_product(numbers, w, wide), row_scales, dtype)

    whole = replace(w, values=as_bits(w.values))

    def block(index: Array, out: Array) -> Array:
        start = jnp.minimum(index * width, columns - width)  # the last block overlaps the one before
        cut = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, width, axis=1), whole)
        cut = replace(cut, values=lax.bitcast_convert_type(cut.values, w.values.dtype))
        return lax.dynamic_update_slice(out, _scaled(_product(numbers, cut, wide), row_scales, dtype), (0, start))

    return lax.fori_loop(0, -(-columns // width), block, jnp.zeros((x.shape[0], columns), dtype))


def rounded(x: Array, w: Quantized) -> tuple[Array, Array | None]:
    """x as w's activations have it, and its rows' scales if they are left to the sums."""
    if w.activations == "dynamic":
        return quantize_rows(x, w.format)
    if w.activations == "float":
        return x, None
    blocks, scales = quantize_rows(x.reshape(-1, BLOCK), "int8")
    return (blocks.astype(jnp.float32) * scales).reshape(x.shape), None


def quantize_rows(x: Array, format: str) -> tuple[Array, Array]:
    """x [tokens, K] as 8-bit numbers and their scales, float32 [tokens, 1]. A NaN makes its row's scale NaN."""
    wide = x.astype(jnp.float32)
    limit = LARGEST[format]
    # As integers: bits of magnitudes have their order, NaN's above all, and XLA's CPU backend drops NaN from a
    # large array's highest numbers (seen with jaxlib 0.12.0.1).
    highest = jnp.max(lax.bitcast_convert_type(jnp.abs(wide), jnp.int32), axis=1, keepdims=True)
    magnitude = lax.bitcast_convert_type(highest, jnp.float32)
    scales = jnp.maximum(magnitude / limit, jnp.finfo(jnp.float32).tiny)
    numbers = jnp.clip(wide * (1.0 / scales), -limit, limit)  # a division a number costs as much as half of a product
    return (jnp.round(numbers) if format == "int8" else numbers).astype(format), scales


def _product_dtype(numbers: Array, target: Target) -> DTypeLike:
    """What is multiplied. A CPU converts to float32 fast and to bfloat16 slowly; 8-bit numbers are exact in both."""
    if target.platform == "cpu":
        return jnp.float32
    return jnp.bfloat16 if numbers.dtype.itemsize == 1 else numbers.dtype


def _product(x: Array, w: Quantized, dtype: DTypeLike) -> Array:
    """float32 [tokens, N]. One scale a column is applied to the sums, more are applied to the weights."""
    per_channel = w.format != "int4" and w.scales.shape[0] == 1
    right = packed_numbers(w).astype(dtype) if per_channel else dequantize(w, dtype)
    out = product("tk,kn->tn", x.astype(dtype), right)
    return out * w.scales.astype(jnp.float32) if per_channel else out


def _scaled(out: Array, row_scales: Array | None, dtype: DTypeLike) -> Array:
    return (out if row_scales is None else out * row_scales).astype(dtype)
