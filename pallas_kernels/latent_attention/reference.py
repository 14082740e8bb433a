"""Expanded prefill of latent attention in plain JAX, on every backend.

Walks chunks of each prompt's context; a chunk is expanded once and folded into every query of the
prompt that sees it, block by block. So the expanded context never exists as a whole (DeepSeek-V3: 64
KiB a token in bfloat16, a latent has 1152 bytes), and both loops end with the real lengths.
The softmax state of all queries is kept between chunks, in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.kv_layout import KVLayout, unpack_rows
from pallas_kernels.paged_attention.reference import State, finish, initial_state, online_softmax, pad_columns
from pallas_kernels.products import product
from pallas_kernels.target import Target

CHUNK_TOKENS = 256  # keys that are expanded at once
BLOCK_QUERIES = 256  # queries that see them at once


def prefill(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    w_uk: Array,
    w_uv: Array,
    *,
    layout: KVLayout,
    target: Target,
    scale: float,
) -> Array:
    """See `api.expanded_prefill`."""
    tokens, q_heads, _ = q.shape
    rank, nope = layout.result_dim, w_uk.shape[2]
    block = min(BLOCK_QUERIES, tokens)
    page_size = kv_pages.shape[1]
    chunk_pages = min(max(1, CHUNK_TOKENS // page_size), block_tables.shape[1])
    chunk = chunk_pages * page_size
    block_tables = pad_columns(block_tables, chunk_pages)
    queries = jnp.pad(jnp.transpose(q, (1, 0, 2)), ((0, 0), (0, block), (0, 0)))
    kv_lens = jnp.where(q_lens > 0, positions + q_lens, 0)
    num_chunks = -(-kv_lens // chunk)  # of each row
    chunks_before = jnp.cumsum(num_chunks) - num_chunks

    def one_chunk(c: Array, state: State) -> State:
        row = jnp.sum(c >= chunks_before) - 1  # idle rows are last: their chunks start past the end
        first = c - chunks_before[row]
        kv_pos = first * chunk + jnp.arange(chunk, dtype=jnp.int32)
        table = jax.lax.dynamic_slice(block_tables, (row, first * chunk_pages), (1, chunk_pages))[0]
        latents = unpack_rows(kv_pages[table].reshape(chunk, -1), layout)[:, 0, 0].astype(q.dtype)
        latents = jnp.where((kv_pos < kv_lens[row])[:, None], latents, 0)  # 0 * NaN of a stale page is NaN
        rope = latents[:, rank:]
        k, v = (product("cr,hrd->hcd", latents[:, :rank], w).astype(q.dtype) for w in (w_uk, w_uv))

        def one_block(b: Array, state: State) -> State:
            index = b * block + jnp.arange(block, dtype=jnp.int32)
            start, mine = q_starts[row] + b * block, index < q_lens[row]
            seen = (kv_pos[None, :] <= (positions[row] + index)[:, None]) & mine[:, None]
            heads = jax.lax.dynamic_slice_in_dim(queries, start, block, axis=1)
            scores = product("hqd,hcd->hqc", heads[..., :nope], k) + product("hqd,cd->hqc", heads[..., nope:], rope)
            old = _slices(state, start, block)
            (top, total, values), weights = online_softmax(old, scores, seen[None], scale, None)
            values = values + product("hqc,hcd->hqd", weights.astype(q.dtype), v)
            # A block may reach into the next prompt: this one's NaN must not.
            return _replaced(state, (top, total, values), old, mine, start)

        first_block = jnp.maximum(kv_pos[0] - positions[row], 0) // block  # earlier ones see none of the chunk
        return jax.lax.fori_loop(first_block, -(-q_lens[row] // block), one_block, state)

    state = initial_state((q_heads, tokens + block), w_uv.shape[2], None)
    state = jax.lax.fori_loop(0, jnp.sum(num_chunks), one_chunk, state)
    return jnp.transpose(finish(state)[:, :tokens], (1, 0, 2)).astype(q.dtype)


def _slices(state: State, start: Array, size: int) -> State:
    top, total, values = (jax.lax.dynamic_slice_in_dim(part, start, size, axis=1) for part in state)
    return top, total, values


def _replaced(state: State, new: State, old: State, mine: Array, start: Array) -> State:
    """`state` with `new` at `start` where the query is `mine` [block], else with what was there."""
    parts = []
    for whole, after, before in zip(state, new, old, strict=True):
        keep = mine.reshape(1, -1, *[1] * (whole.ndim - 2))
        parts.append(jax.lax.dynamic_update_slice_in_dim(whole, jnp.where(keep, after, before), start, axis=1))
    return parts[0], parts[1], parts[2]
