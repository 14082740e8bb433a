"""Paged attention in plain JAX: the fallback on every backend and the oracle of the kernels.

Online softmax over chunks of pages (arXiv 2205.14135, 2309.06180). The loop runs only to the
longest row, so no program depends on the context length; a chunk that a row does not see
leaves its state bit for bit unchanged, so no row depends on its neighbours.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.kv_layout import KVLayout, unpack_rows
from pallas_kernels.paged_attention.part import MASKED, Part
from pallas_kernels.products import product
from pallas_kernels.target import Target

CHUNK_TOKENS = 128  # keys a loop turn sees
BLOCK_QUERIES = 128  # queries of one prompt that share a loop
State = tuple[Array, Array, Array]  # float32: highest score (MASKED before any), sum of weights, weighted values


def decode(q: Array, kv_pages: Array, block_tables: Array, kv_lens: Array, **how: Any) -> Array:
    """One query a row, at position kv_lens - 1. See `api.decode_attention`."""
    return decode_part(q, kv_pages, block_tables, kv_lens, None, **how)[0].astype(q.dtype)


def decode_part(
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
) -> tuple[Array, Array]:
    """See `api.decode_part`; None: these are whole pages."""
    rows, q_heads, head_dim = q.shape
    page_size, kv_heads, value_dim = kv_pages.shape[1], layout.kv_heads, layout.result_dim
    group = q_heads // kv_heads
    chunk_pages = max(1, CHUNK_TOKENS // page_size)
    chunk = chunk_pages * page_size
    block_tables = pad_columns(block_tables, chunk_pages)
    queries = q.astype(jnp.float32).reshape(rows, kv_heads, group, head_dim)
    first_seen = jnp.maximum(kv_lens - window, 0) if window else jnp.zeros_like(kv_lens)
    # An idle row (kv_len 0) must not drag the loop to the start of the windowed rows' past.
    first = _keys_before(part, jnp.min(jnp.where(kv_lens > 0, first_seen, jnp.max(kv_lens))), page_size) // chunk
    last = -(-_keys_before(part, jnp.max(kv_lens), page_size) // chunk)

    def turn(i: Array, state: State) -> State:
        pages = jax.lax.dynamic_slice_in_dim(block_tables, i * chunk_pages, chunk_pages, axis=1)
        positions = _positions(part, i * chunk + jnp.arange(chunk, dtype=jnp.int32), page_size)[None, :]
        seen = (positions >= first_seen[:, None]) & (positions < kv_lens[:, None])
        kv = unpack_rows(kv_pages[pages].reshape(rows, chunk, -1), layout)
        kv = jnp.transpose(kv, (0, 2, 3, 1, 4))  # heads first, so that both products run on whole matrices
        v = jnp.where(seen[:, None, :, None], kv[:, :, -1, :, :value_dim], 0.0)  # 0 * NaN of a stale page is NaN
        scores = product("rkgd,rkcd->rkgc", queries, kv[:, :, 0])
        state, weights = online_softmax(state, scores, seen[:, None, None, :], scale, softcap)
        return state[0], state[1], state[2] + product("rkgc,rkcd->rkgd", weights, v)

    state = jax.lax.fori_loop(first, last, turn, initial_state((rows, kv_heads, group), value_dim, sinks))
    return finish(state).reshape(rows, q_heads, value_dim), log_sum_exp(state).reshape(rows, q_heads)


def prefill(
    q: Array, kv_pages: Array, block_tables: Array, q_starts: Array, q_lens: Array, positions: Array, **how: Any
) -> Array:
    """Ragged prompt chunks on one token axis. See `api.prefill_attention`."""
    return prefill_part(q, kv_pages, block_tables, q_starts, q_lens, positions, None, **how)[0].astype(q.dtype)


def prefill_part(
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
) -> tuple[Array, Array]:
    """See `api.prefill_part`; None: these are whole pages, and values are in the queries' dtype.

    Walks blocks of queries prompt by prompt. A block may reach into the next prompt's
    tokens; what it writes there is overwritten by that prompt's own first block.
    """
    tokens, q_heads, head_dim = q.shape
    page_size, kv_heads, value_dim = kv_pages.shape[1], layout.kv_heads, layout.result_dim
    group = q_heads // kv_heads
    block = min(BLOCK_QUERIES, tokens)
    chunk_pages = max(1, CHUNK_TOKENS // page_size)
    chunk = chunk_pages * page_size
    block_tables = pad_columns(block_tables, chunk_pages)
    padded = jnp.pad(q.reshape(tokens, kv_heads, group, head_dim), ((0, block), (0, 0), (0, 0), (0, 0)))
    num_blocks = -(-q_lens // block)  # of each row
    blocks_before = jnp.cumsum(num_blocks) - num_blocks

    def one_block(b: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        row = jnp.sum(b >= blocks_before) - 1  # idle rows are last: their blocks start past the end
        offset = (b - blocks_before[row]) * block
        start = q_starts[row] + offset
        queries = jax.lax.dynamic_slice_in_dim(padded, start, block, axis=0).astype(jnp.float32)
        queries = jnp.transpose(queries, (1, 2, 0, 3)).reshape(kv_heads, group * block, head_dim)
        q_pos = jnp.tile(positions[row] + offset + jnp.arange(block, dtype=jnp.int32), group)
        kv_len = positions[row] + jnp.minimum(offset + block, q_lens[row])
        table = jax.lax.dynamic_index_in_dim(block_tables, row, axis=0, keepdims=False)

        def turn(i: Array, state: State) -> State:
            pages = jax.lax.dynamic_slice_in_dim(table, i * chunk_pages, chunk_pages)
            kv_pos = _positions(part, i * chunk + jnp.arange(chunk, dtype=jnp.int32), page_size)
            kv = unpack_rows(kv_pages[pages].reshape(chunk, -1), layout)
            kv = jnp.transpose(kv, (1, 2, 0, 3))
            v = jnp.where((kv_pos < kv_len)[None, :, None], kv[:, -1, :, :value_dim], 0.0)
            seen = (kv_pos[None, :] <= q_pos[:, None]) & (kv_pos < kv_len)[None, :]  # padding queries reach past
            if window:
                seen &= kv_pos[None, :] > q_pos[:, None] - window
            scores = product("kqd,kcd->kqc", queries, kv[:, 0])
            state, weights = online_softmax(state, scores, seen[None], scale, softcap)
            return state[0], state[1], state[2] + product("kqc,kcd->kqd", weights, v)

        unseen = jnp.maximum(positions[row] + offset - window + 1, 0) if window else jnp.int32(0)
        first, last = (_keys_before(part, end, page_size) for end in (unseen, kv_len))
        per_query = None if sinks is None else jnp.repeat(sinks.reshape(kv_heads, group), block, axis=1)
        start_state = initial_state((kv_heads, group * block), value_dim, per_query)
        state = jax.lax.fori_loop(first // chunk, -(-last // chunk), turn, start_state)
        values = jnp.transpose(finish(state).reshape(kv_heads, group, block, value_dim), (2, 0, 1, 3))
        lse = jnp.transpose(log_sum_exp(state).reshape(kv_heads, group, block), (2, 0, 1))
        return (
            jax.lax.dynamic_update_slice_in_dim(results[0], values.astype(results[0].dtype), start, axis=0),
            jax.lax.dynamic_update_slice_in_dim(results[1], lse, start, axis=0),
        )

    values = jnp.zeros((*padded.shape[:-1], value_dim), q.dtype if part is None else jnp.float32)
    lse = jnp.zeros(padded.shape[:-1], jnp.float32)
    values, lse = jax.lax.fori_loop(0, jnp.sum(num_blocks), one_block, (values, lse))
    return values[:tokens].reshape(tokens, q_heads, value_dim), lse[:tokens].reshape(tokens, q_heads)


def _keys_before(part: Part | None, position: Array, page_size: int) -> Array:
    return position if part is None else part.keys_before(position, page_size)


def _positions(part: Part | None, keys: Array, page_size: int) -> Array:
    return keys if part is None else part.position_of(keys, page_size)


def online_softmax(
    state: State, scores: Array, seen: Array, scale: float, softcap: float | None
) -> tuple[State, Array]:
    """Fold one chunk of raw scores into (max, sum, weighted values); returns its weights too."""
    top, total, acc = state
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, MASKED)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    return (new_top, total * shrink + jnp.sum(weights, axis=-1), acc * shrink[..., None]), weights


def initial_state(shape: tuple[int, ...], value_dim: int, sinks: Array | None) -> State:
    """Before any key: nothing seen, or the sink (its elements in the order of the last two dimensions of shape)."""
    acc = jnp.zeros((*shape, value_dim), jnp.float32)
    if sinks is None:
        return jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), acc
    top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(shape[-2:]), shape)
    return top, jnp.ones(shape, jnp.float32), acc


def log_sum_exp(state: State) -> Array:
    """Of the scores seen; MASKED where there are none."""
    top, total, _ = state
    return jnp.where(total == 0.0, MASKED, top + jnp.log(jnp.where(total == 0.0, 1.0, total)))


def finish(state: State) -> Array:
    _, total, acc = state
    return acc / jnp.where(total == 0.0, 1.0, total)[..., None]  # a row that sees nothing yields 0


def pad_columns(block_tables: Array, multiple: int) -> Array:
    return jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % multiple)))
