"""Paged attention by the compiled CPU kernels (`pallas_kernels.native`): pages are read where they are.

Keys are folded 32 at a time from absolute positions on, so a query's result is the same bits
whether it comes in a chunk of any size or as a decode row, and whatever is beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.native.build import LANES
from pallas_kernels.native.library import DECODE_ATTENTION, PREFILL_ATTENTION, not_native
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import AttentionSpec


def declines(spec: AttentionSpec, target: Target) -> str | None:
    """Why not: no library, a type that it does not read, sizes that are no whole vectors."""
    why = not_native(target)
    if why is not None:
        return why
    layout, lanes = spec.layout, LANES[target.native]
    if spec.dtype not in ("float32", "bfloat16"):
        return f"queries in {spec.dtype}"
    if layout.dtype not in ("float32", "bfloat16", "int8"):
        return f"pages in {layout.dtype}"
    if layout.quantized and layout.latent:
        return "a quantized latent has two scales a vector"
    if layout.head_dim % lanes or layout.result_dim % lanes:
        return f"heads of {layout.head_dim} and values of {layout.result_dim}: not multiples of {lanes}"
    return None


def decode(q: Array, kv_pages: Array, block_tables: Array, kv_lens: Array, **how: Any) -> Array:
    """See `api.decode_attention`."""
    return _call(DECODE_ATTENTION, q, kv_pages, block_tables, kv_lens, **how)


def prefill(
    q: Array, kv_pages: Array, block_tables: Array, q_starts: Array, q_lens: Array, positions: Array, **how: Any
) -> Array:
    """See `api.prefill_attention`."""
    return _call(PREFILL_ATTENTION, q, kv_pages, block_tables, q_starts, q_lens, positions, **how)


def _call(
    name: str,
    q: Array,
    kv_pages: Array,
    *rows: Array,
    layout: KVLayout,
    target: Target,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
) -> Array:
    result = jax.ShapeDtypeStruct((*q.shape[:2], layout.result_dim), q.dtype)
    attributes = _attributes(layout, target, scale, softcap, window)
    return jax.ffi.ffi_call(name, result)(q, kv_pages, *rows, _sinks(sinks), **attributes)


def _sinks(sinks: Array | None) -> Array:
    """float32 [q_heads], or [0] without."""
    return jnp.zeros((0,), jnp.float32) if sinks is None else sinks.astype(jnp.float32)


def _attributes(
    layout: KVLayout, target: Target, scale: float, softcap: float | None, window: int | None
) -> dict[str, Any]:
    """Of the call, in the types that it takes; 0 is none."""
    return {
        "isa": target.native,
        "heads": np.int64(layout.kv_heads),
        "head_stride": np.int64(layout.head_vectors * layout.head_width),
        "value_offset": np.int64(0 if layout.latent else layout.head_width),
        "exponents": np.int64(layout.tail),
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0.0),
        "window": np.int64(window or 0),
    }
