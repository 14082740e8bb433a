"""Rows into pages with XLA's scatter."""

from __future__ import annotations

from jax import Array

from pallas_kernels.target import Target


def write_rows(kv_pages: Array, rows: Array, page_ids: Array, offsets: Array, *, target: Target) -> Array:
    """kv_pages [pages, page_size, width] with rows [tokens, width] of the same dtype at (page_ids, offsets)."""
    return kv_pages.at[page_ids, offsets].set(rows, mode="promise_in_bounds")
