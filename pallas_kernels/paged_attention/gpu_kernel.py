"""The Hopper kernel under both forms of paged attention: TMA loads of pages, wgmma, a persistent grid.

A block has one or two consumer warpgroups (64 query rows on the M side of wgmma each) and a loader,
which runs ahead through a ring of shared-memory stages, across the borders of units of work. The
softmax follows FlashAttention-3 (arXiv 2407.08608) as in jax/experimental/pallas/ops/gpu/
attention_mgpu.py (Apache-2.0). A unit is one item of the schedule times one group of query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

WARPGROUP_ROWS = 64  # M of a wgmma
LOWEST = -1e30  # highest score before any key: finite, so that a masked score (-inf) weighs exp2(-inf) = 0
LOG2_E = math.log2(math.e)
TAIL = 16  # bytes of exponents that a load brings, those of its head among them
# How a warpgroup reads 64 rows of 8-bit numbers (8 bytes a thread, whole rows a warp) and writes them as bfloat16,
# and how it reads the exponents. Neither makes threads of a warp wait for a bank.
WIDEN_128 = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
WIDEN_64 = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
EXPONENTS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 16), (16, 16), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
# Columns of the schedule, int32 [items + 1, columns]; its last row starts with the number of items with work.
FIELDS = ("out", "query", "row", "first", "last", "position", "low", "high")


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for.

    by_keys: consumers share one tile of `q_rows` rows and take alternate key blocks (decode);
    else each has 64 rows of its own and both see every block (prefill). Latent (both): the two
    share rows and blocks, both compute the scores, and each has half of the value's columns, since
    64 x 512 of float32 are more than a warpgroup's registers; after FlashMLA (github.com/deepseek-ai/FlashMLA).
    """

    by_keys: bool
    consumers: int
    q_rows: int  # rows of a unit's query tile in memory; shares_rows: a multiple of 8 up to 64
    tokens: int  # of a unit's query tile, neighbours in their row
    group: int  # rows that share a token: query heads of one head group
    block_kv: int
    stages: int
    page_size: int
    kv_heads: int
    subgroups: int  # head groups of one KV head
    head_width: int
    dtype: str  # of the pages; 8 bits: quantized
    tail: int  # column of the row's exponents
    blocks: int  # of the persistent grid
    out_dtype: str  # float32 (by_keys) or bfloat16
    scale: float
    softcap: float | None
    window: int | None
    sinks: bool  # a float32 [head_groups * q_rows] operand
    lse: bool  # a second result: base-2 log of each row's sum of weights
    value_dim: int | None = None  # latent: a key's first lanes that are its value
    interpret: Any = False

    @property
    def latent(self) -> bool:
        return self.value_dim is not None

    @property
    def shares_rows(self) -> bool:
        """The consumers see one tile of up to 64 rows."""
        return self.by_keys or self.latent

    @property
    def row_width(self) -> int:
        """Columns of a stage: a KV head's key and value."""
        return self.head_width if self.latent else 2 * self.head_width

    @property
    def columns(self) -> int:
        """Of the value, a consumer."""
        return self.head_width if self.value_dim is None else self.value_dim // self.consumers

    @property
    def result_width(self) -> int:
        return self.head_width if self.value_dim is None else self.value_dim

    @property
    def head_groups(self) -> int:
        return self.kv_heads * self.subgroups

    @property
    def copy_rows(self) -> int:
        """Tokens of one TMA load: a page, or what a stage holds of a larger one."""
        return min(self.page_size, self.block_kv)

    @property
    def copies(self) -> int:
        return self.block_kv // self.copy_rows

    @property
    def quantized(self) -> bool:
        return self.dtype != "bfloat16"

    @property
    def takes_turns(self) -> bool:
        """Consumers of prefill alternate; quantized ones already wait for each other."""
        return not self.shares_rows and not self.quantized and self.consumers == 2

    def buffers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of what a block keeps in shared memory, see `_Refs`."""
        keys, width = self.block_kv, self.head_width
        ring = (self.stages, 2, keys, width) if self.quantized else (self.stages, keys, self.row_width)
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "kv_ring": (ring, self.dtype),
            "queries": ((1 if self.shares_rows else self.consumers, WARPGROUP_ROWS, width), "bfloat16"),
        }
        if self.quantized:
            # Keys, then values in their place; by rows, both at once and for both consumers.
            tiles = (self.consumers, 1) if self.by_keys else (1, 2)
            found["wide"] = ((*tiles, keys, width), "bfloat16")
            found["tails"] = ((self.stages, keys, TAIL), self.dtype)
            found["factors"] = ((self.consumers, 2, keys), "float32")
        if self.by_keys:
            found["result"] = ((WARPGROUP_ROWS, width), "float32")
        if self.by_keys and self.consumers == 2:
            found["stats"] = ((2, WARPGROUP_ROWS), "float32")
        if self.sinks or self.lse:
            found["vector"] = ((self.consumers, WARPGROUP_ROWS), "float32")
        if self.interpret:
            found["weights"] = ((self.consumers, WARPGROUP_ROWS, keys), "bfloat16")
        return found

    def scratch_bytes(self) -> int:
        """Shared memory of a block: every buffer begins at a multiple of 1024 bytes, barriers follow."""
        sizes = (math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in self.buffers().values())
        return sum(-(-size // 1024) * 1024 for size in sizes) + 1024


def attend(
    tile: Tile, schedule: Array, tables: Array, q: Array, pages: Array, sinks: Array | None
) -> tuple[Array, Array | None]:
    """Runs the schedule. q: [query tiles * head_groups * q_rows, head_width].

    Returns the weighted mean of the values, [items * head_groups * q_rows, result_width] in out_dtype, and with
    `lse` float32 [items * head_groups * 64]. What idle items would write stays uninitialised.
    """
    if tile.scale <= 0:
        raise ValueError(f"scale {tile.scale} must be positive: masked scores are -inf before it is applied")
    units = (schedule.shape[0] - 1) * tile.head_groups
    results = [jax.ShapeDtypeStruct((units * tile.q_rows, tile.result_width), jnp.dtype(tile.out_dtype))]
    if tile.lse:
        results.append(jax.ShapeDtypeStruct((units * WARPGROUP_ROWS,), jnp.float32))
    operands = [schedule, tables, q, pages] + ([] if sinks is None else [sinks])

    def body(*refs: Any) -> None:
        named: dict[str, Any] = dict(zip(("schedule", "tables", "q", "pages"), refs, strict=False))
        rest = list(refs[4:])
        named["sinks"] = rest.pop(0) if tile.sinks else None
        named["out"] = rest.pop(0)
        named["lse"] = rest.pop(0) if tile.lse else None
        _in_scope(tile, named)

    kernel = plgpu.kernel(
        body,
        out_type=results,
        grid=(min(tile.blocks, units),),
        grid_names=("block",),
        num_threads=tile.consumers + 1,
        thread_name="wg",
        interpret=tile.interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,  # no reduction crosses a warp
        ),
    )
    out = kernel(*operands)
    return out[0], out[1] if tile.lse else None


@dataclass(frozen=True)
class _Refs:
    """Operands and results in global memory, then shared memory, then barriers. None: this tile has none."""

    schedule: Any
    tables: Any
    q: Any
    pages: Any
    sinks: Any
    out: Any
    lse: Any
    kv_ring: Any  # [stages, block_kv, row_width], keys beside values; quantized: [stages, 2, block_kv, head_width]
    tails: Any  # [stages, block_kv, TAIL]: exponents
    factors: Any  # float32 [consumers, 2, block_kv]: their powers of two
    wide: Any  # [consumers or 1, 1 or 2, block_kv, head_width]: quantized numbers in bfloat16
    queries: Any  # [q_tiles, 64, head_width]; prefill and latents leave their result here
    result: Any  # float32 [64, head_width]
    stats: Any  # float32 [2, 64]: the other consumer's highest score and sum of weights
    vector: Any  # float32 [consumers, 64]: sinks on the way in, lse on the way out
    weights: Any  # only in the interpreter, whose wgmma takes no registers
    filled: Any
    freed: Any
    loaded: Any  # of queries, one a consumer
    vector_loaded: Any
    shared: Any  # both consumers have reached a point
    turns: Any  # whose tensor cores: one consumer multiplies while the other does its softmax
    merge_ready: Any


def _in_scope(tile: Tile, named: dict[str, Any]) -> None:
    """Allocates shared memory and barriers, and sends each warpgroup to its role."""
    both = tile.consumers == 2
    scratch = {name: _shared(name, tile, shape, dtype) for name, (shape, dtype) in tile.buffers().items()}
    scratch |= {
        "filled": plgpu.Barrier(num_arrivals=tile.copies * (3 if tile.quantized else 1), num_barriers=tile.stages),
        "freed": plgpu.Barrier(num_arrivals=1 if tile.by_keys else tile.consumers, num_barriers=tile.stages),
        "loaded": plgpu.Barrier(num_barriers=tile.consumers),
        "vector_loaded": plgpu.Barrier(num_barriers=tile.consumers) if tile.sinks else None,
        "shared": plgpu.Barrier(num_arrivals=2) if both else None,
        "turns": plgpu.Barrier(num_arrivals=2) if tile.takes_turns else None,
        "merge_ready": plgpu.Barrier() if tile.by_keys and both else None,
    }
    present = {name: kind for name, kind in scratch.items() if kind is not None}

    def roles(**allocated: Any) -> None:
        refs = _Refs(**{field.name: {**named, **allocated}.get(field.name) for field in fields(_Refs)})
        wg = lax.axis_index("wg")

        @pl.when(wg < tile.consumers)
        def _() -> None:
            if tile.consumers == 2:
                plgpu.set_max_registers(240, action="increase")
            _consumer(tile, refs, wg)

        @pl.when(wg == tile.consumers)
        def _() -> None:
            if tile.consumers == 2:
                plgpu.set_max_registers(24, action="decrease")
            _loader(tile, refs)

    pl.run_scoped(roles, **present, collective_axes="wg")


def _shared(name: str, tile: Tile, shape: tuple[int, ...], dtype: str) -> Any:
    """A buffer; what wgmma reads, and what TMA writes for it, is swizzled."""
    lanes = {"queries": 64, "wide": 64, "weights": 64, "result": 32, "kv_ring": 0 if tile.quantized else 64}.get(name)
    tiling: Any = plgpu.TilingTransform  # abstract to the type checker
    swizzle: Any = plgpu.SwizzleTransform
    swizzled = (tiling((8, lanes)), swizzle(128)) if lanes else ()
    return plgpu.SMEM(shape, jnp.dtype(dtype), transforms=swizzled)


@dataclass(frozen=True)
class _Unit:
    """One unit of work: int32 scalars, see `FIELDS`."""

    head_group: Array
    out: Array  # tile of the result
    query: Array  # tile of q
    row: Array  # of the block tables
    first: Array  # key block
    last: Array  # key block, exclusive
    position: Array  # of the tile's first query
    low: Array  # first key that any of its queries sees
    high: Array  # behind the last one


def _for_units(tile: Tile, refs: _Refs, body: Callable[[_Unit, Any], Any], carry: Any) -> Any:
    """This block's share of the units that have work: every `blocks`-th."""
    block = lax.axis_index("block")
    blocks = min(tile.blocks, (refs.schedule.shape[0] - 1) * tile.head_groups)
    active = refs.schedule[refs.schedule.shape[0] - 1, 0] * tile.head_groups
    turns = jnp.maximum(lax.div(active - block + (blocks - 1), jnp.int32(blocks)), 0)

    def turn(i: Array, carry: Any) -> Any:
        unit = block + i * blocks
        item = lax.div(unit, jnp.int32(tile.head_groups))
        head_group = unit - item * tile.head_groups
        numbers = {name: refs.schedule[item, k] for k, name in enumerate(FIELDS)}
        return body(_Unit(head_group, **numbers), carry)

    return lax.fori_loop(0, turns, turn, carry)


