"""How Hopper kernels read a packed weight; shared by quantized_matmul and grouped_matmul.

They compute out^T = w^T x^T: the weight's columns are wgmma's M, the tokens its N. Bytes go from shared
memory to registers as wgmma's left operand, where they become bfloat16; x is the right operand, in
shared memory. The nibbles of a group of int4 are its first half's rows, then its second half's, so each
plane of a group meets its own half of x's columns and one byte load serves two weights.

The idea of a left operand dequantized in registers is from jax/experimental/pallas/ops/gpu/
hopper_mixed_type_matmul_mgpu.py (Apache-2.0).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
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
            yield Left(_wide(values_smem, row, w), row)
        return
    half = rows // 2
    for offset in range(0, half, w.depth):
        low, high = _nibbles(_bits(values_smem, start // 2 + offset, w.depth), w.offsets)
        yield Left(low, start + offset)
        yield Left(high, start + half + offset, times=16)


def product(operands: Iterable[Left], x: Callable[[int, int], Any], start: Array, interpret: bool) -> Array:
    """start, float32 [columns, tokens], plus the operands times x; x(first, count): those columns, [tokens, count]."""
    pairs = ((left.numbers, x(left.column, left.numbers.shape[1])) for left in operands)
    if interpret:  # whose wgmma takes the left operand from shared memory only
        return functools.reduce(jnp.add, (_float32_dot(left, right[...].T) for left, right in pairs), start)

    def add(acc_ref: Any) -> None:
        for left, right in pairs:
            plgpu.wgmma(acc_ref, left, right.transpose((1, 0)))

    acc: Any = plgpu.WGMMAAccumulatorRef.init(start)
    return pl.run_state(add)(acc)


def spread(scales_ref: Any, columns: int) -> Array:
    """float32 [len(scales_ref), columns]: every column is the scales."""
    scales = plgpu.load(scales_ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(scales.astype(jnp.float32), (*scales.shape, columns), [0])


def store_transposed(ref: Any, value: Array) -> None:
    """value [columns, tokens] to ref [tokens, columns]: 8 by 8 numbers of 16 bits at a time, other ones one by one.

    With bank conflicts, which JAX before 0.12 allows as such, and knows no other way, and later versions on demand.
    """
    store = getattr(plgpu, "store", None)
    by_eights = store is not None and value.dtype.itemsize == 2
    value = plgpu.layout_cast(value, plgpu.Layout.WGMMA if by_eights else SINGLE)
    if store is None:
        ref.transpose((1, 0))[...] = value
    else:
        store(ref.transpose((1, 0)), value, optimized=False)


def _load(values_smem: Any, start: int, depth: int) -> Array:
    """Bytes [bn, depth] of rows [start, start + depth): a byte a load, from swizzled rows without bank conflicts."""
    return plgpu.load(values_smem.at[pl.ds(start, depth), :].transpose((1, 0)), layout=SINGLE, optimized=False)


def _bits(values_smem: Any, start: int, depth: int) -> Array:
    """The bytes as int16, of which the upper half is to be masked away: what a GPU computes with two at a time."""
    return plgpu.layout_cast(_load(values_smem, start, depth).astype(jnp.int16), plgpu.Layout.WGMMA)


def _counted(bits: Array) -> Array:
    """bfloat16 128 + bits, of int16 bits up to 128: a unit is the last place of 128."""
    return lax.bitcast_convert_type(bits | 0x4300, jnp.bfloat16)


def _nibbles(bits: Array, offsets: bool) -> tuple[Array, Array]:
    """bfloat16 low nibbles and 16 times the high ones, of bytes. Without offsets a nibble counts from -8."""
    low = _counted(bits & 15) - (128 if offsets else 136)
    high = _counted(bits & 0x70) - _counted((bits & 0x80) ^ 0x80)  # 16 * (nibble - 8): 128 or 256 is taken from it
    return low, high + 128 if offsets else high


def _integers(bits: Array) -> Array:
    """bfloat16 of int8."""
    return _counted(bits & 0x7F) - _counted(bits & 0x80)


def _wide(values_smem: Any, start: int, w: Packed) -> Array:
    """bfloat16 of 8-bit numbers, exact. Hopper converts float8 to float16 only, so it goes by way of float32."""
    if w.format == "int8":
        return _integers(_bits(values_smem, start, w.depth))
    numbers = plgpu.layout_cast(_load(values_smem, start, w.depth), plgpu.Layout.WGMMA)
    return numbers.astype(jnp.float32).astype(jnp.bfloat16)


def _float32_dot(left: Array, right: Array) -> Array:
    return jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32), precision=lax.Precision.HIGHEST)
