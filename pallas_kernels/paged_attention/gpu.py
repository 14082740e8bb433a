"""Paged attention on Hopper: what is served, block sizes, the schedule of work, and the final combine.

The kernel is `gpu_kernel.attend`. Around it stand cheap gathers of the queries and results, which XLA
fuses with its neighbours: a tile that belongs to one unit of work needs no masked loads or stores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
        if spec.kind == "prefill" or layout.quantized:
            return f"latent pages of head_dim {layout.head_dim}, {layout.dtype}: only decode, only bfloat16"
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
    if spec.kind == "decode":
        splits = _splits(spec.rows, spec.q_heads, spec.pages_per_seq * spec.page_size, spec.layout, target, spec.window)
        return decode_tile(spec.q_heads, spec.page_size, spec.layout, target, splits, **options)
    return prefill_tile(spec.q_heads, spec.page_size, spec.layout, target, **options)


def decode_tile(
    q_heads: int, page_size: int, layout: KVLayout, target: Target, splits: int, *, sinks: bool, **options: Any
) -> Tile:
    """Blocks of 64 keys, as many stages as leave room for the queries and the float32 result.

    Two consumers hide each other's softmax; a head of 256 lanes leaves room for one. Latents need both.
    """
    latent = layout.latent
    group = q_heads // layout.kv_heads
    subgroups = -(-group // WARPGROUP_ROWS)
    rows = -(-group // subgroups)
    tile = Tile(
        by_keys=not latent,
        consumers=1 if layout.head_width > 192 and not latent else 2,
        q_rows=-(-rows // 8) * 8,
        group=rows,
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
    return _sized(tile, "decode", layout, target)


def prefill_tile(
    q_heads: int, page_size: int, layout: KVLayout, target: Target, *, sinks: bool, **options: Any
) -> Tile:
    """128 query rows a block; 128 keys a stage as in FlashAttention-3, 64 where registers are short."""
    group = q_heads // layout.kv_heads
    subgroups = -(-group // (2 * WARPGROUP_ROWS))
    block_kv = 128 if layout.head_width <= 128 else 64
    tile = Tile(
        by_keys=False,
        consumers=2,
        q_rows=2 * WARPGROUP_ROWS,
        group=-(-group // subgroups),
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


def _splits(rows: int, q_heads: int, context: int, layout: KVLayout, target: Target, window: int | None) -> int:
    """Into how many units the keys of a row are cut: the fewest that keep the cores busy, at most.

    Depends on shapes alone, and a row's cuts on its own length: no row depends on its neighbours.
    """
    cores = _chip(target).cores
    group = q_heads // layout.kv_heads
    units = rows * layout.kv_heads * -(-group // WARPGROUP_ROWS)
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
    page_size = kv_pages.shape[1]
    splits = _splits(rows, q_heads, block_tables.shape[1] * page_size, layout, target, window)
    tile = decode_tile(
        q_heads, page_size, layout, target, splits, scale=scale, softcap=softcap, window=window, sinks=sinks is not None
    )
    schedule, works = _decode_schedule(kv_lens, splits, tile)
    tiles = _head_groups(q, tile)  # [rows, head_groups, group, head_width]
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, tile.q_rows - tile.group), (0, 0)))
    out, lse = attend(tile, schedule, block_tables, tiles.reshape(-1, tile.head_width), kv_pages, None)
    shape = (rows, splits, tile.head_groups)
    works = works[:, :, None, None]
    means = out.reshape(*shape, tile.q_rows, -1)[..., : tile.group, : layout.result_dim]
    means = jnp.where(works[..., None], means, 0.0)
    if lse is not None:
        sums = jnp.where(works, lse.reshape(*shape, WARPGROUP_ROWS)[..., : tile.group], -jnp.inf)
        sink = None if sinks is None else _head_groups(sinks[None, :, None], tile)[..., 0] * LOG2_E
        means = _combined(means, sums, sink)
    else:
        means = means[:, 0]
    return _heads(means, q_heads, layout.kv_heads).astype(q.dtype)


def _decode_schedule(kv_lens: Array, splits: int, tile: Tile) -> tuple[Array, Array]:
    """The schedule, longest items first, and bool [rows, splits]: which splits have keys."""
    rows = kv_lens.shape[0]
    low = jnp.maximum(kv_lens - tile.window, 0) if tile.window else jnp.zeros_like(kv_lens)
    first, last = low // tile.block_kv, -(-kv_lens // tile.block_kv)
    share = jnp.maximum(-(-(last - first) // splits), SPLIT_BLOCKS)[:, None]
    start = first[:, None] + share * jnp.arange(splits, dtype=jnp.int32)[None, :]
    end = jnp.minimum(start + share, last[:, None])
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], start.shape)
    position, low, high = (jnp.broadcast_to(a[:, None], start.shape) for a in (kv_lens - 1, low, kv_lens))
    out = jnp.arange(rows * splits, dtype=jnp.int32).reshape(start.shape)
    return _sorted_schedule([out, row, row, start, end, position, low, high]), end > start


def _sorted_schedule(columns: list[Array]) -> Array:
    """int32 [items + 1, FIELDS]: longest first, so that turns of the persistent grid even out; then the count."""
    items = jnp.stack([column.reshape(-1) for column in columns], axis=1).astype(jnp.int32)
    length = jnp.maximum(items[:, FIELDS.index("last")] - items[:, FIELDS.index("first")], 0)
    count = jnp.zeros((1, len(FIELDS)), jnp.int32).at[0, 0].set(jnp.sum(length > 0, dtype=jnp.int32))
    return jnp.concatenate([items[jnp.argsort(-length, stable=True)], count])


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
    tokens, q_heads, head_dim = q.shape
    tile = prefill_tile(
        q_heads, kv_pages.shape[1], layout, target, scale=scale, softcap=softcap, window=window, sinks=sinks is not None
    )
    per_tile = tile.q_rows // tile.group  # tokens
    items = tokens // per_tile + q_starts.shape[0]  # no ragged batch has more
    blocks = -(-q_lens // per_tile)
    ends = jnp.cumsum(blocks)
    item = jnp.arange(items, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(item[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), q_lens.shape[0] - 1)
    offset = (item - (ends - blocks)[row]) * per_tile
    schedule = _prefill_schedule(tile, item, row, offset, item < ends[-1], positions, q_lens)

    token = (q_starts[row] + offset)[:, None] + jnp.arange(per_tile, dtype=jnp.int32)[None, :]
    tiles = _head_groups(q, tile)[jnp.clip(token, 0, tokens - 1)]  # [items, per_tile, head_groups, group, width]
    tiles = jnp.moveaxis(tiles, 2, 1).reshape(items, tile.head_groups, per_tile * tile.group, -1)
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, tile.q_rows - per_tile * tile.group), (0, 0)))
    sink_rows = None if sinks is None else _sink_rows(sinks, tile, per_tile)
    out, _ = attend(tile, schedule, block_tables, tiles.reshape(-1, tile.head_width), kv_pages, sink_rows)

    at = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    owned = (at >= q_starts[None, :]) & (at < (q_starts + q_lens)[None, :])
    owner = jnp.argmax(owned, axis=1)
    inside = at[:, 0] - q_starts[owner]
    item_of = (ends - blocks)[owner] + inside // per_tile
    out = out.reshape(items, tile.head_groups, tile.q_rows, -1)[:, :, : per_tile * tile.group, :head_dim]
    out = out.reshape(items, tile.head_groups, per_tile, tile.group, head_dim)
    found = out[jnp.clip(item_of, 0, items - 1), :, jnp.clip(inside % per_tile, 0, per_tile - 1)]
    found = jnp.where(jnp.any(owned, axis=1)[:, None, None, None], found, jnp.zeros_like(found))
    return _heads(found, q_heads, layout.kv_heads)


def _prefill_schedule(
    tile: Tile, item: Array, row: Array, offset: Array, works: Array, positions: Array, q_lens: Array
) -> Array:
    per_tile = tile.q_rows // tile.group
    position = positions[row] + offset
    high = positions[row] + jnp.minimum(offset + per_tile, q_lens[row])
    low = jnp.maximum(position - tile.window + 1, 0) if tile.window else jnp.zeros_like(position)
    last = jnp.where(works, -(-high // tile.block_kv), 0)
    return _sorted_schedule([item, item, row, low // tile.block_kv, last, position, low, high])


def _sink_rows(sinks: Array, tile: Tile, per_tile: int) -> Array:
    """float32 [head_groups * q_rows]: each row's sink, as the rows of a query tile lie."""
    rows = _head_groups(sinks.astype(jnp.float32)[None, :, None], tile)[0, :, :, 0]
    rows = jnp.tile(rows, (1, per_tile))
    return jnp.pad(rows, ((0, 0), (0, tile.q_rows - rows.shape[1]))).reshape(-1)