def _loader(tile: Tile, refs: _Refs) -> None:
    """Fills the ring. `count` is the number of stages filled so far, over all units."""

    def unit_loads(unit: _Unit, count: Array) -> Array:
        head = lax.div(unit.head_group, jnp.int32(tile.subgroups))

        def fill(block: Array, count: Array) -> Array:
            slot = lax.rem(count, jnp.int32(tile.stages))

            @pl.when(count >= tile.stages)
            def _() -> None:
                plgpu.barrier_wait(refs.freed.at[slot])

            starts = [block * tile.block_kv + i * tile.copy_rows for i in range(tile.copies)]
            last_entry = refs.tables.shape[1] - 1
            entries = [jnp.minimum(lax.div(start, jnp.int32(tile.page_size)), last_entry) for start in starts]
            page_ids = [refs.tables[unit.row, entry] for entry in entries]  # all loads in flight before the first use
            for i, (start, page) in enumerate(zip(starts, page_ids, strict=True)):
                seen = (start < unit.high) & (start + tile.copy_rows > unit.low)

                @pl.when(seen)
                def _(i: int = i, start: Array = start, page: Array = page) -> None:
                    offset = lax.rem(start, jnp.int32(tile.page_size))
                    rows = pl.ds(0, tile.page_size) if tile.copies > 1 else pl.ds(offset, tile.copy_rows)
                    _load_keys(
                        tile, refs, head, slot, refs.pages.at[page, rows], pl.ds(i * tile.copy_rows, tile.copy_rows)
                    )

                @pl.when(jnp.logical_not(seen))
                def _() -> None:
                    for _ in range(3 if tile.quantized else 1):
                        plgpu.barrier_arrive(refs.filled.at[slot])

            return count + 1

        return lax.fori_loop(unit.first, unit.last, fill, count)

    count = _for_units(tile, refs, unit_loads, jnp.int32(0))

    # Stages are left as they were found: every arrival has been waited for.
    def drain(i: Array, carry: None) -> None:
        plgpu.barrier_wait(refs.freed.at[lax.rem(i, jnp.int32(tile.stages))])

    lax.fori_loop(jnp.maximum(count - tile.stages, 0), count, drain, None)


