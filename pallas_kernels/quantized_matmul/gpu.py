"""quantized_matmul on Hopper GPUs (Mosaic GPU): out^T = w^T x^T, so that few tokens are wgmma's N.

One warpgroup a block: bn columns of the weight (wgmma's M), bt tokens (its N) and a share of K. TMA
brings the packed weight [bk, bn], x [bt, bk] and the groups' scales through a ring of stages; how bytes
become wgmma's left operand is `packed_gpu`'s.

The sum of a group is scaled by its column scales in registers, and transposed on its way through
shared memory. With few columns K is split over `splits` blocks, whose float32 sums XLA adds. Offsets
(row sums of x times offsets) and the row scales of dynamic activations are XLA's. 8-bit wgmma wants K
contiguous in memory, which the packed weight has not: 8-bit x is multiplied as bfloat16, which holds
it exactly.
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
from pallas_kernels.packed_gpu import Packed, lefts, packed, product, spread, store_transposed, stored, tiled
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


def _sums(x: Array, w: Quantized, b: Blocks, dtype: Any, target: Target) -> Array:
    """[splits, tokens, N] of x [tokens, K] in bfloat16, tokens a multiple of bt: scaled, without offsets."""
    (tokens, k), n = x.shape, w.shape[1]
    interpret: Any = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if target.interpret else {}
    kernel = plgpu.kernel(
        functools.partial(_kernel, w=packed(w), b=b, steps=k // b.bk // b.splits, interpret=target.interpret),
        out_type=jax.ShapeDtypeStruct((b.splits, tokens, n), dtype),
        scratch_types=[plgpu.SMEM((b.bt, b.bn), dtype)],
        grid=(n // b.bn, tokens // b.bt, b.splits),
        grid_names=("n", "t", "s"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpret,
    )
    return kernel(x, stored(w), w.scales)


def _kernel(
    x_gmem: Any, values_gmem: Any, scales_gmem: Any, out_gmem: Any, out_smem: Any,
    *, w: Packed, b: Blocks, steps: int, interpret: bool,
) -> None:  # fmt: skip
    """One block's sums over its part of K."""
    column, token, split = lax.axis_index("n"), lax.axis_index("t"), lax.axis_index("s")
    columns = pl.ds(column * b.bn, b.bn)
    specs = [
        plgpu.BlockSpec((b.bt, b.bk), lambda s: (token, split * steps + s), transforms=tiled(w.depth, 16)),
        plgpu.BlockSpec((b.bk // w.packing, b.bn), lambda s: (split * steps + s, column), transforms=tiled(64, 8)),
    ]
    inputs = [x_gmem, values_gmem]
    if w.groups > 1:
        specs.append(plgpu.BlockSpec((b.bk // w.group, b.bn), lambda s: (split * steps + s, column)))
        inputs.append(scales_gmem)

    def body(_: Any, x_smem: Any, values_smem: Any, *rest: Any) -> Array:
        *scales_smem, total = rest

        def columns_of_x(first: int, count: int) -> Any:
            return x_smem.at[:, pl.ds(first, count)]

        for group in range(max(1, b.bk // w.group)):
            rows = min(b.bk, w.group)
            operands = lefts(values_smem, group * rows, rows, w)
            if scales_smem:
                total = total + product(operands, columns_of_x, zero, interpret) * spread(
                    scales_smem[0].at[group], b.bt
                )
            else:
                total = product(operands, columns_of_x, total, interpret)
        plgpu.commit_smem()  # every warp has read the stage before TMA fills it anew
        return total

    zero = plgpu.layout_cast(jnp.zeros((b.bn, b.bt), jnp.float32), plgpu.Layout.WGMMA)
    pipeline = plgpu.emit_pipeline(body, grid=(steps,), in_specs=specs, max_concurrent_steps=b.stages, init_carry=zero)
    total = pipeline(*inputs)
    if w.groups == 1:
        total = total * spread(scales_gmem.at[0, columns], b.bt)
    store_transposed(out_smem, total.astype(out_smem.dtype))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[split, pl.ds(token * b.bt, b.bt), columns])
    plgpu.wait_smem_to_gmem(0)
