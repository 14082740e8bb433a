"""A weight is declared once: shape, dtype, logical axes, init. The rest is derived.

Knows nothing about models or meshes; `sharding.rules` maps logical axes to mesh axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

Init = Literal["normal", "zeros", "ones"]


@dataclass(frozen=True)
class ParamSpec:
    """Declaration of one array parameter.

    `axes` names each dimension ("vocab", "embed", "kv_heads", "head_dim", "mlp", None ...).
    `init` fills random checkpoints; "normal" has standard deviation 1/sqrt(fan_in).
    `rows`: on the device the array is a matrix, its first `rows` dimensions merged and the rest
    merged. Small trailing dimensions would be padded to whole tiles there, several times their size.
    `lead`: dimensions before those, kept as they are on the device (experts).
    `packable`: only ever multiplied by, so it may be stored in fewer bits, but in no fewer than `fewest_bits`.
    `by_rows`: of columns that no rule cuts, and read row by row: accelerators may have more columns, of zeros.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]
    init: Init = "normal"
    fan_in: int = 1
    rows: int | None = None
    lead: int = 0
    packable: bool = False
    fewest_bits: int = 4
    by_rows: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} has {len(self.shape)} dimensions, axes name {self.axes}")

    @property
    def device_shape(self) -> tuple[int, ...]:
        """Shape of the array on the device; the order of the elements is the same."""
        if self.rows is None:
            return self.shape
        lead, rest = self.shape[: self.lead], self.shape[self.lead :]
        return (*lead, math.prod(rest[: self.rows]), math.prod(rest[self.rows :]))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def init_array(spec: ParamSpec, rng: np.random.Generator) -> np.ndarray:
    """A random host array for `spec`, in its dtype."""
    if spec.init == "zeros":
        return np.zeros(spec.shape, spec.dtype)
    if spec.init == "ones":
        return np.ones(spec.shape, spec.dtype)
    values = rng.standard_normal(spec.shape, np.float32) / math.sqrt(spec.fan_in)
    return values.astype(spec.dtype)
