"""rope by the compiled CPU kernels (`pallas_kernels.native`): one call for five small operations of XLA's.

Keys and values leave side by side, as a page's rows have them.
"""

from __future__ import annotations

import jax
from jax import Array

from pallas_kernels.native.build import LANES
from pallas_kernels.native.library import ROPE, not_native
from pallas_kernels.rope.spec import RopeSpec
from pallas_kernels.target import Target


def declines(spec: RopeSpec, target: Target) -> str | None:
    """Why not: no library, a type that it does not read, halves that are no whole vectors, several devices."""
    why = not_native(target, spec.num_devices)
    if why is not None:
        return why
    if spec.dtype not in ("float32", "bfloat16"):
        return spec.dtype
    lanes = LANES[target.native]
    if spec.rotated % (2 * lanes) or spec.head_dim % lanes:
        return f"{spec.rotated} of {spec.head_dim}: halves and heads that are no multiples of {lanes}"
    return None


def run(qkv: Array, cos: Array, sin: Array, target: Target) -> tuple[Array, Array, Array]:
    """See `api.split_rotated`."""
    tokens, heads, turns, head_dim = qkv.shape
    parts = [
        jax.ShapeDtypeStruct((tokens, heads * (turns - 2), head_dim), qkv.dtype),
        jax.ShapeDtypeStruct((tokens, heads, 2, head_dim), qkv.dtype),
    ]
    q, kv = jax.ffi.ffi_call(ROPE, parts)(qkv, cos, sin, isa=target.native)
    return q, kv[:, :, 0], kv[:, :, 1]
