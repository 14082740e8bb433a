"""How Hopper kernels read a packed weight; shared by quantized_matmul and grouped_matmul.

They compute out^T = w^T x^T: the weight's columns are wgmma's M, the tokens its N. Bytes go from shared
memory to registers as wgmma's left operand, where they become bfloat16; x is the right operand, in
shared memory. The nibbles of a group of int4 are its first half's rows, then its second half's, so each
plane of a group meets its own half of x's columns and one byte load serves two weights.

The idea of a left operand dequantized in registers is from jax/experimental/pallas/ops/gpu/
hopper_mixed_type_matmul_mgpu.py (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized import Quantized

# WGMMA's left operand with its pairs along K loaded one by one: in memory it is N that is contiguous.
SINGLE = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)


@dataclass(frozen=True)
class Packed:
    """What a kernel knows of a weight when it is traced."""

    format: str
    groups: int
    group: int
    offsets: bool

    @property
    def packing(self) -> int:
        """Rows of the weight in a byte."""
        return 2 if self.format == "int4" else 1

    @property
    def depth(self) -> int:
        """Rows of the weight in one left operand: a swizzle's width of x's columns, within one plane of a group."""
        plane = self.group // self.packing
        return next(rows for rows in (64, 32, 16) if plane % rows == 0)


@dataclass(frozen=True)
class Left:
    """A left operand of `depth` rows of the weight, and the first of x's columns that it meets."""

    numbers: Array  # bfloat16 [columns of the weight, depth], `times` as large as the stored numbers
    column: int
    times: int = 1


def packed(w: Quantized) -> Packed:
    """Of a weight [K, N] or [experts, K, N]."""
    return Packed(w.format, w.scales.shape[-2], w.group, w.offsets is not None)


def stored(w: Quantized) -> Array:
    """The values as kernels read them: bytes of int4 are signed."""
    return lax.bitcast_convert_type(w.values, jnp.int8) if w.format == "int4" else w.values


def tiled(columns: int, bits: int) -> tuple[Any, ...]:
    """Of shared memory whose swizzle spans `columns` elements."""
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, columns)), swizzle(columns * bits // 8)


def lefts(values_smem: Any, start: int, rows: int, w: Packed) -> Iterator[Left]:
    """Of rows [start, start + rows) of a step's weight, which lie in one group; x's columns are in the same order."""
    if w.format != "int4":
        for row in range(start, start + rows, w.depth):
            yield Left(_wide(_left(values_smem, row, w.depth), w.format), row)
        return
    half = rows // 2
    for offset in range(0, half, w.depth):
        low, high = _nibbles(_left(values_smem, start // 2 + offset, w.depth), w.offsets)
        yield Left(low, start + offset)
        yield Left(high, start + half + offset, times=16)


def multiply(acc_ref: Any, left: Left, x_smem: Any) -> None:
    """acc_ref [columns, tokens] += left times its columns of x [tokens, bk]."""
    columns = pl.ds(left.column, left.numbers.shape[1])
    plgpu.wgmma(acc_ref, left.numbers, x_smem.at[:, columns].transpose((1, 0)))


def interpreted(left: Left, x_smem: Any) -> Array:
    """The same product, float32, for the interpreter, whose wgmma takes a left operand from shared memory only."""
    columns = x_smem[:, pl.ds(left.column, left.numbers.shape[1])].T
    wide = (operand.astype(jnp.float32) for operand in (left.numbers, columns))
    return jnp.dot(*wide, precision=lax.Precision.HIGHEST)


def spread(scales_ref: Any, columns: int) -> Array:
    """float32 [len(scales_ref), columns]: every column is the scales."""
    scales = plgpu.load(scales_ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(scales.astype(jnp.float32), (*scales.shape, columns), [0])


def store_transposed(ref: Any, value: Array) -> None:
    """value [columns, tokens] to ref [tokens, columns]."""
    store(ref.transpose((1, 0)), plgpu.layout_cast(value, SINGLE))


def store(ref: Any, value: Array) -> None:
    """With bank conflicts, which JAX before 0.12 allows as such and later versions on demand."""
    on_demand = getattr(plgpu, "store", None)
    if on_demand is None:
        ref[...] = value
    else:
        on_demand(ref, value, optimized=False)


def _left(values_smem: Any, start: int, depth: int) -> Array:
    """Bytes [bn, depth] of rows [start, start + depth): a byte a load, from swizzled rows without bank conflicts."""
    rows = values_smem.at[pl.ds(start, depth), :].transpose((1, 0))
    return plgpu.layout_cast(plgpu.load(rows, layout=SINGLE, optimized=False), plgpu.Layout.WGMMA)


def _nibbles(signed: Array, offsets: bool) -> tuple[Array, Array]:
    """bfloat16 low nibbles and 16 times the high ones, of bytes as int8. Without offsets a nibble counts from -8."""
    low = (signed & 15).astype(jnp.bfloat16)
    high = ((signed ^ -128) & -16).astype(jnp.bfloat16)  # 16 * (nibble - 8), with its sign
    return (low, high + 128) if offsets else (low - 8, high)


def _wide(numbers: Array, format: str) -> Array:
    """bfloat16, exact. Hopper converts float8 to float16 only, so it goes by way of float32."""
    return (numbers if format == "int8" else numbers.astype(jnp.float32)).astype(jnp.bfloat16)
