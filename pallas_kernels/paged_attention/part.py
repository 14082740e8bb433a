"""One device's part of every page, where a page's tokens are spread over several devices (context parallelism).

Of a page of count * size tokens, device i has the tokens [i * size, (i + 1) * size); its array of pages has pages of
`size`. Keys of a row that this device holds are numbered in the order of their positions, so those before any
position are the first so many of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # the log-sum-exp of no scores: finite, so that differences are numbers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """index: int32 [], which of `count` parts this device has."""

    index: Array
    count: int = field(metadata={"static": True})

    def keys_before(self, position: Array, size: int) -> Array:
        """How many of the positions [0, position) are here; size: of this device's part of a page, in tokens."""
        pages, rest = jnp.divmod(position, self.count * size)
        return pages * size + jnp.clip(rest - self.index * size, 0, size)

    def position_of(self, key: Array, size: int) -> Array:
        """The position of this device's key of that number."""
        page, offset = jnp.divmod(key, size)
        return (page * self.count + self.index) * size + offset

    def is_here(self, offset: Array, size: int) -> Array:
        """Whether a token at `offset` of its page is."""
        return offset // size == self.index
