"""Paged attention on Hopper: what is served, block sizes, the schedule of work, and the final combine.

The kernel is `gpu_kernel.attend`. Around it stand cheap gathers of the queries and results, which XLA
fuses with its neighbours: a tile that belongs to one unit of work needs no masked loads or stores.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array

from pallas_kernels.hopper import not_on_hopper
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.paged_attention.gpu_kernel import FIELDS, LOG2_E, WARPGROUP_ROWS, Tile, attend
from pallas_kernels.target import Chip, Target
from pallas_kernels.tuning import lookup

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import AttentionSpec

SPLIT_BLOCKS = 4  # key blocks that are worth a split of their own
MAX_SPLITS = 64
FULL_ENOUGH = 0.85  # share of the cores busy, averaged over the waves of units, that ends the search for splits


def declines(spec: AttentionSpec, target: Target) -> str | None:
    """Why these shapes are not served on this chip."""
    layout, chip = spec.layout, target.facts
    if (reason := not_on_hopper(target)) is not None or chip is None:
        return reason
    if spec.dtype != "bfloat16":
        return f"q is {spec.dtype}: wgmma keeps 10 bits of a float32's mantissa"
    if layout.value_dim is not None:
        if layout.quantized:
            return f"latent pages of head_dim {layout.head_dim}, {layout.dtype}: only bfloat16"
        if layout.head_width % 64 or layout.value_dim % 128 or layout.value_dim > 512:
            return f"latents of {layout.head_width} lanes, {layout.value_dim} the value: not multiples of 64 and 128"
    elif layout.head_width % 64 or layout.head_width > 256:
        return f"head_width {layout.head_width} is not a multiple of 64 up to 256"
    tile = _tile_of(spec, target)
    if spec.page_size % 8 or max(spec.page_size, tile.block_kv) % min(spec.page_size, tile.block_kv):
        return f"page_size {spec.page_size} is not a power of two from 8 on"
    if tile.scratch_bytes() > chip.scratch_bytes:
        return f"needs {tile.scratch_bytes()} bytes of shared memory, a block has {chip.scratch_bytes}"
    return None


def scratch_bytes(spec: AttentionSpec, target: Target) -> int:
    """Shared memory that a block of the kernel asks for."""
    return _tile_of(spec, target).scratch_bytes()


def _tile_of(spec: AttentionSpec, target: Target) -> Tile:
    """As on the chip: the interpreter's own buffer is not counted."""
    target = replace(target, interpret=False)
    options: dict[str, Any] = {"scale": 1.0, "softcap": spec.softcap, "window": spec.window, "sinks": spec.sinks}
    sizes = (spec.q_heads, spec.page_size, spec.layout, target)
    if spec.kind == "prefill" and not spec.layout.latent:
        return prefill_tile(*sizes, **options)
    context = spec.pages_per_seq * spec.page_size
    splits = _splits(spec.tokens, spec.rows, spec.q_heads, context, spec.layout, target, spec.window)
    return shared_tile(*sizes, splits, spec.kind, **options)


