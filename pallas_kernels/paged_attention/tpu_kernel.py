"""The Mosaic kernel behind `tpu.py`: items, pages brought by asynchronous copies, one online softmax.

Knows nothing of decode or prefill; `tpu.py` lays out queries and items for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_shape import (
    BLOCK,
    FIELDS,
    FIRST,
    HI,
    LANES,
    LAST,
    LO,
    NEXT,
    PACKING,
    POSITION,
    ROW,
    Maths,
    Shape,
    log2,
)
from pallas_kernels.target import Target

LOWEST = -1e30  # a row's highest score before it has seen any
HIDDEN = -2e30  # below LOWEST, so that exp(HIDDEN - LOWEST) is 0
# With its default size all copies share one place of the race detector's clock, which hides races between them.
INTERPRETER = pltpu.InterpretParams(detect_races=True, vector_clock_size=64)


class Refs(NamedTuple):
    items: Any  # SMEM int32 [items * FIELDS]
    part: Any  # SMEM int32 [1], which part of every page is here
    table: Any  # SMEM int32 [1, 1, pages_per_seq] of the item's row
    next_table: Any  # the same of the next item that has keys
    q: Any  # VMEM [1, bands, rows, lanes]
    pages: Any  # HBM [pages, page_size, width]
    sinks: Any  # VMEM float32 [bands, rows, 1]
    out: Any  # VMEM [1, bands, rows, value_lanes]
    lse: Any  # VMEM float32 [1, bands, rows, LANES], log-sum-exp of the scores; None of whole pages
    buffer: Any  # VMEM [2, chunk_pages, page_size, width]
    arrived: Any  # DMA semaphores [2]
    values: Any  # VMEM float32 [bands, rows, value_lanes], weighted
    top: Any  # VMEM float32 [bands, rows, LANES], highest score
    total: Any  # VMEM float32 [bands, rows, LANES], sum of weights
    slot: Any  # SMEM int32 [1], half of the buffer that the item's first chunk goes to

    def field(self, item: Array, name: int) -> Array:
        return self.items[item * FIELDS + name]


def attend(
    items: Array,
    block_tables: Array,
    q: Array,
    kv_pages: Array,
    sinks: Array | None,
    part: Array,
    shape: Shape,
    maths: Maths,
    target: Target,
) -> list[Array]:
    """The result [blocks, bands, rows, value_lanes] of q [blocks, bands, rows, lanes]; see `Refs` for the operands.

    Of parts of pages it is float32, and behind it are the log-sum-exps [blocks, bands, rows, LANES].
    """
    num_items = items.shape[0] // FIELDS
    if sinks is None:
        sinks = jnp.zeros((1, 1, 1), jnp.float32)
    state = (shape.bands, shape.rows)

    def table_of(i: Array, items_ref: Any, part_ref: Any) -> tuple[Any, int, int]:
        return items_ref[i * FIELDS + ROW], 0, 0

    def next_table_of(i: Array, items_ref: Any, part_ref: Any) -> tuple[Any, int, int]:
        following = jnp.minimum(items_ref[i * FIELDS + NEXT], num_items - 1)
        return items_ref[following * FIELDS + ROW], 0, 0

    def block_of(i: Array, items_ref: Any, part_ref: Any) -> tuple[Any, int, int, int]:
        return items_ref[i * FIELDS + BLOCK], 0, 0, 0

    table = (1, 1, block_tables.shape[1])
    results = [jax.ShapeDtypeStruct((*q.shape[:-1], shape.value_lanes), q.dtype if shape.parts == 1 else jnp.float32)]
    if shape.parts > 1:
        results.append(jax.ShapeDtypeStruct((*q.shape[:-1], LANES), jnp.float32))
    call = pl.pallas_call(
        partial(_kernel, shape, maths),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_items,),
            in_specs=[
                pl.BlockSpec(table, table_of, memory_space=pltpu.SMEM),
                pl.BlockSpec(table, next_table_of, memory_space=pltpu.SMEM),
                pl.BlockSpec((1, *q.shape[1:]), block_of),
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec(sinks.shape, lambda i, items_ref, part_ref: (0, 0, 0)),
            ],
            out_specs=[pl.BlockSpec((1, *result.shape[1:]), block_of) for result in results],
            scratch_shapes=[
                pltpu.VMEM((2, shape.chunk_pages, shape.page_size, shape.layout.width), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((*state, shape.value_lanes), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_vmem_limit(shape, maths, target)
        ),
        interpret=INTERPRETER if target.interpret else False,
        name="paged_attention",
    )
    rows, pages_per_seq = block_tables.shape
    tables = block_tables.reshape(rows, 1, pages_per_seq)
    return call(items, part.reshape(1), tables, tables, q, kv_pages, sinks)


def _kernel(shape: Shape, maths: Maths, *operands: Any) -> None:
    """One item."""
    given = list(operands)
    if shape.parts == 1:
        given.insert(Refs._fields.index("lse"), None)
    refs = Refs(*given)
    item = pl.program_id(0)
    before, after = jnp.maximum(item - 1, 0), jnp.minimum(item + 1, pl.num_programs(0) - 1)
    block = refs.field(item, BLOCK)
    lo, hi, following = refs.field(item, LO), refs.field(item, HI), refs.field(item, NEXT)
    chunks = _chunks(shape, lo, hi)

    def fetch_next_item(slot: Array) -> None:
        @pl.when(following < pl.num_programs(0))
        def _() -> None:
            copies = _copies(shape, refs, refs.next_table, refs.field(following, LO), refs.field(following, HI))
            copies(jnp.int32(0), slot, start=True)

    @pl.when(item == 0)
    def _() -> None:
        refs.slot[0] = 0

        @pl.when(chunks > 0)
        def _() -> None:
            _copies(shape, refs, refs.table, lo, hi)(jnp.int32(0), jnp.int32(0), start=True)

        @pl.when(chunks == 0)
        def _() -> None:
            fetch_next_item(jnp.int32(0))

    @pl.when((item == 0) | (refs.field(before, BLOCK) != block))
    def _() -> None:
        _open(refs, maths)

    copies = _copies(shape, refs, refs.table, lo, hi)

    def turn(chunk: Array, slot: Array) -> Array:
        @pl.when(chunk + 1 < chunks)
        def _() -> None:
            copies(chunk + 1, 1 - slot, start=True)

        @pl.when(chunk + 1 == chunks)
        def _() -> None:
            fetch_next_item(1 - slot)

        copies(chunk, slot, start=False)
        position = (shape.page_of(lo) + chunk * shape.chunk_pages) * shape.page_size
        _clear_unseen(shape, refs, slot, position, lo, hi)
        _fold(shape, maths, refs, item, slot, position)
        return 1 - slot

    refs.slot[0] = lax.fori_loop(0, chunks, turn, refs.slot[0])

    @pl.when((item == pl.num_programs(0) - 1) | (refs.field(after, BLOCK) != block))
    def _() -> None:
        _close(shape, refs)


def _chunks(shape: Shape, lo: Array, hi: Array) -> Array:
    """Turns over the pages that hold keys [lo, hi)."""
    pages = shape.pages_below(hi) - shape.page_of(lo)
    return jnp.where(lo < hi, (pages + shape.chunk_pages - 1) >> log2(shape.chunk_pages), 0)


def _copies(shape: Shape, refs: Refs, table: Any, lo: Array, hi: Array) -> Callable[..., None]:
    """Starts or awaits the copies of a chunk of keys [lo, hi): only pages that hold some."""

    def go(chunk: Array, slot: Array, *, start: bool) -> None:
        first = shape.page_of(lo) + chunk * shape.chunk_pages
        count = jnp.minimum(shape.pages_below(hi) - first, shape.chunk_pages)

        def one(page: Array, carry: None) -> None:
            source = refs.pages.at[table[0, 0, first + page]]
            copy = pltpu.make_async_copy(source, refs.buffer.at[slot, page], refs.arrived.at[slot])
            if start:
                copy.start()
            else:
                copy.wait()

        lax.fori_loop(0, count, one, None)

    return go


def _clear_unseen(shape: Shape, refs: Refs, slot: Array, position: Array, lo: Array, hi: Array) -> None:
    """Zero in the buffer what is not a key in [lo, hi): a weight of 0 times a stale NaN were NaN."""
    packing = PACKING[shape.layout.dtype]

    def one(page: Array, carry: None) -> None:
        start = position + page * shape.page_size

        @pl.when((start < lo) | (start + shape.page_size > hi))
        def _() -> None:
            words = pltpu.bitcast(refs.buffer[slot, page], jnp.int32)  # a word holds `packing` tokens of a lane
            token = start + packing * lax.broadcasted_iota(jnp.int32, words.shape, 0)
            keep = jnp.zeros_like(words)
            for i in range(packing):
                bits = (2 ** (32 // packing) - 1) << (i * 32 // packing)
                bits = bits - 2**32 if bits >= 2**31 else bits
                keep |= jnp.where((token + i >= lo) & (token + i < hi), jnp.int32(bits), jnp.int32(0))
            refs.buffer[slot, page] = pltpu.bitcast(words & keep, refs.buffer.dtype)

    @pl.when((position < lo) | (position + shape.chunk > hi))
    def _() -> None:
        lax.fori_loop(0, shape.chunk_pages, one, None)


def _fold(shape: Shape, maths: Maths, refs: Refs, item: Array, slot: Array, position: Array) -> None:
    """Fold the chunk in `slot`, whose first key has the number `position`, into the block's softmax."""
    row = lax.broadcasted_iota(jnp.int32, (shape.rows, 1), 0)
    token = row & (shape.block_tokens - 1)
    mine = (token >= refs.field(item, FIRST)) & (token < refs.field(item, LAST))
    after = refs.field(item, POSITION) + token + 1
    key = position + lax.broadcasted_iota(jnp.int32, (shape.rows, shape.chunk), 1)
    seen = key < jnp.where(mine, shape.keys_before(after, refs.part[0]), 0)
    if maths.window is not None:
        seen &= key >= shape.keys_before(after - maths.window, refs.part[0])
    exponents = _exponents(shape, refs, slot) if shape.layout.quantized else None

    def first_row(head: int, band: int) -> int:
        return (head - band * shape.band_heads) * shape.head_rows

    def of_head(values: Array, head: int, band: int) -> Array:
        """`values` [rows, ...] where they are `head`'s, else zero."""
        if shape.band_heads == 1:
            return values
        start = first_row(head, band)
        return jnp.where((row >= start) & (row < start + shape.head_rows), values, jnp.zeros_like(values))

    def scales(band: int, value: int) -> Array:
        """Powers of two of the band's keys (0) or values (1), float32 [1 or rows, chunk]."""
        if shape.layout.latent:  # the value's
            return _power_of_two(exponents, 0)
        result = _power_of_two(exponents, 2 * shape.heads(band)[0] + value)
        for head in shape.heads(band)[1:]:
            power = _power_of_two(exponents, 2 * head + value)
            result = jnp.where(row >= first_row(head, band), power, result)
        return result

    for band in range(shape.bands):
        q = refs.q[0, band]
        if shape.layout.latent:
            scores = _latent_scores(shape, q, _lanes(shape, refs, slot, 0, 0, q.dtype), exponents)
        else:
            scores = jnp.zeros((shape.rows, shape.chunk), jnp.float32)
            for head in shape.heads(band):
                scores += _product(of_head(q, head, band), _lanes(shape, refs, slot, head, 0, q.dtype), 1)
        scores = scores * maths.scale
        if exponents is not None and not shape.layout.latent:
            scores = scores * scales(band, 0)
        if maths.softcap is not None:
            scores = maths.softcap * jnp.tanh(scores / maths.softcap)
        scores = jnp.where(seen, scores, HIDDEN)
        top = refs.top[band][:, :1]
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        shrink = jnp.exp(top - new_top)
        total = refs.total[band][:, :1] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        if exponents is not None:
            weights = weights * scales(band, 1)
        values = refs.values[band] * shrink
        for head in shape.heads(band):
            w = of_head(weights, head, band).astype(q.dtype)
            values += _product(w, _lanes(shape, refs, slot, head, 1, q.dtype), 0)
        # Another prompt's NaN must not reach the rows that it shares a block with.
        refs.values[band] = jnp.where(mine, values, refs.values[band])
        refs.top[band] = jnp.broadcast_to(new_top, (shape.rows, LANES))
        refs.total[band] = jnp.broadcast_to(total, (shape.rows, LANES))


