"""Writing new keys and values into their pages, in place when the pages are donated."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def write_kv(kv_pages: Array, k: Array, v: Array, page_ids: Array, offsets: Array) -> Array:
    """kv_pages [pages, page_size, 2 * kv_heads * head_dim] with k and v [tokens, kv_heads, head_dim] stored.

    Each KV head's key is followed by its value, in one dimension: on a TPU (2 * kv_heads, head_dim)
    would be padded to whole tiles. page_ids, offsets: int32 [tokens], in range. Tokens without an
    owner go to the trash page; which of several stays there is undefined.
    """
    if k.shape != v.shape or 2 * k.shape[1] * k.shape[2] != kv_pages.shape[2]:
        raise ValueError(f"k {k.shape} and v {v.shape} do not fit pages {kv_pages.shape}")
    combined = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1)
    return kv_pages.at[page_ids, offsets].set(combined.astype(kv_pages.dtype), mode="promise_in_bounds")