def _load_keys(tile: Tile, refs: _Refs, head: Array, slot: Array, source: Any, rows: Any) -> None:
    """Rows of a page into rows of a stage; what the stage's barrier expects is three loads when quantized."""
    column, filled = head * tile.row_width, refs.filled.at[slot]
    if not tile.quantized:
        plgpu.copy_gmem_to_smem(source.at[:, pl.ds(column, tile.row_width)], refs.kv_ring.at[slot, rows], filled)
        return
    for half in range(2):
        columns = pl.ds(column + half * tile.head_width, tile.head_width)
        plgpu.copy_gmem_to_smem(source.at[:, columns], refs.kv_ring.at[slot, half, rows], filled)
    tail = tile.tail + lax.div(2 * head, jnp.int32(TAIL)) * TAIL
    plgpu.copy_gmem_to_smem(source.at[:, pl.ds(tail, TAIL)], refs.tails.at[slot, rows], filled)


State = tuple[Array, Array, Array]  # float32: weighted values [64, columns], highest score (base 2) and sum [64]


def _consumer(tile: Tile, refs: _Refs, wg: Array) -> None:
    """Softmax and products of this warpgroup's rows (or key blocks), unit by unit."""

    def unit_attends(unit: _Unit, count: Array) -> Array:
        _load_queries(tile, refs, unit, wg)
        stride = tile.consumers if tile.by_keys else 1
        mine = lax.rem(wg + lax.rem(count, jnp.int32(stride)), jnp.int32(stride))  # the ring's slots alternate

        def step(i: Array, state: State) -> State:
            turn = mine + i * stride
            slot = lax.rem(count + turn, jnp.int32(tile.stages))
            return _one_block(tile, refs, unit, wg, slot, (unit.first + turn) * tile.block_kv, state)

        turns = lax.div(unit.last - unit.first - mine + (stride - 1), jnp.int32(stride))
        state = lax.fori_loop(0, turns, step, _start(tile))
        if tile.by_keys:
            _finish_by_keys(tile, refs, unit, wg, state)
        elif tile.latent:
            _finish_by_columns(tile, refs, unit, wg, state)
        else:
            _finish_by_rows(tile, refs, unit, wg, state)
        return count + (unit.last - unit.first)

    _for_units(tile, refs, unit_attends, jnp.int32(0))


