"""quantized_matmul on Hopper GPUs (Mosaic GPU): out^T = w^T x^T, so that few tokens are wgmma's N.

One warpgroup a block: bn columns of the weight (wgmma's M), bt tokens (its N) and a share of K. TMA
brings the packed weight [bk, bn], x [bt, bk] and the groups' scales through a ring of stages; bytes go
from shared memory to registers as wgmma's left operand, where they become bfloat16, and x is the right
operand from shared memory. A group's nibbles are its first half's rows, then its second half's, so
each plane of a group meets its own half of x's columns and one byte load serves two weights.

The sum of a group is scaled by its column scales in registers, and transposed on its way through
shared memory. With few columns K is split over `splits` blocks, whose float32 sums XLA adds. Offsets
(row sums of x times offsets) and the row scales of dynamic activations are XLA's. 8-bit wgmma wants K
contiguous in memory, which the packed weight has not: 8-bit x is multiplied as bfloat16, which holds
it exactly.

The idea of a left operand dequantized in registers is from jax/experimental/pallas/ops/gpu/
hopper_mixed_type_matmul_mgpu.py (Apache-2.0).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import not_on_hopper
from pallas_kernels.quantized import Quantized
from pallas_kernels.quantized_matmul.reference import quantize_rows
from pallas_kernels.target import Target
from pallas_kernels.tuning import lookup

if TYPE_CHECKING:
    from pallas_kernels.quantized_matmul.api import MatmulSpec

_MOST_TOKENS = 512
_BLOCK_TOKENS = 64  # float32 sums of 128 columns take 64 registers a thread, twice
_STAGE_BYTES = 96 << 10  # of shared memory, so that two blocks fit a multiprocessor
_FEWEST_STEPS = 4  # of the ring, a block of a split K
# WGMMA's left operand with its pairs along K loaded one by one: in memory it is N that is contiguous.
_SINGLE = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)


@dataclass(frozen=True)
class Blocks:
    """bt tokens, bn columns and bk rows a step; K in `splits` parts; `stages` steps in flight."""

    bt: int
    bn: int
    bk: int
    splits: int
    stages: int


def declines(spec: MatmulSpec, target: Target) -> str | None:
    reason = not_on_hopper(target)
    if reason is not None:
        return reason
    if spec.dtype != "bfloat16":
        return f"x is {spec.dtype}; bfloat16 is served"
    if spec.activations == "dynamic_32":
        return "activations with a scale for every 32"
    if spec.scale_dtype not in ("float32", "bfloat16"):
        return f"scales are {spec.scale_dtype}; float32 and bfloat16 are served"
    if spec.tokens > _MOST_TOKENS:
        return f"{spec.tokens} tokens are over {_MOST_TOKENS}: every {_BLOCK_TOKENS} would dequantize the weight anew"
    if spec.n % 64 or spec.k % 64:
        return f"K {spec.k} and N {spec.n} must be multiples of 64"
    if spec.format == "int4" and spec.group not in (32, 64, 128):
        return f"int4 in groups of {spec.group}; 32, 64 and 128 are served"
    if spec.format != "int4" and spec.group not in (spec.k, 32, 64, 128):
        return f"{spec.format} in groups of {spec.group}; 32, 64, 128 and one a column are served"
    return None


def run(x: Array, w: Quantized, *, target: Target, dtype: np.dtype) -> Array:
    """x [tokens, K] @ w [K, N] -> [tokens, N] in dtype; see `api.quantized_matmul`."""
    tokens = x.shape[0]
    left, row_scales = quantize_rows(x, w.format) if w.activations == "dynamic" else (x, None)
    b = _blocks(tokens, w, target)
    left = jnp.pad(left.astype(jnp.bfloat16), ((0, -tokens % b.bt), (0, 0)))
    if w.format == "int4":
        left = _high_columns_over_16(left, w.group)
    plain = b.splits == 1 and row_scales is None and w.offsets is None
    sums = _sums(left, w, b, dtype if plain else jnp.dtype(jnp.float32), target)
    if plain:
        return sums[0, :tokens]
    out = jnp.sum(sums, axis=0)[:tokens]
    if w.offsets is not None:
        groups = w.scales.shape[0]
        row_sums = jnp.sum(x.astype(jnp.float32).reshape(tokens, groups, -1), axis=2)
        out += jnp.dot(row_sums, w.offsets.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return (out if row_scales is None else out * row_scales).astype(dtype)


def _high_columns_over_16(x: Array, group: int) -> Array:
    """A byte's high nibble counts 16 times; the columns of x that meet it, each group's second half, make up for it."""
    tokens, k = x.shape
    factors = jnp.array([1, 1 / 16], x.dtype).reshape(1, 1, 2, 1)
    return (x.reshape(tokens, k // group, 2, group // 2) * factors).reshape(tokens, k)


def key(tokens: int, k: int, n: int, w: Quantized) -> str:
    """Of a tuned choice: tokens rounded up to a power of two, the weight's shape, format and group."""
    group = w.group if w.scales.shape[0] > 1 else 0
    return f"{1 << (tokens - 1).bit_length()}x{k}x{n} {w.format} {group} {w.activations}"


