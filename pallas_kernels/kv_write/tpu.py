"""Rows into pages on TPUs (Mosaic): tiles are read, patched in VMEM and written back, in place.

A copy may not split a tile of 8, 16 or 32 rows (float32, bfloat16, 8 bits), and a decode row
touches one row of one. So tokens are grouped in runs that share a tile: a prompt's chunk fills
whole tiles, which are not read first. A ring of copies is in flight while the next runs are patched.
XLA's own scatter is in place for float32 and bfloat16 and makes a second pool of 8-bit pages.

Tokens of the trash page (0) are not written at all: nobody reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.choice import not_on
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.kv_write.api import WriteSpec

LANES, WORDS = 128, 8  # of a tile of 32 bit words
TRASH_PAGE = 0
INTEGER = {4: jnp.int32, 2: jnp.int16, 1: jnp.int8}
SMEM_BYTES = 512 << 10  # of the runs, half of what a core has
FIELDS = 5  # of a run: page, first row of the tile in it, first row in the tile, first token, tokens
PAGE, TILE, ROW, TOKEN, COUNT = range(FIELDS)
# With its default size all copies share one place of the race detector's clock, which hides races between them.
INTERPRETER = pltpu.InterpretParams(detect_races=True, vector_clock_size=64)


@dataclass(frozen=True)
class Shape:
    """Static sizes of a call."""

    tokens: int  # of a block
    width: int
    dtype: Any
    slots: int  # tiles in flight

    @property
    def packing(self) -> int:
        """Rows that a 32 bit word of a lane holds."""
        return 4 // self.dtype.itemsize

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return WORDS * self.packing

    @property
    def bytes(self) -> int:
        """VMEM that a call names: two blocks of tokens, one of them widened to words, tiles in flight."""
        words = 4 * (self.tokens + 2 * self.tile) * self.width
        return words + (2 * self.tokens + self.slots * self.tile) * self.width * self.dtype.itemsize


def shape_for(tokens: int, width: int, dtype: Any) -> Shape:
    """The computed choice: up to 128 tokens a block while their words fit 4 MiB, up to 32 tiles and 4 MiB in flight."""
    dtype = jnp.dtype(dtype)
    tile = WORDS * 4 // dtype.itemsize
    block = max(tile, min(128, _power_below((4 << 20) // (4 * width)), _power_below(2 * tokens - 1)))
    slots = max(2, min(32, block, (4 << 20) // (tile * width * dtype.itemsize)))
    return Shape(block, width, dtype, slots)


def scratch_bytes(spec: WriteSpec, target: Target) -> int:
    """VMEM that a call names."""
    return shape_for(spec.tokens, spec.layout.width, spec.layout.dtype).bytes


def declines(spec: WriteSpec, target: Target) -> str | None:
    """Why this kernel does not serve a call; None: it does."""
    reason = not_on("tpu", target)
    if reason is not None or target.facts is None:
        return reason
    shape = shape_for(spec.tokens, spec.layout.width, spec.layout.dtype)
    if spec.layout.width % LANES:
        return f"rows of {spec.layout.width} are not a multiple of {LANES} lanes"
    if spec.page_size % shape.tile:
        return f"page_size {spec.page_size} is not a multiple of {shape.tile} ({spec.layout.dtype} tiles)"
    if 4 * FIELDS * spec.tokens > SMEM_BYTES:
        return f"{spec.tokens} tokens take {4 * FIELDS * spec.tokens} bytes of SMEM, more than {SMEM_BYTES}"
    if shape.bytes > target.facts.scratch_bytes // 2:
        return f"{shape.bytes} bytes of VMEM, more than half of {target.facts.scratch_bytes}"
    return None


def write_rows(kv_pages: Array, rows: Array, page_ids: Array, offsets: Array, *, target: Target) -> Array:
    """kv_pages [pages, page_size, width] with rows [tokens, width] of the same dtype at (page_ids, offsets)."""
    shape = shape_for(rows.shape[0], rows.shape[1], rows.dtype)
    padding = (0, -rows.shape[0] % shape.tokens)
    # As integers: XLA quiets NaNs where it pads, and a float8 row ends in exponents, which may look like one.
    rows = jnp.pad(lax.bitcast_convert_type(rows, INTEGER[shape.dtype.itemsize]), (padding, (0, 0)))
    page_ids, offsets = (jnp.pad(a, padding).reshape(-1, shape.tokens) for a in (page_ids, offsets))
    counts, runs = _runs(page_ids, offsets, shape.tile)
    call = pl.pallas_call(
        partial(_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(page_ids.shape[0],),
            in_specs=[
                pl.BlockSpec((shape.tokens, shape.width), lambda block, *_: (block, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((shape.width // LANES, shape.tokens + 2 * shape.tile, LANES), jnp.int32),
                pltpu.VMEM((shape.slots, shape.tile, shape.width), shape.dtype),
                pltpu.SemaphoreType.DMA((2, shape.slots)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=2 * shape.bytes + (8 << 20)
        ),
        interpret=INTERPRETER if target.interpret else False,
        name="kv_write",
    )
    return call(counts, runs, rows, kv_pages)


def _runs(page_ids: Array, offsets: Array, tile: int) -> tuple[Array, Array]:
    """Runs of neighbouring tokens that write neighbouring rows of one tile, from int32 [blocks, tokens].

    Returns int32 [2 * blocks], of each block the runs and how many of them stand alone in their
    tile; int32 [blocks * tokens * FIELDS], those first: the others must wait for each other.
    """
    blocks, tokens = page_ids.shape
    index = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None], page_ids.shape)
    row = offsets & (tile - 1)
    top = offsets - row
    follows = (page_ids[:, 1:] == page_ids[:, :-1]) & (offsets[:, 1:] == offsets[:, :-1] + 1) & (row[:, 1:] != 0)
    edge = jnp.zeros((blocks, 1), bool)
    starts = (page_ids != TRASH_PAGE) & ~jnp.concatenate([edge, follows], axis=1)
    same_tile = (page_ids[:, :, None] == page_ids[:, None]) & (top[:, :, None] == top[:, None])
    shared = starts & jnp.any(same_tile & starts[:, None] & (index[:, None] < index[:, :, None]), axis=2)
    alone = starts & ~shared
    num_alone = jnp.sum(alone, axis=1, keepdims=True, dtype=jnp.int32)
    place = jnp.where(alone, jnp.cumsum(alone, axis=1), num_alone + jnp.cumsum(shared, axis=1)) - 1
    ends = ~jnp.concatenate([follows, edge], axis=1)
    last = lax.cummin(jnp.where(ends, index, tokens), axis=1, reverse=True)
    fields = jnp.stack([page_ids, top, row, index, last - index + 1], axis=2)
    chosen = starts[:, :, None] & (place[:, :, None] == index[:, None])  # [blocks, token, place in the list]
    listed = jnp.sum(jnp.where(chosen[..., None], fields[:, :, None], 0), axis=1, dtype=jnp.int32)
    counts = jnp.concatenate([jnp.sum(starts, axis=1, keepdims=True, dtype=jnp.int32), num_alone], axis=1)
    return counts.reshape(-1), listed.reshape(-1)


class Refs(NamedTuple):
    counts: Any  # SMEM int32 [2 * blocks]: runs, and how many of them are first in their tile
    runs: Any  # SMEM int32 [blocks * tokens * FIELDS]
    rows: Any  # VMEM [tokens, width], the bits as integers
    before: Any  # HBM: the pages, the same memory as `pages`
    pages: Any  # HBM [pages, page_size, width]
    words: Any  # VMEM int32 [width / LANES, tile + tokens + tile, LANES], rows widened; nobody sees the margins
    tiles: Any  # VMEM [slots, tile, width]
    copied: Any  # DMA semaphores [2 (in, out), slots]


def _kernel(shape: Shape, *operands: Any) -> None:
    """One block of tokens."""
    refs = Refs(*operands)
    block = pl.program_id(0)
    runs, first = refs.counts[2 * block], refs.counts[2 * block + 1]
    for column in range(shape.width // LANES):
        rows = refs.rows[:, column * LANES : (column + 1) * LANES]
        refs.words[column, shape.tile : shape.tile + shape.tokens, :] = rows.astype(jnp.int32)

    def field(run: Array, name: int) -> Array:
        return refs.runs[(block * shape.tokens + run) * FIELDS + name]

    def copy(run: Array, slot: Array | int, out: bool) -> Any:
        start = pl.multiple_of(field(run, TILE), shape.tile)
        page = refs.pages.at[field(run, PAGE), pl.ds(start, shape.tile), :]
        tile, semaphore = refs.tiles.at[slot], refs.copied.at[int(out), slot]
        return pltpu.make_async_copy(tile, page, semaphore) if out else pltpu.make_async_copy(page, tile, semaphore)

    def patch(run: Array, slot: Array | int) -> None:
        row, count = field(run, ROW), field(run, COUNT)
        _patch(shape, refs, slot, row, row + count, field(run, TOKEN) - row)

    ahead = shape.slots // 2

    def turn(i: Array, carry: None) -> None:
        slot = lax.rem(i, shape.slots)

        @pl.when((i < first) & (i >= shape.slots))
        def _() -> None:
            copy(i - shape.slots, slot, True).wait()

        @pl.when((i < first) & (field(jnp.minimum(i, shape.tokens - 1), COUNT) < shape.tile))
        def _() -> None:
            copy(i, slot, False).start()

        @pl.when(i >= ahead)
        def _() -> None:
            run = i - ahead
            slot = lax.rem(run, shape.slots)

            @pl.when(field(run, COUNT) < shape.tile)
            def _() -> None:
                copy(run, slot, False).wait()

            patch(run, slot)
            copy(run, slot, True).start()

    def drain(i: Array, carry: None) -> None:
        copy(i, lax.rem(i, shape.slots), True).wait()

    def one_by_one(run: Array, carry: None) -> None:
        for out in (False, True):
            copy(run, 0, out).start()
            copy(run, 0, out).wait()
            if not out:
                patch(run, 0)

    lax.fori_loop(0, jnp.where(first > 0, first + ahead, 0), turn, None)
    lax.fori_loop(jnp.maximum(first - shape.slots, 0), first, drain, None)
    lax.fori_loop(first, runs, one_by_one, None)


def _patch(shape: Shape, refs: Refs, slot: Array | int, start: Array, end: Array, token: Array) -> None:
    """Rows [start, end) of the tile in `slot` from the block's tokens; row 0 would be `token`, even if negative."""
    line = lax.broadcasted_iota(jnp.int32, (WORDS, LANES), 0)
    bits = 32 // shape.packing
    masks = []
    for i in range(shape.packing):
        row = line * shape.packing + i
        mask = jnp.int32(_signed(((1 << bits) - 1) << (i * bits)))
        masks.append(jnp.where((row >= start) & (row < end), mask, jnp.int32(0)))
    for column in range(shape.width // LANES):
        lanes = slice(column * LANES, (column + 1) * LANES)
        words = pltpu.bitcast(refs.tiles[slot, :, lanes], jnp.int32)
        for i, mask in enumerate(masks):
            new = refs.words[column, pl.ds(shape.tile + token + i, WORDS, stride=shape.packing), :]
            words = (words & ~mask) | ((new << (i * bits)) & mask)
        refs.tiles[slot, :, lanes] = pltpu.bitcast(words, shape.dtype)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _power_below(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)