def _lanes(shape: Shape, refs: Refs, slot: Array, head: int, value: int, dtype: Any) -> Array:
    """A head's keys (0) or values (1) of the chunk, [chunk, lanes]; both where they share a tile or lanes."""
    width, lanes = shape.layout.head_width, shape.value_lanes if value else shape.lanes
    start = 2 * head * width + (0 if shape.shared_tile or shape.layout.latent else value * width)
    stored = refs.buffer[slot, :, :, start : start + lanes].reshape(shape.chunk, lanes)
    return stored.astype(jnp.float32).astype(dtype) if shape.layout.quantized else stored


def _latent_scores(shape: Shape, q: Array, keys: Array, exponents: Array | None) -> Array:
    """q.k of latents, float32 [rows, chunk]; quantized, each part counts by its own power of two."""
    if exponents is None:
        return _product(q, keys, 1)
    cut = shape.value_lanes
    value, rest = (_product(q[:, lanes], keys[:, lanes], 1) for lanes in (slice(cut), slice(cut, None)))
    return value * _power_of_two(exponents, 0) + rest * _power_of_two(exponents, 1)


def _exponents(shape: Shape, refs: Refs, slot: Array) -> Array:
    """The chunk's exponents, float32 [exponents, chunk]: transposed by an exact product with one-hots."""
    layout = shape.layout
    stored = refs.buffer[slot, :, :, layout.tail :].reshape(shape.chunk, layout.exponent_width)
    if layout.dtype != "int8":
        stored = pltpu.bitcast(stored, jnp.int8)
    one_hot = (-(-layout.exponents // 16) * 16, layout.exponent_width)
    eye = lax.broadcasted_iota(jnp.int32, one_hot, 0) == lax.broadcasted_iota(jnp.int32, one_hot, 1)
    eye = jnp.where(eye, 1.0, 0.0).astype(jnp.bfloat16)
    return _product(eye, stored.astype(jnp.float32).astype(jnp.bfloat16), 1)


def _power_of_two(exponents: Array | None, vector: int) -> Array:
    """float32 [1, chunk] of 2**e of one vector's exponents."""
    if exponents is None:
        raise ValueError("exponents exist only in quantized pages")
    whole = exponents[vector : vector + 1].astype(jnp.int32)
    return lax.bitcast_convert_type((whole + 127) << 23, jnp.float32)


def _product(x: Array, y: Array, contract: int) -> Array:
    """float32 x @ y.T (contract 1) or x @ y (0); float32 operands keep their precision."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _open(refs: Refs, maths: Maths) -> None:
    """The state before any key; a sink is a score already counted, without a value."""
    refs.values[...] = jnp.zeros_like(refs.values)
    if maths.sinks:
        refs.top[...] = jnp.broadcast_to(refs.sinks[...], refs.top.shape)
        refs.total[...] = jnp.ones_like(refs.total)
    else:
        refs.top[...] = jnp.full_like(refs.top, LOWEST)
        refs.total[...] = jnp.zeros_like(refs.total)


def _close(shape: Shape, refs: Refs) -> None:
    for band in range(shape.bands):
        total = refs.total[band][:, :1]
        divisor = jnp.where(total == 0.0, 1.0, total)
        refs.out[0, band] = (refs.values[band] / divisor).astype(refs.out.dtype)
        if refs.lse is not None:
            lse = jnp.where(total == 0.0, LOWEST, refs.top[band][:, :1] + jnp.log(divisor))
            refs.lse[0, band] = jnp.broadcast_to(lse, (shape.rows, LANES))


def _vmem_limit(shape: Shape, maths: Maths, target: Target) -> int:
    """Bytes that the compiler may use: twice what the call names and 16 MiB of temporaries, at most 7/8 of it all."""
    most = target.facts.scratch_bytes if target.facts is not None else 64 << 20
    return min(2 * shape.vmem_bytes(maths.sinks) + (16 << 20), most * 7 // 8)
