"""A matrix cut into panels: some columns of all rows, one panel behind the other.

What a few rows of activations take from memory is then read from one end to the other, and not a few columns of each
row at a time: a CPU's cores read it faster. Compiled kernels take panels of four vectors (`pallas_kernels.native`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Panels:
    """[K, N] as [N / width, K, width]; a pytree of its one array (numpy, JAX or abstract)."""

    values: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        count, rows, width = self.values.shape
        return rows, count * width

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def ndim(self) -> int:
        return 2


def in_panels(matrix: Any, width: int) -> Panels:
    """The numpy array, or the ShapeDtypeStruct, [K, N] of such panels; width divides N."""
    rows, columns = matrix.shape
    if columns % width:
        raise ValueError(f"{columns} columns do not divide into panels of {width}")
    if isinstance(matrix, jax.ShapeDtypeStruct):
        abstract: Any = jax.ShapeDtypeStruct((columns // width, rows, width), matrix.dtype)
        return Panels(abstract)
    cut: Any = np.ascontiguousarray(np.asarray(matrix).reshape(rows, -1, width).swapaxes(0, 1))
    return Panels(cut)


def whole(matrix: Array | Panels) -> Array:
    """[K, N], copied where it was in panels."""
    if isinstance(matrix, Panels):
        return jnp.swapaxes(jnp.asarray(matrix.values), 0, 1).reshape(matrix.shape)
    return matrix


def as_stored(matrix: Array | Panels) -> Array:
    """The one array that it is."""
    return matrix.values if isinstance(matrix, Panels) else matrix
