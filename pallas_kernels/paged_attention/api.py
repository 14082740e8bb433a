"""Attention over a paged KV cache: public functions, their checks, and the choice of implementation.

Common to both: kv_pages is [pages, page_size, 2 * kv_heads * head_dim] in q's dtype, each KV
head's key followed by its value (see `write_kv`);
block_tables is int32 [rows, pages_per_seq], entry j holding positions [j * page_size, ...) of
its row; entries past a row's length must be valid page ids, their content may be anything,
NaN included. Query head h reads KV head h // (q_heads // kv_heads). Scores are
softcap(scale * q.k), softmax in float32; with a window, query i sees keys (i - window, i].
"""

from __future__ import annotations

from jax import Array

from pallas_kernels.paged_attention import reference


def decode_attention(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    kv_lens: Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Array:
    """One query a row: q [rows, q_heads, head_dim] at position kv_lens - 1; returns the same shape.

    kv_lens: int32 [rows], keys visible to the row, the query's own included; 0 marks an idle row.
    """
    _check(q, kv_pages, block_tables, kv_lens)
    return reference.decode(q, kv_pages, block_tables, kv_lens, scale=scale, softcap=softcap, window=window)


def prefill_attention(
    q: Array,
    kv_pages: Array,
    block_tables: Array,
    q_starts: Array,
    q_lens: Array,
    positions: Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Array:
    """Chunks of several prompts on one token axis: q [tokens, q_heads, head_dim]; same shape out.

    Row r owns tokens [q_starts[r], q_starts[r] + q_lens[r]), the first at position positions[r];
    rows are ascending and do not overlap; idle rows have q_lens 0 and come last. Keys [0, positions[r] +
    q_lens[r]) must already be in the pages. Tokens of no row come back undefined but finite.
    """
    _check(q, kv_pages, block_tables, q_lens)
    return reference.prefill(
        q, kv_pages, block_tables, q_starts, q_lens, positions, scale=scale, softcap=softcap, window=window
    )


def _check(q: Array, kv_pages: Array, block_tables: Array, lens: Array) -> None:
    q_heads, head_dim = q.shape[1:]
    width = kv_pages.shape[2]
    if width % (2 * head_dim):
        raise ValueError(f"pages are {width} wide, not a multiple of a key and a value of head_dim {head_dim}")
    if q_heads % (width // (2 * head_dim)):
        raise ValueError(f"q_heads {q_heads} must be a multiple of kv_heads {width // (2 * head_dim)}")
    if block_tables.shape[0] != lens.shape[0]:
        raise ValueError(f"block_tables has {block_tables.shape[0]} rows, lengths {lens.shape[0]}")
