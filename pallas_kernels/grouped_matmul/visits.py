"""Which expert meets which rows: the work list of the grouped kernels, computed on the device.

A visit is one tile of rows and one expert with rows in it. The rows of nobody are a last group of
their own, so that every row belongs to exactly one visit.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Visits:
    """int32 arrays, ascending in rows, with room for `most(...)` visits; the first `count` mean anything."""

    expert: Array  # [most]; for rows of nobody the last expert with rows, whose weight is there already
    row: Array  # [most], first row of the tile
    start: Array  # [most], [start, end) are the rows of the tile that this visit computes
    end: Array  # [most]
    nobodys: Array  # [most], 1: these rows get zeros
    count: Array  # [1]


def most(tokens: int, experts: int, tile: int) -> int:
    """Visits that any group sizes may need: a tile each, and one more for each border; no visit is empty."""
    return min(tokens, -(-tokens // tile) + experts)


def visits(group_sizes: Array, tokens: int, tile: int, *, rows: int | None = None) -> Visits:
    """Tiles start at multiples of `tile`, and one with a border inside is visited once a group.

    With `rows`, of which there must be at least `tokens` and `tile`, a group's tiles start at its first
    row instead, which takes fewer visits, or as far before it as keeps them within `rows`.
    """
    experts = group_sizes.shape[0]
    ends = jnp.minimum(jnp.cumsum(group_sizes), tokens).astype(jnp.int32)
    ends = jnp.concatenate([ends, jnp.full(1, tokens, jnp.int32)])
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    first = starts // tile * tile if rows is None else starts
    tiles = jnp.where(ends > starts, (ends - first + tile - 1) // tile, 0)
    done = jnp.cumsum(tiles)
    index = jnp.arange(most(tokens, experts, tile), dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(index[:, None] >= done[None, :], axis=1, dtype=jnp.int32), experts)
    row = first[group] + (index - done[group] + tiles[group]) * tile
    start, end = jnp.maximum(row, starts[group]), jnp.minimum(row + tile, ends[group])
    active = jnp.where(group_sizes > 0, jnp.arange(experts, dtype=jnp.int32), 0)
    return Visits(
        expert=jnp.where(group < experts, group, jnp.max(active)),
        row=row if rows is None else jnp.minimum(row, rows - tile),
        start=start,
        end=end,
        nobodys=(group == experts).astype(jnp.int32),
        count=done[-1:],
    )