def _load_queries(tile: Tile, refs: _Refs, unit: _Unit, wg: Array) -> None:
    """A shared tile: one consumer loads for both, once both have left the unit before."""
    base = (unit.query * tile.head_groups + unit.head_group) * tile.q_rows
    if tile.shares_rows:
        if tile.consumers == 2:
            _meet(refs)

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(
                refs.q.at[pl.ds(base, tile.q_rows)], refs.queries.at[0, pl.ds(0, tile.q_rows)], refs.loaded.at[0]
            )

        plgpu.barrier_wait(refs.loaded.at[0])
        return
    plgpu.copy_gmem_to_smem(
        refs.q.at[pl.ds(base + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)], refs.queries.at[wg], refs.loaded.at[wg]
    )
    if tile.sinks:
        at = unit.head_group * tile.q_rows + wg * WARPGROUP_ROWS
        plgpu.copy_gmem_to_smem(refs.sinks.at[pl.ds(at, WARPGROUP_ROWS)], refs.vector.at[wg], refs.vector_loaded.at[wg])
    plgpu.barrier_wait(refs.loaded.at[wg])


def _start(tile: Tile) -> State:
    zeros = jnp.zeros((WARPGROUP_ROWS, tile.columns), jnp.float32)
    acc = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    row = plgpu.Layout.WGMMA.reduce(1)
    top = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), row)
    return acc, top, plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), row)


