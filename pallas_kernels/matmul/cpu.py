"""matmul by the compiled CPU kernels (`pallas_kernels.native`): weights are read once, in the type they have.

XLA converts bfloat16 weights to float32 in memory where the CPU has no bfloat16 products, and
one row of bfloat16 falls off its fast path altogether. Here each row of the result is summed in
the order of k whatever the number of rows, so it is the same bits in every bucket. Where the CPU
multiplies bfloat16 itself and the kernels were not built for that, XLA does more rows faster.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.matmul.spec import MatmulSpec
from pallas_kernels.native.build import LANES
from pallas_kernels.native.library import MATMUL, not_native
from pallas_kernels.panels import Panels, as_stored
from pallas_kernels.target import Target

PAIRS = ("avx512bf16",)  # instruction sets of ours that multiply bfloat16 themselves
BYTES = ("avx2", "avx512", "avx512vnni", "avx512bf16")  # int8
STREAMED = 4  # rows up to which reading the weights is what takes time, whoever multiplies
PANEL = 4  # vectors
WEIGHTS = ("float32", "bfloat16", "int8")


def declines(spec: MatmulSpec, target: Target) -> str | None:
    """Why not: no library, a type that it does not read, sizes that are no whole vectors."""
    why = not_native(target)
    if why is not None:
        return why
    if spec.dtype not in ("float32", "bfloat16") or spec.weight_dtype not in WEIGHTS:
        return f"{spec.dtype} times {spec.weight_dtype}"
    if spec.dtype == "bfloat16" and spec.weight_dtype == "float32":
        return "bfloat16 times float32"
    if _left_to_xla(spec.weight_dtype, target) and spec.tokens > STREAMED:
        return f"more than {STREAMED} rows, and the CPU multiplies bfloat16 itself"
    lanes = 2 * LANES[target.native]  # the columns of a register tile
    if spec.k % lanes or spec.n % lanes:
        return f"{spec.k} times {spec.n}: not multiples of {lanes}"
    if spec.panel not in (0, PANEL * LANES[target.native]):
        return f"panels of {spec.panel}"
    return None


def panel_of(k: int, n: int, weight_dtype: str, target: Target) -> int:
    """Columns of the panels that weights of this size and type are best kept in; 0: they stay as they are, where these
    kernels are not there for every number of rows."""
    if _left_to_xla(weight_dtype, target):
        return 0
    width = PANEL * LANES.get(target.native, 1)
    dtype = "float32" if weight_dtype == "int8" else weight_dtype
    spec = MatmulSpec(1, k, n, dtype, weight_dtype, panel=width)
    return 0 if n % width or declines(spec, target) else width


def _left_to_xla(weight_dtype: str, target: Target) -> bool:
    return target.bfloat16_products and weight_dtype == "bfloat16" and target.native not in PAIRS


def run(x: Array, w: Array | Panels, *, transposed: bool, target: Target, dtype: np.dtype) -> Array:
    """See `api.matmul`; int8 weights are multiplied as numbers."""
    n = w.shape[0] if transposed else w.shape[1]
    paired = target.native in PAIRS and x.dtype == w.dtype == jnp.bfloat16 and not transposed
    own = dtype if paired and dtype == jnp.bfloat16 else jnp.float32
    call = jax.ffi.ffi_call(MATMUL, jax.ShapeDtypeStruct((x.shape[0], n), own))
    out = call(x, as_stored(w), isa=target.native, transposed=transposed, in_panels=isinstance(w, Panels))
    return out.astype(dtype)
