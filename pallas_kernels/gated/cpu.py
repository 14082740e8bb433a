"""gated by the compiled CPU kernels (`pallas_kernels.native`): XLA takes blocks apart on one core, number by number."""

from __future__ import annotations

import jax
import numpy as np
from jax import Array

from pallas_kernels.gated.spec import GatedSpec
from pallas_kernels.native.build import LANES
from pallas_kernels.native.library import GATE, not_native
from pallas_kernels.target import Target


def declines(spec: GatedSpec, target: Target) -> str | None:
    """Why not: no library, another activation than SiLU, blocks that are no whole vectors."""
    why = not_native(target)
    if why is not None:
        return why
    if spec.clamped or spec.activation != "silu":
        return "clamped" if spec.clamped else spec.activation
    if spec.dtype not in ("float32", "bfloat16"):
        return spec.dtype
    lanes = LANES[target.native]
    return f"blocks of {spec.block}: not multiples of {lanes}" if spec.block % lanes else None


def run(x: Array, activation: str, block: int, clamp: float | None, target: Target) -> Array:
    """See `api.gated`."""
    result = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // 2), x.dtype)
    return jax.ffi.ffi_call(GATE, result)(x, isa=target.native, block=np.int64(block))