def _meet(refs: _Refs) -> None:
    """Both consumers pass once both are here."""
    plgpu.barrier_arrive(refs.shared)
    plgpu.barrier_wait(refs.shared)


def _one_block(tile: Tile, refs: _Refs, unit: _Unit, wg: Array, slot: Array, start: Array, state: State) -> State:
    """Fold keys [start, start + block_kv) into the state."""
    acc, top, total = state
    mine = 0 if tile.shares_rows else wg
    turns = _Turns(tile, refs, unit, wg, start)
    plgpu.barrier_wait(refs.filled.at[slot])
    keys = _keys(tile, refs, unit, wg, slot, start)
    turns.begin()

    def product(ref: Any) -> Array:
        plgpu.wgmma(ref, refs.queries.at[mine], keys.T)
        turns.change()
        return ref[...]

    scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tile.block_kv), jnp.float32))
    if tile.quantized:
        scores *= _factors(refs, wg, 0, scores.shape)
    scores, factor = _scaled(tile, scores)
    scores = _masked(tile, unit.position, mine * WARPGROUP_ROWS, start, scores)
    new_top = jnp.maximum(top, scores.max(axis=1) * factor)
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_top, scores.shape, [0]))
    total = total * shrink + weights.sum(axis=1)
    if tile.quantized:
        weights *= _factors(refs, wg, 1, scores.shape)
    weights = weights.astype(jnp.bfloat16)
    acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
    turns.change()
    values = _values(tile, refs, unit, wg, slot, start)
    acc = _add_product(tile, refs, wg, acc * lax.broadcast_in_dim(shrink, acc.shape, [0]), weights, values)
    if not tile.quantized:
        plgpu.barrier_arrive(refs.freed.at[slot])
    turns.end()
    return acc, new_top, total


class _Turns:
    """Keeps the consumers half a block apart, as attention_mgpu.py does, between the blocks in which they meet."""

    def __init__(self, tile: Tile, refs: _Refs, unit: _Unit, wg: Array, start: Array) -> None:
        self.tile, self.refs, self.wg = tile, refs, wg
        block = lax.div(start, jnp.int32(tile.block_kv))
        first = unit.first + (unit.low > unit.first * tile.block_kv).astype(jnp.int32)
        last = unit.last - (unit.high < unit.last * tile.block_kv).astype(jnp.int32)
        self.apart = (block >= first) & (block < last)
        self.is_first, self.is_last = block == first, block == last - 1

    def _change(self, when: Array) -> None:
        if self.tile.takes_turns:

            @pl.when(self.apart & when)
            def _() -> None:
                plgpu.barrier_arrive(self.refs.turns)
                plgpu.barrier_wait(self.refs.turns)

    def begin(self) -> None:
        self._change(self.is_first & (self.wg == 1))

    def change(self) -> None:
        self._change(jnp.bool_(True))

    def end(self) -> None:
        self._change(self.is_last & (self.wg == 0))


