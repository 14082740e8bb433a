"""grouped_matmul on Hopper GPUs (Mosaic GPU): a persistent grid over (visit, columns), TMA and wgmma.

A block has a loader and two consumer warpgroups. The loader brings [bm, bk] of x and [bk, bn] of an
expert's weight through a ring of stages and runs ahead across the borders of units. Tiles start at a
group's first row. Of 128 rows each consumer has half, and leaves out a half without rows of the
expert; of 64 rows (few rows an expert) each has half of the columns. The result leaves in pieces of
1, 2, 4, ... rows, since TMA's shapes are static: a ladder as in JAX's ragged_dot_mgpu (Apache-2.0).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.visits import visits
from pallas_kernels.hopper import not_on_hopper
from pallas_kernels.quantized import Quantized
from pallas_kernels.target import Target
from pallas_kernels.tuning import lookup

if TYPE_CHECKING:
    from pallas_kernels.grouped_matmul.api import GroupedSpec

_HALF = 64  # rows of a wgmma, columns of a swizzled row
_CONSUMERS = 2
_RING_BYTES = 160 << 10
_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Blocks:
    """Rows, columns and depth of a stage, and how many stages are in flight."""

    bm: int
    bn: int
    bk: int
    stages: int


def declines(spec: GroupedSpec, target: Target) -> str | None:
    """Why this kernel does not serve a call; None: it does."""
    reason = not_on_hopper(target)
    if reason is not None:
        return reason
    if spec.dtype not in _DTYPES:
        return f"x is {spec.dtype}; {' and '.join(_DTYPES)} are served"
    if spec.format != "none":
        return f"weights in {spec.format}; {' and '.join(_DTYPES)} are served"
    if spec.k % _HALF or spec.n % 128:
        return f"K {spec.k} must be a multiple of {_HALF} and N {spec.n} of 128"
    return None


def run(x: Array, w: Array | Quantized, group_sizes: Array, *, target: Target) -> Array:
    """x [tokens, K] by w [experts, K, N] -> [tokens, N]; see `api.grouped_matmul`. Rows of nobody are zeros."""
    if isinstance(w, Quantized):
        raise ValueError(f"weights in {w.format}; `declines` says so")
    tokens, (_, k, n) = x.shape[0], w.shape
    b = blocks(tokens, w, target)
    # TMA wants whole tiles of 8 rows; a result of less than one wgmma leaves row by row.
    out_rows = tokens if tokens < _HALF else -(-tokens // 8) * 8
    rows = max(out_rows, b.bm)
    x = jnp.pad(x, ((0, rows - tokens), (0, 0)))
    plan = visits(group_sizes, out_rows, b.bm, rows=rows)
    units = plan.expert.shape[0] * (n // b.bn)
    cores = 2 if target.interpret else target.facts.cores if target.facts else 132
    interpret: Any = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if target.interpret else {}
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    wide = (tiling((8, _HALF)), swizzle(128))
    share = (_CONSUMERS, *_share(b))
    kernel = plgpu.kernel(
        functools.partial(_kernel, b=b, steps=k // b.bk, columns=n // b.bn, blocks=min(cores, units)),
        out_type=jax.ShapeDtypeStruct((out_rows, n), x.dtype),
        grid=(min(cores, units),),
        grid_names=("block",),
        num_threads=_CONSUMERS + 1,
        thread_name="wg",
        scratch_types={
            "x_ring": plgpu.SMEM((b.stages, b.bm, b.bk), x.dtype, transforms=wide),
            "w_ring": plgpu.SMEM((b.stages, b.bk, b.bn), x.dtype, transforms=wide),
            "whole": plgpu.SMEM(share, x.dtype, transforms=wide),
            "ragged": plgpu.SMEM(share, x.dtype),
            "filled": plgpu.Barrier(num_arrivals=2, num_barriers=b.stages),
            "freed": plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=b.stages),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpret,
    )
    table = jnp.stack([plan.expert, plan.row, plan.start - plan.row, plan.end - plan.row, plan.nobodys], axis=1)
    return kernel(table, plan.count, x, w)[:tokens]


def blocks(tokens: int, w: Array, target: Target) -> Blocks:
    """Tuned, or computed where nobody measured.

    128 rows where an expert has more than 64 on average, else 64; 128 columns; 64 of K, one swizzled row of x;
    as many stages as 160 KiB hold, 8 at most, which leaves room for the result.
    """
    tuned = lookup("grouped_matmul", target.chip, key(tokens, w))
    if tuned:
        return Blocks(**tuned)
    bm = 128 if tokens > _HALF * w.shape[0] else _HALF
    stages = min(8, _RING_BYTES // (2 * _HALF * (bm + 128)))
    return Blocks(bm, 128, _HALF, stages)


def key(tokens: int, w: Array) -> str:
    """Of a tuned choice: tokens rounded up to a power of two, and the weight's shape and dtype."""
    experts, k, n = w.shape
    return f"{1 << (tokens - 1).bit_length()}x{k}x{n} of {experts} {w.dtype}"


