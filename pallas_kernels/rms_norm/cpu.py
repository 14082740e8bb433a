"""rms_norm by the compiled CPU kernels (`pallas_kernels.native`): one call for what XLA makes of several small ones.

A row's squares are summed in one order; XLA takes another one for up to four rows than for more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.native.build import LANES
from pallas_kernels.native.library import NORM, not_native
from pallas_kernels.rms_norm.spec import NormSpec
from pallas_kernels.target import Target


def declines(spec: NormSpec, target: Target) -> str | None:
    """Why not: no library, a type that it does not read, rows that are no whole vectors, several devices."""
    why = not_native(target, spec.num_devices)
    if why is not None:
        return why
    if spec.dtype not in ("float32", "bfloat16"):
        return spec.dtype
    lanes = LANES[target.native]
    return f"rows of {spec.size}: not multiples of {lanes}" if spec.size % lanes else None


def run(x: Array, y: Array | None, weight: Array, eps: float, target: Target) -> tuple[Array, Array]:
    """See `api.add_rms_norm`; without y, x and its norm."""
    added = jnp.zeros((0,), x.dtype) if y is None else y
    call = jax.ffi.ffi_call(NORM, [jax.ShapeDtypeStruct(a.shape, x.dtype) for a in (added, x)])
    weight = weight.reshape(-1, x.shape[-1]).astype(jnp.float32)
    total, normed = call(x, added, weight, isa=target.native, eps=np.float32(eps))
    return x if y is None else total, normed