def _add_product(tile: Tile, refs: _Refs, wg: Array, acc: Array, weights: Array, values: Any) -> Array:
    """acc + weights @ values. The interpreter knows no weights in registers and no accumulator that begins full."""
    if not tile.interpret:
        full: Any = plgpu.WGMMAAccumulatorRef.init(acc)
        return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(full)
    refs.weights[wg] = weights
    plgpu.commit_smem()

    def product(ref: Any) -> Array:
        plgpu.wgmma(ref, refs.weights.at[wg], values)
        return ref[...]

    return acc + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tile.columns), jnp.float32))


def _keys(tile: Tile, refs: _Refs, unit: _Unit, wg: Array, slot: Array, start: Array) -> Any:
    """The stage's keys, bfloat16 [block_kv, head_width], and whatever must be done before they are used."""
    if not tile.quantized:
        _blank_unseen_values(tile, refs, wg, slot, start, unit.low, unit.high)
        return refs.kv_ring.at[slot, :, pl.ds(0, tile.head_width)]
    _read_factors(tile, refs, unit, wg, slot)
    if tile.by_keys:
        _widen(tile, refs.kv_ring.at[slot, 0], refs.wide.at[wg, 0])
        return refs.wide.at[wg, 0]
    _meet(refs)  # both have used what is there

    @pl.when(wg == 0)
    def _() -> None:
        _widen(tile, refs.kv_ring.at[slot, 0], refs.wide.at[0, 0])

    @pl.when(wg == 1)
    def _() -> None:
        _widen(tile, refs.kv_ring.at[slot, 1], refs.wide.at[0, 1], (unit.low - start, unit.high - start))

    _meet(refs)
    plgpu.barrier_arrive(refs.freed.at[slot])
    return refs.wide.at[0, 0]


def _values(tile: Tile, refs: _Refs, unit: _Unit, wg: Array, slot: Array, start: Array) -> Any:
    """The consumer's values, bfloat16 [block_kv, columns]; quantized by_keys, they take the keys' place."""
    if tile.latent:
        return refs.kv_ring.at[slot, :, pl.ds(wg * tile.columns, tile.columns)]
    if not tile.quantized:
        return refs.kv_ring.at[slot, :, pl.ds(tile.head_width, tile.head_width)]
    if not tile.by_keys:
        return refs.wide.at[0, 1]
    _widen(tile, refs.kv_ring.at[slot, 1], refs.wide.at[wg, 0], (unit.low - start, unit.high - start))
    plgpu.barrier_arrive(refs.freed.at[slot])
    return refs.wide.at[wg, 0]


def _widen(tile: Tile, source: Any, target: Any, seen: tuple[Array, Array] | None = None) -> None:
    """8-bit numbers of a stage as bfloat16, which is exact; rows outside `seen` are zero, as 0 * NaN is NaN."""
    width = 128 if tile.head_width % 128 == 0 else 64
    layout = WIDEN_128 if width == 128 else WIDEN_64
    for row in range(0, tile.block_kv, WARPGROUP_ROWS):
        for column in range(0, tile.head_width, width):
            part = pl.ds(row, WARPGROUP_ROWS), pl.ds(column, width)
            numbers = plgpu.load(source.at[part], layout=layout)
            if tile.dtype != "int8":  # what the hardware converts
                numbers = numbers.astype(jnp.float16).astype(jnp.float32)
            numbers = numbers.astype(jnp.bfloat16)
            if seen is not None:
                keys = plgpu.broadcasted_iota(jnp.int32, numbers.shape, 0, layout=layout) + row
                numbers = jnp.where((keys >= seen[0]) & (keys < seen[1]), numbers, jnp.bfloat16(0))
            target[part] = numbers
    plgpu.commit_smem()


