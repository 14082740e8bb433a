"""Tokens proposed from the sequence itself: what followed the last occurrence of its latest tokens.

Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding, 2023), on the device: the tokens that
are matched have not been read by the host yet. Text that is copied, edited or extracted repeats itself.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

MOST_MATCHED = 4  # tokens; a longer match proposes no better
LEAST_MATCHED = 2


def propose(history: Array, position: Array, count: int) -> Array:
    """int32 [rows, count]: what may follow; -1 throughout a row in which nothing is repeated.

    history: int32 [rows, max_len], of which [0, position] are the sequence's tokens. The longest match
    wins, then the latest. A match that overlaps the end goes round: a loop is proposed on and on.
    """
    index = jnp.arange(history.shape[1], dtype=jnp.int32)[None, :]
    runs, length = index < position[:, None], jnp.zeros(history.shape, jnp.int32)
    for back in range(MOST_MATCHED):
        latest = jnp.take_along_axis(history, jnp.maximum(position - back, 0)[:, None], axis=1)
        earlier = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-1)[:, : history.shape[1]]
        runs &= (earlier == latest) & (position >= back)[:, None]
        length += runs.astype(jnp.int32)
    best = jnp.argmax(length * history.shape[1] + index, axis=1).astype(jnp.int32)
    matched = jnp.take_along_axis(length, best[:, None], axis=1) >= LEAST_MATCHED
    step = jnp.arange(count, dtype=jnp.int32)[None, :]
    following = best[:, None] + 1 + step % jnp.maximum(position - best, 1)[:, None]
    return jnp.where(matched, jnp.take_along_axis(history, following, axis=1), -1)
