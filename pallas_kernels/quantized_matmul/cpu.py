"""quantized_matmul by the compiled CPU kernels: weights are read with the bits they have and widened in registers.

What is multiplied is, bit for bit, what `dequantize` gives in float32 wherever a number times its scale is
exact there, as it is of 4-bit numbers with scales of 16 bits; sums are float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.matmul import cpu
from pallas_kernels.matmul.spec import MatmulSpec
from pallas_kernels.native.library import PACKED_MATMUL
from pallas_kernels.panels import Panels, as_stored, in_panels
from pallas_kernels.quantized import Quantized
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.quantized_matmul.api import MatmulSpec as PackedSpec


def declines(spec: PackedSpec, target: Target) -> str | None:
    """Why not: all that `matmul` declines, float8, scales in float16, and activations that are rounded."""
    why = cpu.declines(MatmulSpec(spec.tokens, spec.k, spec.n, spec.dtype, "int8"), target)
    return why or _unserved(spec.format, spec.scale_dtype, spec.activations)


def _unserved(format: str, scale_dtype: str, activations: str) -> str | None:
    if format not in ("int4", "int8"):
        return f"{format} weights"
    if scale_dtype not in ("float32", "bfloat16"):
        return f"{scale_dtype} scales"
    return None if activations == "float" else f"{activations} activations"


def panel_of(w: Quantized, target: Target) -> int:
    """As `matmul.cpu.panel_of`."""
    if _unserved(w.format, str(w.scales.dtype), w.activations):
        return 0
    return cpu.panel_of(w.shape[-2], w.shape[-1], "int8", target)


def cut(w: Quantized, width: int) -> Quantized:
    """The numpy (or abstract) weight in panels of so many columns."""
    if _scaled_sums(w):
        values: Any = in_panels(w.values, width)
        return replace(w, values=values)
    return jax.tree.map(lambda leaf: in_panels(leaf, width), w)


def run(x: Array, w: Quantized, *, target: Target) -> Array:
    """See `api.quantized_matmul`."""
    if _scaled_sums(w):
        out = cpu.run(x, w.values, transposed=False, target=target, dtype=jnp.dtype(jnp.float32))
        return (out * w.scales.astype(jnp.float32)).astype(x.dtype)
    offsets = jnp.zeros((0,), w.scales.dtype) if w.offsets is None else as_stored(w.offsets).astype(w.scales.dtype)
    arrays = (as_stored(w.values), as_stored(w.scales), offsets)
    call = jax.ffi.ffi_call(PACKED_MATMUL, jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32))
    return call(x, *arrays, isa=target.native, in_panels=isinstance(w.values, Panels)).astype(x.dtype)


def _scaled_sums(w: Quantized) -> bool:
    """Whether a column's one scale is applied to its sum and not to its weights."""
    return w.format == "int8" and w.scales.shape[-2] == 1 and w.offsets is None