def _read_factors(tile: Tile, refs: _Refs, unit: _Unit, wg: Array, slot: Array) -> None:
    """2**e of the stage's keys and values into `factors`; a stale e may be anything, so it is kept finite."""
    head = lax.div(unit.head_group, jnp.int32(tile.subgroups))
    column = lax.rem(2 * head, jnp.int32(TAIL))
    for row in range(0, tile.block_kv, WARPGROUP_ROWS):
        stored = plgpu.load(refs.tails.at[slot, pl.ds(row, WARPGROUP_ROWS)], layout=EXPONENTS)
        exponents = lax.bitcast_convert_type(stored, jnp.int8).astype(jnp.int32)
        powers = lax.bitcast_convert_type((jnp.maximum(exponents, -126) + 127) << 23, jnp.float32)
        columns = plgpu.broadcasted_iota(jnp.int32, powers.shape, 1, layout=EXPONENTS)
        for half in range(2):
            own = jnp.where(columns == column + half, powers, 0.0).max(axis=1)
            refs.factors[wg, half, pl.ds(row, WARPGROUP_ROWS)] = own


def _factors(refs: _Refs, wg: Array, half: int, shape: tuple[int, ...]) -> Array:
    row = plgpu.load(refs.factors.at[wg, half], layout=plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(row, shape, [1])


def _scaled(tile: Tile, scores: Array) -> tuple[Array, float]:
    """Scores and the factor that is still missing to make them base-2 exponents."""
    if tile.softcap is None:
        return scores, tile.scale * LOG2_E
    # tanh(x) = 1 - 2 / (1 + exp(2x)): the hardware's tanh is good to 11 bits only, its exp2 to 22.
    grown = jnp.exp2(scores * (2 * LOG2_E * tile.scale / tile.softcap))
    return 1.0 - 2.0 / (1.0 + grown), tile.softcap * LOG2_E


def _masked(tile: Tile, position: Array, first_row: Array | int, start: Array, scores: Array) -> Array:
    """-inf where the row's query does not see the key; nothing to do in the middle of a row."""
    one_token, group = tile.tokens == 1, jnp.int32(tile.group)
    lead = position if one_token else position + lax.div(jnp.int32(first_row), group)
    tail = position if one_token else position + lax.div(jnp.int32(first_row + WARPGROUP_ROWS - 1), group)
    all_seen = start + (tile.block_kv - 1) <= lead
    if tile.window is not None:
        all_seen &= start > tail - tile.window

    def mask(scores: Array) -> Array:
        shape, layout = scores.shape, plgpu.Layout.WGMMA
        keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout) + start
        if one_token:
            seen = keys <= position
            if tile.window is not None:
                seen &= keys > position - tile.window
        else:
            rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + first_row
            queries = lax.div(rows, group) + position
            seen = keys <= queries
            if tile.window is not None:
                seen &= keys > queries - tile.window
        return jnp.where(seen, scores, -jnp.inf)

    return lax.cond(all_seen, lambda s: s, mask, scores)


def _blank_unseen_values(
    tile: Tile, refs: _Refs, wg: Array, slot: Array, start: Array, low: Array, high: Array
) -> None:
    """Zero the values outside [low, high): stale ones may be NaN, and 0 * NaN is NaN in wgmma."""
    columns = range(0, tile.result_width, 64) if tile.latent else range(tile.head_width, tile.row_width, 64)

    @pl.when((start < low) | (start + tile.block_kv > high))
    def _() -> None:
        def blank() -> None:
            for row in range(0, tile.block_kv, WARPGROUP_ROWS):
                for column in columns:
                    part = refs.kv_ring.at[slot, pl.ds(row, WARPGROUP_ROWS), pl.ds(column, 64)]
                    values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                    keys = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS, 64), 0, layout=plgpu.Layout.WGMMA)
                    keys += start + row
                    part[...] = jnp.where((keys >= low) & (keys < high), values, jnp.bfloat16(0))
            plgpu.commit_smem()

        if tile.by_keys:
            blank()
        else:
            pl.when(wg == 0)(blank)
            if tile.consumers == 2:
                _meet(refs)


