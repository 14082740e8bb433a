"""x @ w for a weight as it is: the public function, its checks, and the choice of implementation.

x is [tokens, K] in float32, bfloat16 or float16, w [K, N] of the same dtype, as it is or in `Panels`, or [N, K]
when transposed; the result is [tokens, N], accumulated in float32 and rounded to `dtype` once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.choice import Choice, Implementation, choose, never
from pallas_kernels.matmul import cpu, reference
from pallas_kernels.matmul.spec import MatmulSpec
from pallas_kernels.panels import Panels
from pallas_kernels.target import Target

CANDIDATES: tuple[Implementation[MatmulSpec], ...] = (
    Implementation("cpu", cpu.declines, cpu.run),
    Implementation("reference", never, reference.run),
)


def choice(spec: MatmulSpec, target: Target) -> Choice[MatmulSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("matmul", CANDIDATES, spec, target)


def matmul(
    x: Array, w: Array | Panels, *, target: Target, transposed: bool = False, dtype: DTypeLike = jnp.float32
) -> Array:
    """[tokens, N] in dtype: x [tokens, K] @ w [K, N], or w [N, K] when transposed."""
    run = choice(spec_of(x, w, transposed=transposed), target).implementation.run
    return run(x, w, transposed=transposed, target=target, dtype=jnp.dtype(dtype))


def spec_of(
    x: Array | jax.ShapeDtypeStruct, w: Array | Panels | jax.ShapeDtypeStruct, *, transposed: bool = False
) -> MatmulSpec:
    """The call's spec; ValueError names the shapes that do not fit together."""
    if x.ndim != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1 if transposed else 0]:
        raise ValueError(f"x {x.shape} and {'transposed ' if transposed else ''}w {w.shape} do not fit together")
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype}, w is {w.dtype}")
    if isinstance(w, Panels) and transposed:
        raise ValueError("a weight in panels is not transposed")
    n, k = w.shape if transposed else w.shape[::-1]
    width = w.values.shape[2] if isinstance(w, Panels) else 0
    return MatmulSpec(x.shape[0], k, n, str(x.dtype), str(w.dtype), transposed, width)