def _blocks(tokens: int, w: Quantized, target: Target) -> Blocks:
    k, n = w.shape
    tuned = lookup("quantized_matmul", target.chip, key(tokens, k, n, w))
    return Blocks(**tuned) if tuned else computed_blocks(tokens, w, target)


def computed_blocks(tokens: int, w: Quantized, target: Target) -> Blocks:
    """What serves where nobody measured.

    bt: the tokens, in eights, 64 at most. bn 128 where it divides N, which halves how often x is read.
    bk 128 where it divides K. As many stages as fit half of a multiprocessor, 8 at most. K is split
    until there are two blocks a multiprocessor, while a part keeps 4 steps.
    """
    k, n = w.shape
    bt = min(_BLOCK_TOKENS, -(-tokens // 8) * 8)
    bn = 128 if n % 128 == 0 else 64
    bk = 128 if k % 128 == 0 else 64
    packing = 2 if w.format == "int4" else 1
    stage = bk // packing * bn + bt * bk * 2 + (bk // w.group * bn * 4 if w.scales.shape[0] > 1 else 0)
    stages = max(2, min(8, _STAGE_BYTES // stage))
    blocks = n // bn * -(-tokens // bt)
    wanted = 2 * (target.facts.cores if target.facts else 132)
    steps = k // bk
    possible = [s for s in range(1, steps + 1) if steps % s == 0 and (s == 1 or steps // s >= _FEWEST_STEPS)]
    splits = next((s for s in possible if blocks * s >= wanted), possible[-1])
    return Blocks(bt, bn, bk, splits, stages)


@dataclass(frozen=True)
class _Static:
    """What the kernel knows of the weight."""

    format: str
    groups: int
    group: int
    offsets: bool
    interpret: bool


def _sums(x: Array, w: Quantized, b: Blocks, dtype: Any, target: Target) -> Array:
    """[splits, tokens, N] of x [tokens, K] in bfloat16, tokens a multiple of bt: scaled, without offsets."""
    (tokens, k), n = x.shape, w.shape[1]
    static = _Static(w.format, w.scales.shape[0], w.group, w.offsets is not None, target.interpret)
    values = lax.bitcast_convert_type(w.values, jnp.int8) if w.format == "int4" else w.values
    interpret: Any = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if target.interpret else {}
    kernel = plgpu.kernel(
        functools.partial(_kernel, w=static, b=b, steps=k // b.bk // b.splits),
        out_type=jax.ShapeDtypeStruct((b.splits, tokens, n), dtype),
        scratch_types=[plgpu.SMEM((b.bt, b.bn), dtype)],
        grid=(n // b.bn, tokens // b.bt, b.splits),
        grid_names=("n", "t", "s"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpret,
    )
    return kernel(x, values, w.scales)


def _kernel(
    x_gmem: Any, values_gmem: Any, scales_gmem: Any, out_gmem: Any, out_smem: Any, *, w: _Static, b: Blocks, steps: int
) -> None:
    """One block's sums over its part of K."""
    column, token, split = lax.axis_index("n"), lax.axis_index("t"), lax.axis_index("s")
    packing = 2 if w.format == "int4" else 1
    columns = pl.ds(column * b.bn, b.bn)
    depth = _depth(w, b)
    specs = [
        plgpu.BlockSpec((b.bt, b.bk), lambda s: (token, split * steps + s), transforms=_tiled(depth, 16)),
        plgpu.BlockSpec((b.bk // packing, b.bn), lambda s: (split * steps + s, column), transforms=_tiled(64, 8)),
    ]
    inputs = [x_gmem, values_gmem]
    if w.groups > 1:
        specs.append(plgpu.BlockSpec((b.bk // w.group, b.bn), lambda s: (split * steps + s, column)))
        inputs.append(scales_gmem)

    def body(_: Any, x_smem: Any, values_smem: Any, *rest: Any) -> Array:
        *scales_smem, total = rest
        for group in range(max(1, b.bk // w.group)):
            rows = min(b.bk, w.group)
            part = _group_sum(x_smem, values_smem, group * rows, rows, depth, w, b)
            total = total + (part if not scales_smem else part * _spread(scales_smem[0].at[group], b))
        plgpu.commit_smem()  # every warp has read the stage before TMA fills it anew
        return total

    zero = plgpu.layout_cast(jnp.zeros((b.bn, b.bt), jnp.float32), plgpu.Layout.WGMMA)
    pipeline = plgpu.emit_pipeline(body, grid=(steps,), in_specs=specs, max_concurrent_steps=b.stages, init_carry=zero)
    total = pipeline(*inputs)
    if w.groups == 1:
        total = total * _spread(scales_gmem.at[0, columns], b)
    _store(out_smem.transpose((1, 0)), plgpu.layout_cast(total.astype(out_smem.dtype), _SINGLE))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[split, pl.ds(token * b.bt, b.bt), columns])
    plgpu.wait_smem_to_gmem(0)


def _store(ref: Any, value: Array) -> None:
    """With bank conflicts, which JAX before 0.12 allows as such and later versions on demand."""
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)


def _spread(scales_ref: Any, b: Blocks) -> Array:
    """float32 [bn, bt] of a group's scales [bn]."""
    scales = plgpu.load(scales_ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(scales.astype(jnp.float32), (b.bn, b.bt), [0])


def _depth(w: _Static, b: Blocks) -> int:
    """Rows of the weight in one left operand: a swizzle's width of x's columns, within half a group of int4."""
    return min(64, w.group // 2 if w.format == "int4" else w.group)


def _tiled(columns: int, bits: int) -> tuple[Any, ...]:
    """Of shared memory whose swizzle spans `columns` elements."""
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, columns)), swizzle(columns * bits // 8)


def _group_sum(x_smem: Any, values_smem: Any, start: int, rows: int, depth: int, w: _Static, b: Blocks) -> Array:
    """float32 [bn, bt]: rows [start, start + rows) of the step's weight, unscaled, times x's columns."""
    if w.format != "int4":
        factors = ((offset, offset) for offset in range(start, start + rows, depth))
        products = [(_wide(_left(values_smem, row, depth), w.format), column) for row, column in factors]
    else:
        half = rows // 2
        products = []
        for offset in range(0, half, depth):
            low, high = _nibbles(_left(values_smem, start // 2 + offset, depth), w.offsets)
            products += [(low, start + offset), (high, start + half + offset)]

    if w.interpret:  # whose wgmma takes the left operand from shared memory only
        columns = [x_smem[:, pl.ds(column, depth)].T for _, column in products]
        parts = [_float32_dot(left, right) for (left, _), right in zip(products, columns, strict=True)]
        return functools.reduce(jnp.add, parts)

    def multiply(acc_ref: Any) -> Array:
        for left, column in products:
            plgpu.wgmma(acc_ref, left, x_smem.at[:, pl.ds(column, depth)].transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((b.bn, b.bt), jnp.float32))


def _left(values_smem: Any, start: int, depth: int) -> Array:
    """Bytes [bn, depth] of rows [start, start + depth): a byte a load, from swizzled rows without bank conflicts."""
    rows = values_smem.at[pl.ds(start, depth), :].transpose((1, 0))
    return plgpu.layout_cast(plgpu.load(rows, layout=_SINGLE, optimized=False), plgpu.Layout.WGMMA)


def _nibbles(signed: Array, offsets: bool) -> tuple[Array, Array]:
    """bfloat16 low nibbles and 16 times the high ones, of bytes as int8. Without offsets a nibble counts from -8."""
    low = (signed & 15).astype(jnp.bfloat16)
    high = ((signed ^ -128) & -16).astype(jnp.bfloat16)  # 16 * (nibble - 8), with its sign
    return (low, high + 128) if offsets else (low - 8, high)


def _wide(numbers: Array, format: str) -> Array:
    """bfloat16, exact. Hopper converts float8 to float16 only, so it goes by way of float32."""
    return (numbers if format == "int8" else numbers.astype(jnp.float32)).astype(jnp.bfloat16)


def _float32_dot(left: Array, right: Array) -> Array:
    return jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32), precision=lax.Precision.HIGHEST)
