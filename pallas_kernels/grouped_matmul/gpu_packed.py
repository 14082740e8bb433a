"""grouped_matmul of packed experts on Hopper GPUs: out^T = w^T x^T, with the walk of the floating kernel.

Each consumer has half of a tile's columns and all of its rows, so that a weight is made wide once a
tile; few rows an expert, which are wgmma's N, make a narrow tile. How bytes become wgmma's left operand
is `packed_gpu`'s. One scale a column multiplies the finished sum, scales of groups a group's sum. With
offsets the weights are computed in float32 and rounded to bfloat16. With dynamic activations x comes as
8-bit numbers in bfloat16, which holds them exactly, and its scales multiply the finished sum.

A stage of int4 in larger groups has some rows of both halves of a group, and x's columns of both.
Depth and order of the stages are the weight's alone: a row's sum over K has one order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu_walk import CONSUMERS, HALF, Blocks, Exit, Unit, launched, load, walk
from pallas_kernels.packed_gpu import (
    SINGLE,
    Left,
    Packed,
    lefts,
    packed,
    product,
    spread,
    store_transposed,
    stored,
    tiled,
)
from pallas_kernels.quantized import Quantized
from pallas_kernels.quantized_matmul.reference import quantize_rows

_DEEPEST = 160  # rows of a stage


def depth_of(w: Quantized) -> int:
    """Rows of a stage: near 128, parts of K that are whole groups or part of one."""
    form, k = packed(w), w.shape[1]
    unit = form.depth * form.packing
    fits = [d for d in range(unit, _DEEPEST + 1, unit) if k % d == 0 and (d % w.group == 0 or w.group % d == 0)]
    return min(fits, key=lambda d: (abs(d - 128), -d))


def stage_bytes(w: Quantized, bm: int, bn: int, bk: int) -> int:
    """Shared memory of a stage."""
    form = packed(w)
    scales = max(1, bk // w.group) * bn * w.scales.dtype.itemsize * (1 + form.offsets)
    return bm * bk * 2 + bk // form.packing * bn + scales


def left(x: Array, w: Quantized) -> tuple[Array, Array | None]:
    """x as it is multiplied, bfloat16, and the scales of its rows, float32 [tokens, 1], where those are quantized."""
    numbers, row_scales = quantize_rows(x, w.format) if w.activations == "dynamic" else (x, None)
    return numbers.astype(jnp.bfloat16), row_scales


def call(
    table: Array, count: Array, x: Array, w: Quantized, row_scales: Array | None, out: jax.ShapeDtypeStruct,
    *, b: Blocks, cores: int, interpret: bool,
) -> Array:  # fmt: skip
    """x [rows, K] and row_scales [rows] by w -> `out`; table and count are `visits`' as `gpu.run` lays them out."""
    form, values, (_, k, n) = packed(w), stored(w), w.shape
    parts = len(_parts(form, b))
    scales = plgpu.SMEM((b.stages, max(1, b.bk // form.group), b.bn), w.scales.dtype)
    by_weight = {"scales_ring": scales} if form.groups > 1 or form.offsets else {}
    by_weight |= {"offsets_ring": scales} if form.offsets else {}
    x_ring = (b.stages, parts, b.bm, b.bk // parts)
    scratch = by_weight | {
        "x_ring": plgpu.SMEM(x_ring, x.dtype, transforms=tiled(form.depth, 16)),
        "values_ring": plgpu.SMEM((b.stages, b.bk // form.packing, b.bn), values.dtype, transforms=tiled(HALF, 8)),
    }
    body = functools.partial(
        _kernel, w=form, b=b, steps=k // b.bk, columns=n // b.bn, blocks=cores,
        dynamic=row_scales is not None, interpret=interpret,
    )  # fmt: skip
    share, copies = (min(HALF, b.bm), b.bn // CONSUMERS), 1 + parts + len(by_weight)
    kernel = launched(body, out, scratch, b=b, share=share, copies=copies, cores=cores, interpret=interpret)
    extra = [leaf for leaf in (w.offsets, row_scales) if leaf is not None]
    return kernel(table, count, x, values, w.scales, *extra)


def _parts(w: Packed, b: Blocks) -> list[int]:
    """Of x's columns in a stage: the distance of each part from the first. Two where int4's group is larger than it."""
    return [0, w.group // 2] if w.packing == 2 and w.group > b.bk else [0]


def _kernel(
    table: Any, count: Any, x: Any, values: Any, scales: Any, *rest: Any,
    x_ring: Any, values_ring: Any, whole: Any, ragged: Any, filled: Any, freed: Any,
    w: Packed, b: Blocks, steps: int, columns: int, blocks: int, dynamic: bool, interpret: bool,
    scales_ring: Any = None, offsets_ring: Any = None,
) -> None:  # fmt: skip
    """One block: every `blocks`-th unit. Stages are counted over all units.

    rest: offsets like scales if any, row scales [rows] if dynamic, out. Scales of groups have rings, and offsets.
    """
    *extra, out = rest
    offsets: Any = extra.pop(0) if w.offsets else None
    scalings = [(source, ring) for source, ring in ((scales, scales_ring), (offsets, offsets_ring)) if ring is not None]
    block, wg = lax.axis_index("block"), lax.axis_index("wg")
    units = walk(table, count, block, columns, blocks, b.bn)
    stages = jnp.int32(b.stages)

    @pl.when(wg == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        parts, depth = _parts(w, b), b.bk // w.packing

        def fill(unit: Unit, step: Array, slot: Array) -> None:
            rows, columns = pl.ds(unit.row, b.bm), pl.ds(unit.column, b.bn)
            group = lax.div(step * b.bk, jnp.int32(w.group))
            start = group * w.group + lax.div(step * b.bk - group * w.group, jnp.int32(len(parts)))
            for part, distance in enumerate(parts):
                cut = x.at[rows, pl.ds(start + distance, x_ring.shape[-1])]
                plgpu.copy_gmem_to_smem(cut, x_ring.at[slot, part], filled.at[slot])
            weight = values.at[unit.expert, pl.ds(step * depth, depth), columns]
            plgpu.copy_gmem_to_smem(weight, values_ring.at[slot], filled.at[slot])
            for source, ring in scalings:
                cut = source.at[unit.expert, pl.ds(group, ring.shape[1]), columns]
                plgpu.copy_gmem_to_smem(cut, ring.at[slot], filled.at[slot])

        load(units, steps, b.stages, freed, fill)

    @pl.when(wg < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows, width = whole.shape[1:]
        mine, depth = pl.ds(wg * width, width), min(b.bk, w.group)
        way_out = Exit(whole.at[wg], ragged.at[wg], out)
        nothing = plgpu.layout_cast(jnp.zeros((width, b.bm), jnp.float32), plgpu.Layout.WGMMA)

        def columns_of_x(slot: Array, first: int, count: int) -> Any:
            part, column = divmod(first, x_ring.shape[-1])
            return x_ring.at[slot, part, :, pl.ds(column, count)]

        def scaled(slot: Array) -> Iterator[Left]:
            """Of all groups of a stage, the weights themselves."""
            for group in range(b.bk // depth):
                factors = (spread(ring.at[slot, group, mine], w.depth) for ring in (scales_ring, offsets_ring))
                yield from _scaled(lefts(values_ring.at[slot, :, mine], group * depth, depth, w), *factors)

        def add(i: Array, total: Array, done: Array) -> Array:
            """A stage's products."""
            slot = lax.rem(done + i, stages)
            plgpu.barrier_wait(filled.at[slot])
            x = functools.partial(columns_of_x, slot)
            if w.offsets:
                total = product(scaled(slot), x, total, interpret)
            for group in range(0 if w.offsets else b.bk // depth):
                numbers = _once(lefts(values_ring.at[slot, :, mine], group * depth, depth, w))
                if w.groups == 1:
                    total = product(numbers, x, total, interpret)
                else:
                    sums = product(numbers, x, nothing, interpret)
                    total = total + sums * spread(scales_ring.at[slot, group, mine], b.bm)
            plgpu.commit_smem()  # every warp has read the stage before TMA fills it anew
            plgpu.barrier_arrive(freed.at[slot])
            return total

        def store(result: Array, unit: Unit, top: int) -> None:
            """result [columns, rows]: the tile's rows from `top` on."""
            first, last = (jnp.clip(row - top, 0, rows) for row in (unit.first, unit.last))

            @pl.when(first < last)
            def _() -> None:
                def put(ref: Any) -> None:
                    store_transposed(ref, result)

                way_out.send(put, first, last, unit.row + top, unit.column + wg * width)

        def consume(turn: Array, done: Array) -> Array:
            unit = units.unit(turn)

            @pl.when(unit.nobodys == 0)
            def _() -> None:
                total = lax.fori_loop(0, steps, functools.partial(add, done=done), nothing)
                if not scalings:
                    total = total * spread(scales.at[unit.expert, 0, pl.ds(unit.column + wg * width, width)], b.bm)
                if dynamic:
                    total = _times_rows(total, extra[0].at[pl.ds(unit.row, b.bm)])
                result = total.astype(out.dtype)
                for top in range(0, b.bm, rows):
                    store(result[:, top : top + rows], unit, top)

            @pl.when(unit.nobodys == 1)
            def _() -> None:
                for top in range(0, b.bm, rows):
                    store(nothing[:, :rows].astype(out.dtype), unit, top)

            return done + jnp.where(unit.nobodys == 1, 0, steps)

        lax.fori_loop(0, units.turns, consume, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _once(operands: Iterable[Left]) -> Iterator[Left]:
    """Operands of the stored numbers."""
    for left in operands:
        yield left if left.times == 1 else replace(left, numbers=left.numbers * (1 / left.times), times=1)


def _scaled(operands: Iterable[Left], scales: Array, offsets: Array) -> Iterator[Left]:
    """Operands of the weights themselves; scales and offsets: float32 [columns, depth]."""
    for left in operands:
        wide = left.numbers.astype(jnp.float32) * (scales * (1 / left.times)) + offsets
        yield replace(left, numbers=wide.astype(jnp.bfloat16), times=1)


def _times_rows(total: Array, row_scales: Any) -> Array:
    """total [columns, rows] times float32 [rows], which are read one by one: a tile starts at any row."""
    factors = plgpu.load(row_scales, layout=SINGLE.reduce(0), optimized=False)
    factors = plgpu.layout_cast(lax.broadcast_in_dim(factors, total.shape, [1]), SINGLE)
    return plgpu.layout_cast(total, SINGLE) * factors
