"""quantized_matmul in plain JAX: the fallback on every backend and the oracle of the kernels.

The low-bit numbers are exact in bfloat16 and float32, so x is multiplied with them as they are and
the scales are applied to the sums: no dequantized copy of the weight.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantized import LARGEST, Quantized
from pallas_kernels.target import Target


def run(x: Array, w: Quantized, *, target: Target) -> Array:
    """x [tokens, K] @ w [K, N] -> [tokens, N]; see `api.quantized_matmul`."""
    if w.activations == "dynamic":
        numbers, row_scales = quantize_rows(x, w.format)
        return (_float(numbers, w) * row_scales).astype(x.dtype)
    return _float(x, w).astype(x.dtype)


def quantize_rows(x: Array, format: str) -> tuple[Array, Array]:
    """x [tokens, K] as 8-bit numbers and their scales, float32 [tokens, 1]. A NaN makes its row's scale NaN."""
    wide = x.astype(jnp.float32)
    limit = LARGEST[format]
    scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=1, keepdims=True) / limit, jnp.finfo(jnp.float32).tiny)
    numbers = jnp.clip(wide / scales, -limit, limit)
    return (jnp.round(numbers) if format == "int8" else numbers).astype(format), scales


def _float(x: Array, w: Quantized) -> Array:
    """float32 [tokens, N]: a product a group, scaled, and their sum."""
    groups, group = w.scales.shape[0], w.group
    if w.format == "int4":
        sums = _int4_sums(x, w)
    elif groups == 1:
        return _dot(x, w.values) * w.scales.astype(jnp.float32)
    else:
        columns = w.values.reshape(groups, group, -1)
        sums = _grouped_dot(x.reshape(-1, groups, group), columns)
    out = jnp.sum(sums * w.scales.astype(jnp.float32)[:, None], axis=0)
    if w.offsets is not None:
        row_sums = jnp.sum(x.astype(jnp.float32).reshape(-1, groups, group), axis=2)
        out += _dot(row_sums, w.offsets.astype(jnp.float32))
    return out


def _int4_sums(x: Array, w: Quantized) -> Array:
    """float32 [groups, tokens, N]: each half of a group times its nibbles."""
    groups, half = w.scales.shape[0], w.group // 2
    packed = w.values.reshape(groups, half, -1)
    low, high = (nibbles.astype(jnp.int8) for nibbles in (packed & 15, packed >> 4))
    if w.offsets is None:
        low, high = low - 8, high - 8
    parts = x.reshape(-1, groups, 2, half)
    return _grouped_dot(parts[:, :, 0], low) + _grouped_dot(parts[:, :, 1], high)


def _grouped_dot(x: Array, values: Array) -> Array:
    """[groups, tokens, N] of x [tokens, groups, rows] and values [groups, rows, N]."""
    return _product(x, values, (((2,), (1,)), ((1,), (0,))))


def _dot(x: Array, values: Array) -> Array:
    return _product(x, values, (((1,), (0,)), ((), ())))


def _product(x: Array, values: Array, dimensions: Any) -> Array:
    if x.dtype == jnp.int8:
        return lax.dot_general(x, values, dimensions, preferred_element_type=jnp.int32).astype(jnp.float32)
    if x.dtype != values.dtype or x.dtype.itemsize == 1:
        wide = x.dtype if x.dtype.itemsize > 1 else jnp.bfloat16
        x, values = x.astype(wide), values.astype(wide)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, values, dimensions, precision=precision, preferred_element_type=jnp.float32)
