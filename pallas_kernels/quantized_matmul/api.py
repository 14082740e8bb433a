"""x @ w for a packed weight: the public function, its checks, and the choice of implementation.

x is [tokens, K] in float32, bfloat16 or float16, w a `Quantized` of shape [K, N]; the result is
[tokens, N], accumulated in float32 (int32 where int8 meets int8, within a group).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.choice import Choice, Implementation, choose, mosaic, never
from pallas_kernels.quantized import Activations, Quantized, WeightFormat, check_left, check_packed
from pallas_kernels.quantized_matmul import cpu, reference
from pallas_kernels.target import Target


@dataclass(frozen=True)
class MatmulSpec:
    """What a choice depends on."""

    tokens: int
    k: int
    n: int
    dtype: str  # of x and the result
    format: WeightFormat
    group: int  # k: per channel
    offsets: bool = False
    activations: Activations = "float"
    scale_dtype: str = "float32"


CANDIDATES: tuple[Implementation[MatmulSpec], ...] = (
    mosaic("tpu", "pallas_kernels.quantized_matmul.tpu"),
    mosaic("gpu", "pallas_kernels.quantized_matmul.gpu"),
    Implementation("cpu", cpu.declines, cpu.run),
    Implementation("reference", never, reference.run),
)


def choice(spec: MatmulSpec, target: Target) -> Choice[MatmulSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("quantized_matmul", CANDIDATES, spec, target)


def quantized_matmul(x: Array, w: Quantized, *, target: Target, dtype: DTypeLike | None = None) -> Array:
    """x [tokens, K] @ w [K, N] -> [tokens, N] in dtype, x's if none is asked for.

    With w.activations == "dynamic" each row of x is first rounded to the weight's format, with a
    scale of its own. A row of x that is not finite spoils its own result only.
    """
    run = choice(spec_of(x, w), target).implementation.run
    return run(x, w, target=target, dtype=jnp.dtype(x.dtype if dtype is None else dtype))


def spec_of(x: Array | jax.ShapeDtypeStruct, w: Quantized) -> MatmulSpec:
    """The call's spec, once its shapes fit together; ValueError names the numbers that do not."""
    if x.ndim != 2 or len(w.shape) != 2:
        raise ValueError(f"x {x.shape} and w {w.shape} must have two dimensions each")
    (tokens, k), (rows, n) = x.shape, w.shape
    check_left(x, rows)
    check_packed(w)
    return MatmulSpec(
        tokens=tokens,
        k=k,
        n=n,
        dtype=str(x.dtype),
        format=w.format,
        group=w.group,
        offsets=w.offsets is not None,
        activations=w.activations,
        scale_dtype=str(w.scales.dtype),
    )
