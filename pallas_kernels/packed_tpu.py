"""How TPU kernels read a packed weight; shared by quantized_matmul and grouped_matmul."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.target import Target

_EIGHTS = -0x77777778  # 0x88888888: flips the top bit of every nibble, which takes 8 from it


def interleave_halves(x: Array, group: int) -> Array:
    """x [tokens, K] with the columns of each group ordered 0, group / 2, 1, group / 2 + 1, ...

    One bitcast of packed int4 gives the rows of the weight in this order.
    """
    tokens, k = x.shape
    return x.reshape(tokens, k // group, 2, group // 2).swapaxes(2, 3).reshape(tokens, k)


def read_numbers(values: Any, start: int, rows: int, format: str) -> Array:
    """[rows, bn] of a block in VMEM: int8 and float8 as they are, int4 signed, two to a byte."""
    if format != "int4":
        return values[pl.ds(start, rows), :]
    words = pltpu.bitcast(values[pl.ds(start // 2, rows // 2), :], jnp.int32)
    return pltpu.bitcast(words ^ _EIGHTS, jnp.int4)


def multiplies(format: str, target: Target) -> bool:
    """Whether the MXU multiplies numbers of this 8-bit format as they are."""
    chip = target.facts
    return chip is not None and chip.has("int8" if format == "int8" else "float8")


def vmem_limit(target: Target) -> int:
    """Three quarters of a core's VMEM; XLA keeps some for itself."""
    return target.facts.scratch_bytes * 3 // 4 if target.facts else 32 << 20
