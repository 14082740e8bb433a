"""grouped_matmul on Hopper GPUs (Mosaic GPU): a persistent grid over (visit, columns), TMA and wgmma.

A block has a loader and two consumer warpgroups. The loader brings [bm, bk] of x and [bk, bn] of an
expert's weight through a ring of stages and runs ahead across the borders of units. Tiles start at a
group's first row. Of 128 rows each consumer has half, and leaves out a half without rows of the
expert; of 64 rows (few rows an expert) each has half of the columns. The result leaves in pieces of
1, 2, 4, ... rows, since TMA's shapes are static: a ladder as in JAX's ragged_dot_mgpu (Apache-2.0).

This is for floating weights; packed ones have a kernel of their own, `gpu_packed`, on the same walk.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import gpu_packed
from pallas_kernels.grouped_matmul.gpu_walk import CONSUMERS, HALF, Blocks, Exit, Unit, launched, load, walk
from pallas_kernels.grouped_matmul.scales import declines_scales
from pallas_kernels.grouped_matmul.visits import visits
from pallas_kernels.hopper import not_on_hopper
from pallas_kernels.packed_gpu import tiled
from pallas_kernels.quantized import Quantized
from pallas_kernels.target import Target
from pallas_kernels.tuning import lookup

if TYPE_CHECKING:
    from pallas_kernels.grouped_matmul.api import GroupedSpec

_RING_BYTES = 160 << 10
_DTYPES = ("bfloat16", "float16")


def declines(spec: GroupedSpec, target: Target) -> str | None:
    """Why this kernel does not serve a call; None: it does."""
    reason = not_on_hopper(target)
    if reason is not None:
        return reason
    dtypes = _DTYPES if spec.format == "none" else _DTYPES[:1]
    if spec.dtype not in dtypes:
        return f"x is {spec.dtype}; {' and '.join(dtypes)} {'is' if len(dtypes) == 1 else 'are'} served"
    if spec.k % HALF or spec.n % 128:
        return f"K {spec.k} must be a multiple of {HALF} and N {spec.n} of 128"
    return declines_scales(spec) if spec.format != "none" else None


def run(x: Array, w: Array | Quantized, group_sizes: Array, *, target: Target) -> Array:
    """x [tokens, K] by w [experts, K, N] -> [tokens, N]; see `api.grouped_matmul`. Rows of nobody are zeros."""
    tokens, (_, _, n) = x.shape[0], w.shape
    b = blocks(tokens, w, target)
    # TMA wants whole tiles of 8 rows; a result of less than one tile leaves row by row.
    eights = -(-tokens // 8) * 8
    out_rows, rows = tokens if tokens < min(HALF, b.bm) else eights, max(eights, b.bm)
    plan = visits(group_sizes, out_rows, b.bm, rows=rows)
    table = jnp.stack([plan.expert, plan.row, plan.start - plan.row, plan.end - plan.row, plan.nobodys], axis=1)
    cores = 2 if target.interpret else target.facts.cores if target.facts else 132
    how: Any = {"b": b, "cores": min(cores, plan.expert.shape[0] * (n // b.bn)), "interpret": target.interpret}
    out = jax.ShapeDtypeStruct((out_rows, n), x.dtype)
    if isinstance(w, Quantized):
        x, row_scales = gpu_packed.left(x, w)
        row_scales = None if row_scales is None else jnp.pad(row_scales[:, 0], (0, rows - tokens))
        call = functools.partial(gpu_packed.call, w=w, row_scales=row_scales)
    else:
        call = functools.partial(_call, w=w)
    return call(table, plan.count, jnp.pad(x, ((0, rows - tokens), (0, 0))), out=out, **how)[:tokens]


def _call(
    table: Array, count: Array, x: Array, w: Array, out: jax.ShapeDtypeStruct, *, b: Blocks, cores: int, interpret: bool
) -> Array:
    """x [rows, K] by w [experts, K, N] -> `out`; table and count are `visits`'."""
    _, k, n = w.shape
    scratch = {
        "x_ring": plgpu.SMEM((b.stages, b.bm, b.bk), x.dtype, transforms=tiled(HALF, 16)),
        "w_ring": plgpu.SMEM((b.stages, b.bk, b.bn), x.dtype, transforms=tiled(HALF, 16)),
    }
    body = functools.partial(_kernel, b=b, steps=k // b.bk, columns=n // b.bn, blocks=cores)
    kernel = launched(body, out, scratch, b=b, share=_share(b), copies=2, cores=cores, interpret=interpret)
    return kernel(table, count, x, w)


def blocks(tokens: int, w: Array | Quantized, target: Target) -> Blocks:
    """Tuned, or computed where nobody measured.

    128 columns, and as many stages as 160 KiB hold, 8 at most, which leaves room for the result. Floating: 128 rows
    where an expert has more than 64 on average, else 64; 64 of K, one swizzled row of x. Packed: twice an expert's
    rows on average, a power of two from 16 to 128; K as `gpu_packed.depth_of` has it.
    """
    tuned = lookup("grouped_matmul", target.chip, key(tokens, w))
    if tuned:
        return Blocks(**tuned)
    experts, bn = w.shape[0], 128
    if isinstance(w, Quantized):
        bm = min(128, max(16, 1 << (2 * tokens // experts).bit_length()))
        bk = gpu_packed.depth_of(w)
        stage = gpu_packed.stage_bytes(w, bm, bn, bk)
    else:
        bm, bk = 128 if tokens > HALF * experts else HALF, HALF
        stage = 2 * bk * (bm + bn)
    return Blocks(bm, bn, bk, min(8, _RING_BYTES // stage))


def key(tokens: int, w: Array | Quantized) -> str:
    """Of a tuned choice: tokens rounded up to a power of two, the weight's shape, and its dtype or its form."""
    experts, k, n = w.shape
    form = f"{w.format} {w.group} {w.activations}" if isinstance(w, Quantized) else str(w.dtype)
    return f"{1 << (tokens - 1).bit_length()}x{k}x{n} of {experts} {form}"


def _share(b: Blocks) -> tuple[int, int]:
    """Rows and columns of one consumer."""
    return (HALF, b.bn) if b.bm > HALF else (HALF, b.bn // CONSUMERS)


def _kernel(
    table: Any, count: Any, x: Any, w: Any, out: Any,
    *, x_ring: Any, w_ring: Any, whole: Any, ragged: Any, filled: Any, freed: Any,
    b: Blocks, steps: int, columns: int, blocks: int,
) -> None:  # fmt: skip
    """One block: every `blocks`-th unit. Stages are counted over all units."""
    block, wg = lax.axis_index("block"), lax.axis_index("wg")
    units = walk(table, count, block, columns, blocks, b.bn)
    stages = jnp.int32(b.stages)

    @pl.when(wg == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def fill(unit: Unit, step: Array, slot: Array) -> None:
            depth = pl.ds(step * b.bk, b.bk)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(unit.row, b.bm), depth], x_ring.at[slot], filled.at[slot])
            weight = w.at[unit.expert, depth, pl.ds(unit.column, b.bn)]
            plgpu.copy_gmem_to_smem(weight, w_ring.at[slot], filled.at[slot])

        load(units, steps, b.stages, freed, fill)

    @pl.when(wg < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        by_rows = b.bm > HALF
        share = _share(b)
        top, left = (wg * HALF, 0) if by_rows else (0, wg * share[1])
        way_out = Exit(whole.at[wg], ragged.at[wg], out)

        def store(rows: Array, unit: Unit, first: Array, last: Array) -> None:
            def put(ref: Any) -> None:
                plgpu.store(ref, rows, optimized=ref is way_out.whole)

            way_out.send(put, first, last, unit.row + top, unit.column + left)

        def consume(turn: Array, done: Array) -> Array:
            unit = units.unit(turn)
            first = jnp.clip(unit.first - top, 0, HALF)
            last = jnp.clip(unit.last - top, 0, HALF)
            mine = (unit.nobodys == 0) & (first < last)

            @pl.when(mine)
            def _() -> None:
                def multiply(acc: Any) -> Array:
                    def step(i: Array, _: None) -> None:
                        slot = lax.rem(done + i, stages)
                        plgpu.barrier_wait(filled.at[slot])
                        plgpu.wgmma(acc, x_ring.at[slot, pl.ds(top, HALF)], w_ring.at[slot, :, pl.ds(left, share[1])])
                        plgpu.wgmma_wait(1)

                        @pl.when(i > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(freed.at[lax.rem(done + i - 1, stages)])

                    lax.fori_loop(0, steps, step, None)
                    sums = acc[...]
                    plgpu.barrier_arrive(freed.at[lax.rem(done + steps - 1, stages)])
                    return sums

                sums = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(share, jnp.float32))
                store(sums.astype(out.dtype), unit, first, last)

            @pl.when((unit.nobodys == 0) & (first >= last))
            def _() -> None:
                def skip(i: Array, _: None) -> None:
                    slot = lax.rem(done + i, stages)
                    plgpu.barrier_wait(filled.at[slot])
                    plgpu.barrier_arrive(freed.at[slot])

                lax.fori_loop(0, steps, skip, None)

            @pl.when(unit.nobodys == 1)
            def _() -> None:
                store(plgpu.layout_cast(jnp.zeros(share, out.dtype), plgpu.Layout.WGMMA), unit, first, last)

            return done + jnp.where(unit.nobodys == 1, 0, steps)

        lax.fori_loop(0, units.turns, consume, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