def shared_tile(
    q_heads: int,
    page_size: int,
    layout: KVLayout,
    target: Target,
    splits: int,
    kind: Literal["decode", "prefill"],
    *,
    sinks: bool,
    **options: Any,
) -> Tile:
    """Of decode, and of both forms over latents: blocks of 64 keys, as many stages as leave room for the queries and
    the float32 result.

    Two consumers hide each other's softmax; a head of 256 lanes leaves room for one. Latents need both.
    """
    latent = layout.latent
    subgroups, group = _subgroups(q_heads, layout, WARPGROUP_ROWS)
    tokens = 1 if kind == "decode" else WARPGROUP_ROWS // group
    tile = Tile(
        by_keys=not latent,
        consumers=1 if layout.head_width > 192 and not latent else 2,
        q_rows=-(-tokens * group // 8) * 8,
        tokens=tokens,
        group=group,
        block_kv=64,
        stages=2,
        page_size=page_size,
        kv_heads=layout.kv_heads,
        subgroups=subgroups,
        head_width=layout.head_width,
        dtype=layout.dtype,
        tail=layout.tail,
        blocks=_blocks(target),
        out_dtype="bfloat16" if latent else "float32",  # float32 of 64 x 512 has no room in shared memory
        sinks=False,  # counted when splits are combined
        lse=splits > 1 or sinks,
        value_dim=layout.value_dim,
        interpret=_interpret(target),
        **options,
    )
    return _sized(tile, kind, layout, target)


def prefill_tile(
    q_heads: int, page_size: int, layout: KVLayout, target: Target, *, sinks: bool, **options: Any
) -> Tile:
    """128 query rows a block; 128 keys a stage as in FlashAttention-3, 64 where registers are short."""
    subgroups, group = _subgroups(q_heads, layout, 2 * WARPGROUP_ROWS)
    block_kv = 128 if layout.head_width <= 128 else 64
    tile = Tile(
        by_keys=False,
        consumers=2,
        q_rows=2 * WARPGROUP_ROWS,
        tokens=2 * WARPGROUP_ROWS // group,
        group=group,
        block_kv=block_kv,
        stages=2,
        page_size=page_size,
        kv_heads=layout.kv_heads,
        subgroups=subgroups,
        head_width=layout.head_width,
        dtype=layout.dtype,
        tail=layout.tail,
        blocks=_blocks(target),
        out_dtype="bfloat16",
        sinks=sinks,
        lse=False,
        interpret=_interpret(target),
        **options,
    )
    return _sized(tile, "prefill", layout, target)


def _subgroups(q_heads: int, layout: KVLayout, most: int) -> tuple[int, int]:
    """Into how many groups the query heads of a KV head are cut, and how many heads each has: up to `most`."""
    heads = q_heads // layout.kv_heads
    count = -(-heads // most)
    return count, -(-heads // count)


def _sized(tile: Tile, kind: str, layout: KVLayout, target: Target) -> Tile:
    """As many stages as shared memory holds, up to what hides the latency; or what was measured to be best.

    Consumers that take turns at the ring need an even number.
    """
    key = f"{kind} {layout.dtype} head_width {layout.head_width} group {tile.group} page {tile.page_size}"
    if (tuned := lookup("paged_attention", target.chip, key)) is not None:
        return replace(tile, block_kv=tuned["block_kv"], stages=tuned["stages"])
    space = _chip(target).scratch_bytes
    choices = range(8, 1, -2) if kind == "decode" else range(4, 1, -1)
    sized = (replace(tile, stages=stages, interpret=False) for stages in choices)
    return replace(tile, stages=next((t.stages for t in sized if t.scratch_bytes() <= space), 2))


def _blocks(target: Target) -> int:
    return 2 if target.interpret else _chip(target).cores


def _chip(target: Target) -> Chip:
    if target.facts is None:
        raise ValueError(f"chip {target.chip!r} is not in pallas_kernels.target.CHIPS")
    return target.facts


def _interpret(target: Target) -> Any:
    """What the kernel is run with; where JAX has no interpreter, `declines` has said so."""
    return plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan") if target.interpret else False


def _splits(
    tokens: int, rows: int, q_heads: int, context: int, layout: KVLayout, target: Target, window: int | None
) -> int:
    """Into how many units the keys of a query tile are cut: the fewest that keep the cores busy, at most.

    Depends on shapes alone, as if all rows had as many tokens, and a tile's cuts on its own keys: no row depends on
    its neighbours.
    """
    cores = _chip(target).cores
    subgroups, group = _subgroups(q_heads, layout, WARPGROUP_ROWS)
    tiles = math.ceil(math.ceil(tokens / rows) / (WARPGROUP_ROWS // group))  # of a row
    units = rows * tiles * layout.kv_heads * subgroups
    keys = context if window is None else min(context, window + 64)
    most = max(1, min(MAX_SPLITS, -(-keys // 64) // SPLIT_BLOCKS))
    busy = [units * s / (-(-units * s // cores) * cores) for s in range(1, most + 1)]
    return next((s for s, share in enumerate(busy, 1) if share >= FULL_ENOUGH), busy.index(max(busy)) + 1)


def decode(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    kv_lens: Array,
    *,
    layout: KVLayout,
    target: Target,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
) -> Array:
    """One query a row, at position kv_lens - 1. See `api.decode_attention`."""
    rows, q_heads, _ = q.shape
    sizes, context = (q_heads, kv_pages.shape[1], layout, target), block_tables.shape[1] * kv_pages.shape[1]
    splits = _splits(rows, rows, q_heads, context, layout, target, window)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks is not None}
    tile = shared_tile(*sizes, splits, "decode", **options)
    schedule, works = _schedule(tile, splits, jnp.arange(rows, dtype=jnp.int32), kv_lens - 1, kv_lens)
    tiles = _head_groups(q, tile)  # [rows, head_groups, group, head_width]
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, tile.q_rows - tile.group), (0, 0)))
    found = attend(tile, schedule, block_tables, tiles.reshape(-1, tile.head_width), kv_pages, None)
    means = _results(tile, layout, *found, works, (slice(None),) * 3 + (0,), sinks)
    if not tile.lse:
        means = jnp.where(works[:, :1, None, None], means, 0.0)
    return _heads(means, q_heads, layout.kv_heads).astype(q.dtype)


def _schedule(tile: Tile, splits: int, row: Array, position: Array, high: Array) -> tuple[Array, Array]:
    """The items of query tiles: of a row of block tables, the first query at `position`, the last key before `high`
    (0: an idle tile), all int32 [tiles].

    Returns int32 [tiles * splits + 1, FIELDS], longest first, so that turns of the persistent grid even out, then the
    count of those with keys; and bool [tiles, splits]: which have.
    """
    low = jnp.maximum(position - tile.window + 1, 0) if tile.window else jnp.zeros_like(position)
    first, last = low // tile.block_kv, -(-high // tile.block_kv)
    share = jnp.maximum(-(-(last - first) // splits), SPLIT_BLOCKS)[:, None]
    start = first[:, None] + share * jnp.arange(splits, dtype=jnp.int32)[None, :]
    end = jnp.minimum(start + share, last[:, None])
    query = jnp.arange(row.shape[0], dtype=jnp.int32)
    query, row, position, low, high = (
        jnp.broadcast_to(a[:, None], start.shape) for a in (query, row, position, low, high)
    )
    out = jnp.arange(start.size, dtype=jnp.int32).reshape(start.shape)
    columns = (out, query, row, start, end, position, low, high)
    items = jnp.stack([column.reshape(-1) for column in columns], axis=1).astype(jnp.int32)
    length = jnp.maximum(end - start, 0).reshape(-1)
    count = jnp.zeros((1, len(FIELDS)), jnp.int32).at[0, 0].set(jnp.sum(length > 0, dtype=jnp.int32))
    return jnp.concatenate([items[jnp.argsort(-length, stable=True)], count]), end > start


def _results(
    tile: Tile, layout: KVLayout, out: Array, lse: Array | None, works: Array, at: tuple[Any, ...], sinks: Array | None
) -> Array:
    """[tokens, head_groups, group, result_dim], splits and sinks combined: of the tokens that `at` picks from [tiles,
    splits, head_groups, tokens of a tile]. Without `lse` that of idle tiles is undefined, and may be NaN.
    """
    rows, shape = tile.tokens * tile.group, (*works.shape, tile.head_groups)
    each = (*shape, tile.tokens, tile.group)
    means = out.reshape(*shape, tile.q_rows, -1)[..., :rows, : layout.result_dim].reshape(*each, -1)[at]
    if lse is None:
        return means[:, 0]
    lse = lse.reshape(*shape, WARPGROUP_ROWS)[..., :rows].reshape(each)
    seen = jnp.broadcast_to(works[:, :, None, None, None], each)
    if tile.tokens > 1:  # a split may lie behind a tile's first tokens
        seen &= lse > -jnp.inf
    means = jnp.where(seen[at][..., None], means, 0.0)
    sink = None if sinks is None else _head_groups(sinks[None, :, None], tile)[..., 0] * LOG2_E
    return _combined(means, jnp.where(seen, lse, -jnp.inf)[at], sink)


def _combined(means: Array, sums: Array, sink: Array | None) -> Array:
    """The mean over splits (axis 1) weighted by 2**sums, a sink counted beside them."""
    top = jnp.max(sums, axis=1, keepdims=True)
    if sink is not None:
        top = jnp.maximum(top, sink[:, None])
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp2(sums - top)
    total = jnp.sum(weights, axis=1)
    if sink is not None:
        total = total + jnp.exp2(sink - top[:, 0])
    total = jnp.where(total > 0, total, 1.0)
    return jnp.sum(means.astype(jnp.float32) * weights[..., None], axis=1) / total[..., None]


def _head_groups(x: Array, tile: Tile) -> Array:
    """[n, head_groups, group, head_width] of [n, q_heads, head_dim]; what is padded is zero."""
    n, q_heads, head_dim = x.shape
    group = q_heads // tile.kv_heads
    x = x.reshape(n, tile.kv_heads, group, head_dim)
    short, lanes = tile.subgroups * tile.group - group, tile.head_width - head_dim if head_dim > 1 else 0
    x = jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, lanes)))
    return x.reshape(n, tile.head_groups, tile.group, -1)


def _heads(x: Array, q_heads: int, kv_heads: int) -> Array:
    """[n, q_heads, head_dim] of [n, head_groups, group, head_dim]."""
    x = x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])[:, :, : q_heads // kv_heads]
    return x.reshape(x.shape[0], q_heads, -1)


def prefill(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    *,
    layout: KVLayout,
    target: Target,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
) -> Array:
    """Ragged prompt chunks on one token axis. See `api.prefill_attention`."""
    tokens, q_heads, _ = q.shape
    sizes, context = (q_heads, kv_pages.shape[1], layout, target), block_tables.shape[1] * kv_pages.shape[1]
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks is not None}
    if layout.latent:
        splits = _splits(tokens, q_starts.shape[0], q_heads, context, layout, target, window)
        tile = shared_tile(*sizes, splits, "prefill", **options)
    else:  # a tile of 128 rows sees every key of its context
        splits, tile = 1, prefill_tile(*sizes, **options)
    per_tile = tile.tokens
    items = (tokens + q_starts.shape[0] * (per_tile - 1)) // per_tile  # no ragged batch has more
    blocks = -(-q_lens // per_tile)
    ends = jnp.cumsum(blocks)
    item = jnp.arange(items, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(item[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), q_lens.shape[0] - 1)
    offset = (item - (ends - blocks)[row]) * per_tile
    high = jnp.where(item < ends[-1], positions[row] + jnp.minimum(offset + per_tile, q_lens[row]), 0)
    schedule, works = _schedule(tile, splits, row, positions[row] + offset, high)

    token = (q_starts[row] + offset)[:, None] + jnp.arange(per_tile, dtype=jnp.int32)[None, :]
    tiles = _head_groups(q, tile)[jnp.clip(token, 0, tokens - 1)]  # [items, per_tile, head_groups, group, width]
    tiles = jnp.moveaxis(tiles, 2, 1).reshape(items, tile.head_groups, per_tile * tile.group, -1)
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, tile.q_rows - per_tile * tile.group), (0, 0)))
    sink_rows = _sink_rows(sinks, tile) if tile.sinks and sinks is not None else None
    found = attend(tile, schedule, block_tables, tiles.reshape(-1, tile.head_width), kv_pages, sink_rows)

    at = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    owned = (at >= q_starts[None, :]) & (at < (q_starts + q_lens)[None, :])
    owner = jnp.argmax(owned, axis=1)
    inside = at[:, 0] - q_starts[owner]
    item_of = jnp.clip((ends - blocks)[owner] + inside // per_tile, 0, items - 1)
    places = (item_of, slice(None), slice(None), jnp.clip(inside % per_tile, 0, per_tile - 1))
    means = _results(tile, layout, *found, works, places, sinks).astype(q.dtype)
    means = jnp.where(jnp.any(owned, axis=1)[:, None, None, None], means, jnp.zeros_like(means))
    return _heads(means, q_heads, layout.kv_heads)


def _sink_rows(sinks: Array, tile: Tile) -> Array:
    """float32 [head_groups * q_rows]: each row's sink, as the rows of a query tile lie."""
    rows = _head_groups(sinks.astype(jnp.float32)[None, :, None], tile)[0, :, :, 0]
    rows = jnp.tile(rows, (1, tile.tokens))
    return jnp.pad(rows, ((0, 0), (0, tile.q_rows - rows.shape[1]))).reshape(-1)
