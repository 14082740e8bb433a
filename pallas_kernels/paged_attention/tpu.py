"""Paged attention on TPUs: decode rows and ragged prompt chunks laid out for one Mosaic kernel.

The kernel's grid walks items: a block of queries times one row's keys. Decode has an item a row;
in prefill the prompts that share a block of the token axis are consecutive items of it.
The matrix unit wants many rows: query heads of several KV heads are stacked in a band, zero where
another head's keys are multiplied. A head of 64 lanes shares its tile with its value: the query
is padded with zeros, and the result is the upper half. A latent (MLA) is key and value at once: all
query heads are one band, and the second product reads the first lanes of the same buffer.

After Flash Attention (arXiv 2205.14135) and JAX's `ragged_paged_attention` (Apache-2.0); how it
differs from the latter is in docs/kernels/paged_attention_tpu.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.choice import not_on
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.paged_attention.part import Part
from pallas_kernels.paged_attention.tpu_kernel import attend
from pallas_kernels.paged_attention.tpu_shape import (
    FIELDS,
    HI,
    LANES,
    LO,
    PACKING,
    Maths,
    Shape,
    Sizes,
    shape_for,
    up,
)
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import AttentionSpec

SMEM_BYTES = 1 << 20
SMEM_FREE = 128 << 10  # left to the compiler


def declines(spec: AttentionSpec, target: Target) -> str | None:
    """Why this kernel does not serve a call; None: it does."""
    reason = not_on("tpu", target)
    if reason is not None or target.facts is None:
        return reason
    layout = spec.layout
    if spec.dtype not in ("float32", "bfloat16"):
        return f"queries are {spec.dtype}, not float32 or bfloat16"
    if layout.value_dim is not None and (layout.value_dim % LANES or layout.head_width % LANES):
        return f"latents of {layout.head_width} lanes, {layout.value_dim} of them the value: not multiples of {LANES}"
    if layout.head_width % 64:
        return f"head_width {layout.head_width} is not a multiple of 64"
    if layout.quantized and layout.exponent_width % LANES:
        return f"exponent_width {layout.exponent_width} is not a multiple of {LANES}"
    tile = 8 * PACKING[layout.dtype]
    if spec.page_size % tile or spec.page_size & (spec.page_size - 1):
        return f"page_size {spec.page_size} is not a power of two of at least {tile} ({layout.dtype} tiles)"
    if spec.parts & (spec.parts - 1):
        return f"pages are spread over {spec.parts} devices, which is not a power of two"
    if smem_bytes(spec, target) > SMEM_BYTES - SMEM_FREE:
        return f"{smem_bytes(spec, target)} bytes of SMEM for {spec.rows} rows of {spec.pages_per_seq} pages"
    if scratch_bytes(spec, target) > target.facts.scratch_bytes // 2:
        return f"{scratch_bytes(spec, target)} bytes of VMEM, more than half of {target.facts.scratch_bytes}"
    return None


def scratch_bytes(spec: AttentionSpec, target: Target) -> int:
    """VMEM that a call names: page buffers, blocks of q and result (twice), softmax state, sinks."""
    shape = shape_for(_sizes(spec), target)
    return shape.vmem_bytes(spec.sinks)


def smem_bytes(spec: AttentionSpec, target: Target) -> int:
    """SMEM of the items, and of two rows of the block table, both double-buffered."""
    items = spec.rows
    if spec.kind == "prefill":
        items += -(-spec.tokens // shape_for(_sizes(spec), target).block_tokens)
    return 4 * (up(items * FIELDS, 1024) + 4 * up(spec.pages_per_seq, 1024))


def padded_bytes(spec: AttentionSpec, target: Target) -> int:
    """HBM of the queries laid out in blocks; the result takes as much."""
    shape = shape_for(_sizes(spec), target)
    blocks = -(-spec.tokens // shape.block_tokens)
    return blocks * shape.bands * shape.rows * shape.lanes * jnp.dtype(spec.dtype).itemsize


def _sizes(spec: AttentionSpec) -> Sizes:
    sizes = (spec.tokens, spec.q_heads, spec.page_size, spec.pages_per_seq)
    return Sizes(spec.kind, *sizes, spec.dtype, spec.layout, spec.parts)


def decode(q: Array, kv_pages: Array, block_tables: Array, kv_lens: Array, **how: Any) -> Array:
    """One query a row. See `api.decode_attention`."""
    return _decode(q, kv_pages, block_tables, kv_lens, None, **how)[0]


def decode_part(
    q: Array, kv_pages: Array, block_tables: Array, kv_lens: Array, part: Part, **how: Any
) -> tuple[Array, Array]:
    """See `api.decode_part`."""
    values, lse = _decode(q, kv_pages, block_tables, kv_lens, part, **how)
    return values, lse[..., 0]


def _decode(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    kv_lens: Array,
    part: Part | None,
    *,
    layout: KVLayout,
    target: Target,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
) -> list[Array]:
    """Values, and of a part log-sum-exps, each [rows, q_heads, ...]."""
    rows, q_heads, head_dim = q.shape
    count, index = (part.count, part.index) if part else (1, jnp.int32(0))
    sizes = Sizes("decode", rows, q_heads, kv_pages.shape[1], block_tables.shape[1], str(q.dtype), layout, count)
    shape = shape_for(sizes, target)
    row, zero = jnp.arange(rows, dtype=jnp.int32), jnp.zeros_like(kv_lens)
    first = jnp.maximum(kv_lens - window, 0) if window else zero
    keys = (shape.keys_before(first, index), shape.keys_before(kv_lens, index))
    items = _items(row, row, *keys, kv_lens - 1, zero, jnp.minimum(kv_lens, 1))
    heads = jnp.pad(q, ((0, 0), (0, shape.bands * shape.band_heads * shape.group - q_heads), (0, 0)))
    bands = heads.reshape(rows, shape.bands, shape.band_heads * shape.group, head_dim)
    padding = (0, shape.rows - bands.shape[2])
    bands = jnp.pad(bands, ((0, 0), (0, 0), padding, (0, shape.lanes - head_dim)))
    if sinks is not None:
        sinks = jnp.pad(sinks.astype(jnp.float32), (0, heads.shape[1] - q_heads))
        sinks = jnp.pad(sinks.reshape(shape.bands, -1, 1), ((0, 0), padding, (0, 0)))
    maths = Maths(scale, softcap, window, sinks is not None)
    out = attend(items, block_tables, bands, kv_pages, sinks, index, shape, maths, target)

    def of_heads(x: Array) -> Array:
        x = x[:, :, : shape.band_heads * shape.group]
        return x.reshape(rows, -1, x.shape[-1])[:, :q_heads]

    return [of_heads(out[0][..., _value_lanes(shape)]), *map(of_heads, out[1:])]


def prefill(
    q: Array, kv_pages: Array, block_tables: Array, q_starts: Array, q_lens: Array, positions: Array, **how: Any
) -> Array:
    """Ragged prompt chunks on one token axis. See `api.prefill_attention`."""
    return _prefill(q, kv_pages, block_tables, q_starts, q_lens, positions, None, **how)[0]


def prefill_part(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    part: Part,
    **how: Any,
) -> tuple[Array, Array]:
    """See `api.prefill_part`."""
    values, lse = _prefill(q, kv_pages, block_tables, q_starts, q_lens, positions, part, **how)
    return values, lse[..., 0]


def _prefill(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    part: Part | None,
    *,
    layout: KVLayout,
    target: Target,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
) -> list[Array]:
    """Values, and of a part log-sum-exps, each [tokens, q_heads, ...]."""
    tokens, q_heads, head_dim = q.shape
    count, index = (part.count, part.index) if part else (1, jnp.int32(0))
    sizes = Sizes("prefill", tokens, q_heads, kv_pages.shape[1], block_tables.shape[1], str(q.dtype), layout, count)
    shape = shape_for(sizes, target)
    block, group = shape.block_tokens, shape.group
    blocks = -(-tokens // block)
    here = partial(shape.keys_before, index=index)
    items = prefill_items(q_starts, q_lens, positions, blocks, block, window, here)
    padded = jnp.pad(q, ((0, blocks * block - tokens), (0, 0), (0, shape.lanes - head_dim)))
    bands = padded.reshape(blocks, block, layout.kv_heads, group, shape.lanes)
    bands = jnp.transpose(bands, (0, 2, 3, 1, 4)).reshape(blocks, layout.kv_heads, shape.rows, shape.lanes)
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32), block).reshape(layout.kv_heads, shape.rows, 1)
    maths = Maths(scale, softcap, window, sinks is not None)
    out = attend(items, block_tables, bands, kv_pages, sinks, index, shape, maths, target)

    def of_tokens(x: Array) -> Array:
        x = x.reshape(blocks, layout.kv_heads, group, block, -1)
        return jnp.transpose(x, (0, 3, 1, 2, 4)).reshape(blocks * block, q_heads, -1)[:tokens]

    return [of_tokens(out[0][..., _value_lanes(shape)]), *map(of_tokens, out[1:])]


def prefill_items(
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    blocks: int,
    block: int,
    window: int | None,
    keys_before: Callable[[Array], Array] = lambda position: position,
) -> Array:
    """Items of `blocks` blocks of `block` tokens: each row that has tokens in a block, or one item without keys.

    keys_before: how many of the positions below one are in these pages.
    """
    rows = q_starts.shape[0]
    active, ends = (q_lens > 0)[None], (q_starts + q_lens)[None]
    start = block * jnp.arange(blocks, dtype=jnp.int32)[:, None]
    first_row = jnp.sum(active & (ends <= start), axis=1, dtype=jnp.int32)
    count = jnp.sum(active & (q_starts[None] < start + block), axis=1, dtype=jnp.int32) - first_row
    items_before = jnp.cumsum(jnp.maximum(count, 1)) - jnp.maximum(count, 1)
    index = jnp.arange(blocks + rows, dtype=jnp.int32)
    of_block = jnp.sum(items_before[None] <= index[:, None], axis=1, dtype=jnp.int32) - 1
    nth = index - items_before[of_block]
    row = jnp.minimum(first_row[of_block] + nth, rows - 1)
    used = nth < count[of_block]
    offset = q_starts[row] - block * of_block  # of the row's first token in the block; negative if before it
    first, last = jnp.maximum(offset, 0), jnp.minimum(offset + q_lens[row], block)
    position = positions[row] - offset
    lo = jnp.maximum(position + first - window + 1, 0) if window else jnp.zeros_like(position)
    hi = jnp.where(used, position + last, 0)
    return _items(of_block, row, keys_before(lo), keys_before(hi), position, first, jnp.where(used, last, 0))


def _items(*columns: Array) -> Array:
    """int32 [items * FIELDS] from the columns before NEXT, each [items]; NEXT is the next item that has keys."""
    items = columns[0].shape[0]
    index = jnp.where(columns[LO] < columns[HI], jnp.arange(items, dtype=jnp.int32), items)
    following = lax.cummin(index, reverse=True)[1:]
    following = jnp.concatenate([following, jnp.full((1,), items, jnp.int32)])
    return jnp.stack([*columns, following], axis=1).astype(jnp.int32).reshape(-1)


def _value_lanes(shape: Shape) -> slice:
    start = shape.layout.head_width if shape.shared_tile else 0
    return slice(start, start + shape.layout.result_dim)
