"""What the Hopper kernels of grouped_matmul share: how they are launched, a block's walk over its units, the
loader, and how results leave.

A unit is a visit and a block of columns. Knows nothing about products and formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.packed_gpu import tiled

HALF = 64  # rows of a wgmma, columns of a swizzled row
CONSUMERS = 2


@dataclass(frozen=True)
class Blocks:
    """Rows, columns and depth of a stage, and how many stages are in flight."""

    bm: int
    bn: int
    bk: int
    stages: int


def launched(
    body: Callable[..., None], out: jax.ShapeDtypeStruct, scratch: Mapping[str, Any],
    *, b: Blocks, share: tuple[int, int], copies: int, cores: int, interpret: bool,
) -> Callable[..., Array]:  # fmt: skip
    """`body` on `cores` blocks of a loader and two consumers, with what every kernel has of shared memory: room for
    each consumer's `share` of a result, and barriers of stages that `copies` copies fill. scratch: what it has besides.
    """
    how: Any = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}
    result = (CONSUMERS, *share)
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(cores,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types={
            "whole": plgpu.SMEM(result, out.dtype, transforms=tiled(HALF, 16)),
            "ragged": plgpu.SMEM(result, out.dtype),
            "filled": plgpu.Barrier(num_arrivals=copies, num_barriers=b.stages),
            "freed": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=b.stages),
            **scratch,
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **how,
    )


@dataclass(frozen=True)
class Unit:
    """int32 scalars: one visit and one block of columns. The expert's rows are [first, last) of the tile."""

    expert: Array
    row: Array
    first: Array
    last: Array
    nobodys: Array
    column: Array


@dataclass(frozen=True)
class Walk:
    """One block's units: every `blocks`-th."""

    table: Any  # int32 [visits, 5], a row a visit: the unit's fields but its column
    block: Array
    turns: Array  # how many units
    columns: int  # blocks of columns
    blocks: int
    bn: int

    def unit(self, turn: Array) -> Unit:
        index = self.block + turn * self.blocks
        visit = lax.div(index, jnp.int32(self.columns))
        fields = (self.table[visit, field] for field in range(5))
        return Unit(*fields, column=(index - visit * self.columns) * self.bn)


def walk(table: Any, count: Any, block: Array, columns: int, blocks: int, bn: int) -> Walk:
    """count: int32 [1], the visits that there are."""
    turns = jnp.maximum(lax.div(count[0] * columns - block + (blocks - 1), jnp.int32(blocks)), 0)
    return Walk(table, block, turns, columns, blocks, bn)


def load(units: Walk, steps: int, stages: int, freed: Any, fill: Callable[[Unit, Array, Array], None]) -> None:
    """The loader: fill(unit, step, slot) starts the copies of a stage. Stages are counted over all units."""

    def one_unit(turn: Array, done: Array) -> Array:
        unit = units.unit(turn)

        def one_stage(step: Array, done: Array) -> Array:
            slot = lax.rem(done, jnp.int32(stages))

            @pl.when(done >= stages)
            def _() -> None:
                plgpu.barrier_wait(freed.at[slot])

            fill(unit, step, slot)
            return done + 1

        return lax.fori_loop(0, jnp.where(unit.nobodys == 1, 0, steps), one_stage, done)

    done = lax.fori_loop(0, units.turns, one_unit, jnp.int32(0))

    # Stages are left as they were found: every arrival has been waited for.
    def drain(i: Array, _: None) -> None:
        plgpu.barrier_wait(freed.at[lax.rem(i, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, None)


@dataclass(frozen=True)
class Exit:
    """A consumer's shared memory for a tile of its results, and where they go."""

    whole: Any  # [rows, columns], swizzled: serves the common case faster; TMA takes 8 rows at a time from it
    ragged: Any  # the same, not swizzled
    out: Any

    def send(self, put: Callable[[Any], None], first: Array, last: Array, row: Array, column: Array) -> None:
        """Rows [first, last) of a tile to rows `row` + the same of `out`; put(ref) writes the whole tile to `ref`."""
        rows, columns = self.whole.shape
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        full = last - first == rows
        if self.out.shape[0] >= rows:

            @pl.when(full)
            def _() -> None:
                put(self.whole)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(self.whole, self.out.at[pl.ds(row, rows), pl.ds(column, columns)])

        @pl.when(jnp.logical_not(full))
        def _() -> None:
            put(self.ragged)
            plgpu.commit_smem()
            self._send_rows(first, last, row, column)

    def _send_rows(self, first: Array, last: Array, row: Array, column: Array) -> None:
        """Less than all rows, a power of two at a time."""
        rows, columns = self.ragged.shape
        length = min(rows // 2, 1 << (self.out.shape[0].bit_length() - 1))
        while length:
            there = (last - first) & length

            @pl.when(there != 0)
            def _(length: int = length, first: Array = first) -> None:
                target = self.out.at[pl.ds(row + first, length), pl.ds(column, columns)]
                plgpu.copy_smem_to_gmem(self.ragged.at[pl.ds(first, length)], target)

            first = first + there
            length //= 2
