"""quantized_matmul by the compiled CPU kernels: int8 weights are read as int8, a quarter of float32's bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from pallas_kernels.matmul import cpu
from pallas_kernels.matmul.spec import MatmulSpec
from pallas_kernels.quantized import Quantized
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.quantized_matmul.api import MatmulSpec as PackedSpec


def declines(spec: PackedSpec, target: Target) -> str | None:
    """Why not: all that `matmul` declines, and weights other than int8 with one scale a column."""
    why = cpu.declines(MatmulSpec(spec.tokens, spec.k, spec.n, spec.dtype, "int8"), target)
    if why is not None:
        return why
    if spec.format != "int8" or spec.group != spec.k or spec.offsets or spec.activations != "float":
        return "only int8 with one scale a column"
    return None


def panel_of(w: Quantized, target: Target) -> int:
    """As `matmul.cpu.panel_of`."""
    served = w.format == "int8" and w.scales.shape[-2] == 1 and w.offsets is None and w.activations == "float"
    return cpu.panel_of(w.shape[-2], w.shape[-1], "int8", target) if served else 0


def run(x: Array, w: Quantized, *, target: Target) -> Array:
    """See `api.quantized_matmul`."""
    out = cpu.run(x, w.values, transposed=False, target=target)
    return (out * w.scales.astype(jnp.float32)).astype(x.dtype)