def _share(b: Blocks) -> tuple[int, int]:
    """Rows and columns of one consumer."""
    return (_HALF, b.bn) if b.bm > _HALF else (_HALF, b.bn // _CONSUMERS)


@dataclass(frozen=True)
class _Unit:
    """int32 scalars: one visit and one block of columns. The expert's rows are [first, last) of the tile."""

    expert: Array
    row: Array
    first: Array
    last: Array
    nobodys: Array
    column: Array


def _kernel(
    table: Any, count: Any, x: Any, w: Any, out: Any,
    *, x_ring: Any, w_ring: Any, whole: Any, ragged: Any, filled: Any, freed: Any,
    b: Blocks, steps: int, columns: int, blocks: int,
) -> None:  # fmt: skip
    """One block: every `blocks`-th unit. Stages are counted over all units."""
    block, wg = lax.axis_index("block"), lax.axis_index("wg")
    turns = jnp.maximum(lax.div(count[0] * columns - block + (blocks - 1), jnp.int32(blocks)), 0)
    stages = jnp.int32(b.stages)

    def unit_of(turn: Array) -> _Unit:
        index = block + turn * blocks
        visit = lax.div(index, jnp.int32(columns))
        fields = (table[visit, field] for field in range(5))
        return _Unit(*fields, column=(index - visit * columns) * b.bn)

    @pl.when(wg == _CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def load(turn: Array, done: Array) -> Array:
            unit = unit_of(turn)

            def fill(step: Array, done: Array) -> Array:
                slot = lax.rem(done, stages)

                @pl.when(done >= stages)
                def _() -> None:
                    plgpu.barrier_wait(freed.at[slot])

                depth = pl.ds(step * b.bk, b.bk)
                plgpu.copy_gmem_to_smem(x.at[pl.ds(unit.row, b.bm), depth], x_ring.at[slot], filled.at[slot])
                weight = w.at[unit.expert, depth, pl.ds(unit.column, b.bn)]
                plgpu.copy_gmem_to_smem(weight, w_ring.at[slot], filled.at[slot])
                return done + 1

            return lax.fori_loop(0, jnp.where(unit.nobodys == 1, 0, steps), fill, done)

        done = lax.fori_loop(0, turns, load, jnp.int32(0))

        # Stages are left as they were found: every arrival has been waited for.
        def drain(i: Array, _: None) -> None:
            plgpu.barrier_wait(freed.at[lax.rem(i, stages)])

        lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, None)

    @pl.when(wg < _CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        by_rows = b.bm > _HALF
        share = _share(b)
        top, left = (wg * _HALF, 0) if by_rows else (0, wg * share[1])

        def store(rows: Array, unit: _Unit, first: Array, last: Array) -> None:
            """Swizzled shared memory serves the common case faster; TMA takes 8 rows at a time from it."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            full = last - first == _HALF
            if out.shape[0] >= _HALF:

                @pl.when(full)
                def _() -> None:
                    whole[wg] = rows
                    plgpu.commit_smem()
                    target = out.at[pl.ds(unit.row + top, _HALF), pl.ds(unit.column + left, share[1])]
                    plgpu.copy_smem_to_gmem(whole.at[wg], target)

            @pl.when(jnp.logical_not(full))
            def _() -> None:
                plgpu.store(ragged.at[wg], rows, optimized=False)
                plgpu.commit_smem()
                _store_rows(ragged.at[wg], out, first, last, unit.row + top, unit.column + left)

        def consume(turn: Array, done: Array) -> Array:
            unit = unit_of(turn)
            first = jnp.clip(unit.first - top, 0, _HALF)
            last = jnp.clip(unit.last - top, 0, _HALF)
            mine = (unit.nobodys == 0) & (first < last)

            @pl.when(mine)
            def _() -> None:
                def multiply(acc: Any) -> Array:
                    def step(i: Array, _: None) -> None:
                        slot = lax.rem(done + i, stages)
                        plgpu.barrier_wait(filled.at[slot])
                        plgpu.wgmma(acc, x_ring.at[slot, pl.ds(top, _HALF)], w_ring.at[slot, :, pl.ds(left, share[1])])
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

        lax.fori_loop(0, turns, consume, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _store_rows(result: Any, out: Any, first: Array, last: Array, row: Array, column: Array) -> None:
    """Rows [first, last) of `result`, less than 64, to rows `row` + the same of `out`, a power of two at a time."""
    length = min(_HALF // 2, 1 << (out.shape[0].bit_length() - 1))
    while length:
        there = (last - first) & length

        @pl.when(there != 0)
        def _(length: int = length, first: Array = first) -> None:
            target = out.at[pl.ds(row + first, length), pl.ds(column, result.shape[1])]
            plgpu.copy_smem_to_gmem(result.at[pl.ds(first, length)], target)

        first = first + there
        length //= 2
