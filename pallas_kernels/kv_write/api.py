"""Writing new keys or values into their pages, in place when the pages are donated."""

from __future__ import annotations

from jax import Array


def write_kv(pages: Array, new: Array, page_ids: Array, offsets: Array) -> Array:
    """pages [pages, page_size, kv_heads, head_dim] with new [tokens, kv_heads, head_dim] stored.

    page_ids, offsets: int32 [tokens], in range. Tokens without an owner go to the trash page;
    several may share a place there, and which one stays is undefined.
    """
    if new.shape[1:] != pages.shape[2:]:
        raise ValueError(f"new has heads {new.shape[1:]}, pages have {pages.shape[2:]}")
    return pages.at[page_ids, offsets].set(new.astype(pages.dtype), mode="promise_in_bounds")
