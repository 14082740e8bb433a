"""quantized_matmul by the compiled CPU kernels: weights are read with the bits they have and widened in registers.

What is multiplied is, bit for bit, what `dequantize` gives in float32 wherever a number times its scale is
exact there, as it is of 4-bit numbers with scales of 16 bits; sums are float32. Activations that are
rounded to int8 meet the numbers as integers where the processor has products for that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.matmul import cpu
from pallas_kernels.matmul.spec import MatmulSpec
from pallas_kernels.native.library import PACKED_MATMUL
from pallas_kernels.panels import Panels, as_stored, in_panels
from pallas_kernels.quantized import BLOCK, Quantized
from pallas_kernels.quantized_matmul.reference import rounded
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.quantized_matmul.api import MatmulSpec as PackedSpec

_MOST_INT4_GROUP = 2048  # that rounded rows are multiplied with


def declines(spec: PackedSpec, target: Target) -> str | None:
    """Why not: all that `matmul` declines, float8, and scales in float16."""
    why = cpu.declines(MatmulSpec(spec.tokens, spec.k, spec.n, spec.dtype, "int8"), target)
    return why or _unserved(spec.format, spec.scale_dtype)


def _unserved(format: str, scale_dtype: str) -> str | None:
    if format not in ("int4", "int8"):
        return f"{format} weights"
    return None if scale_dtype in ("float32", "bfloat16") else f"{scale_dtype} scales"


def panel_of(w: Quantized, target: Target) -> int:
    """As `matmul.cpu.panel_of`."""
    if _unserved(w.format, str(w.scales.dtype)):
        return 0
    return cpu.panel_of(w.shape[-2], w.shape[-1], "int8", target)


def cut(w: Quantized, width: int) -> Quantized:
    """The numpy (or abstract) weight in panels of so many columns."""
    return jax.tree.map(lambda leaf: in_panels(leaf, width), w)


def run(x: Array, w: Quantized, *, target: Target, dtype: np.dtype) -> Array:
    """See `api.quantized_matmul`."""
    if w.activations != "float" and not _by_bytes(w, target):
        numbers, scales = rounded(x, w)
        out = run(
            numbers.astype(jnp.float32), replace(w, activations="float"), target=target, dtype=jnp.dtype(jnp.float32)
        )
        return (out if scales is None else out * scales).astype(dtype)
    if w.activations == "float" and _scaled_sums(w) and not _by_pairs(x, w, target):
        out = cpu.run(x, w.values, transposed=False, target=target, dtype=jnp.dtype(jnp.float32))
        return (out * as_stored(w.scales).reshape(1, -1).astype(jnp.float32)).astype(dtype)
    return _packed(x, w, target, dtype)


def _packed(x: Array, w: Quantized, target: Target, dtype: np.dtype) -> Array:
    block = {"float": 0, "dynamic": x.shape[1], "dynamic_32": BLOCK}[w.activations]
    own = dtype if dtype == jnp.bfloat16 and (block or _by_pairs(x, w, target)) else jnp.float32
    offsets = jnp.zeros((0,), w.scales.dtype) if w.offsets is None else as_stored(w.offsets).astype(w.scales.dtype)
    arrays = (as_stored(w.values), as_stored(w.scales), offsets)
    call = jax.ffi.ffi_call(PACKED_MATMUL, jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), own))
    out = call(x, *arrays, isa=target.native, in_panels=isinstance(w.values, Panels), rounded=block)
    return out.astype(dtype)


def _by_pairs(x: Array, w: Quantized, target: Target) -> bool:
    return target.native in cpu.PAIRS and x.dtype == jnp.bfloat16 and w.group % 2 == 0


def _by_bytes(w: Quantized, target: Target) -> bool:
    fits = w.group % BLOCK == 0 and (w.format == "int8" or w.group <= _MOST_INT4_GROUP)
    return target.native in cpu.BYTES and fits


def _scaled_sums(w: Quantized) -> bool:
    """Whether a column's one scale is applied to its sum and not to its weights."""
    return w.format == "int8" and w.scales.shape[-2] == 1 and w.offsets is None