def _finish_by_rows(tile: Tile, refs: _Refs, unit: _Unit, wg: Array, state: State) -> None:
    """Every consumer writes its 64 rows, through the buffer that held their queries."""
    acc, top, total = state
    if tile.sinks:
        plgpu.barrier_wait(refs.vector_loaded.at[wg])
        sinks = plgpu.load(refs.vector.at[wg], layout=plgpu.Layout.WGMMA.reduce(1))
        total += jnp.exp2(sinks * LOG2_E - top)
    mean = acc / lax.broadcast_in_dim(total, acc.shape, [0])
    refs.queries[wg] = mean.astype(jnp.bfloat16)
    plgpu.commit_smem()
    base = (unit.out * tile.head_groups + unit.head_group) * tile.q_rows + wg * WARPGROUP_ROWS
    plgpu.copy_smem_to_gmem(refs.queries.at[wg], refs.out.at[pl.ds(base, WARPGROUP_ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _finish_by_columns(tile: Tile, refs: _Refs, unit: _Unit, wg: Array, state: State) -> None:
    """Every consumer writes its columns, through the buffer that held the queries of both."""
    acc, top, total = state
    mean = acc / lax.broadcast_in_dim(total, acc.shape, [0])
    mine = pl.ds(wg * tile.columns, tile.columns)
    _meet(refs)
    refs.queries[0, :, mine] = mean.astype(jnp.bfloat16)
    at = unit.out * tile.head_groups + unit.head_group
    if tile.lse:
        refs.vector[wg] = top + jnp.log2(total)  # both have the same
    plgpu.commit_smem()
    for row in range(0, tile.q_rows, 8):  # a copy reads whole tiles that stand side by side: 8 rows of 64 lanes each
        rows = pl.ds(at * tile.q_rows + row, 8)
        plgpu.copy_smem_to_gmem(refs.queries.at[0, pl.ds(row, 8), mine], refs.out.at[rows, mine])
    if tile.lse:

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.copy_smem_to_gmem(refs.vector.at[0], refs.lse.at[pl.ds(at * WARPGROUP_ROWS, WARPGROUP_ROWS)])

    plgpu.wait_smem_to_gmem(0)


def _finish_by_keys(tile: Tile, refs: _Refs, unit: _Unit, wg: Array, state: State) -> None:
    """The second consumer hands its state to the first, which writes the unit's result.

    The buffers are free again when both have met at the start of the next unit.
    """
    if tile.consumers == 1:
        _write_by_keys(tile, refs, unit, state)
        return

    @pl.when(wg == 1)
    def _() -> None:
        acc, top, total = state
        refs.result[...] = acc
        refs.stats[0] = top
        refs.stats[1] = total
        plgpu.barrier_arrive(refs.merge_ready)

    @pl.when(wg == 0)
    def _() -> None:
        plgpu.barrier_wait(refs.merge_ready)
        _write_by_keys(tile, refs, unit, _merged(refs, state))


def _merged(refs: _Refs, state: State) -> State:
    acc, top, total = state
    row = plgpu.Layout.WGMMA.reduce(1)
    other_top, other_total = plgpu.load(refs.stats.at[0], layout=row), plgpu.load(refs.stats.at[1], layout=row)
    new_top = jnp.maximum(top, other_top)
    mine, theirs = jnp.exp2(top - new_top), jnp.exp2(other_top - new_top)
    other = plgpu.load(refs.result, layout=plgpu.Layout.WGMMA)
    merged = acc * lax.broadcast_in_dim(mine, acc.shape, [0]) + other * lax.broadcast_in_dim(theirs, acc.shape, [0])
    return merged, new_top, total * mine + other_total * theirs


def _write_by_keys(tile: Tile, refs: _Refs, unit: _Unit, state: State) -> None:
    acc, top, total = state
    refs.result[...] = acc / lax.broadcast_in_dim(total, acc.shape, [0])
    if tile.lse:
        refs.vector[0] = top + jnp.log2(total)
    plgpu.commit_smem()
    at = unit.out * tile.head_groups + unit.head_group
    plgpu.copy_smem_to_gmem(refs.result.at[pl.ds(0, tile.q_rows)], refs.out.at[pl.ds(at * tile.q_rows, tile.q_rows)])
    if tile.lse:
        plgpu.copy_smem_to_gmem(refs.vector.at[0], refs.lse.at[pl.ds(at * WARPGROUP_ROWS, WARPGROUP_ROWS)])
    plgpu.wait_smem_to_gmem(0)
