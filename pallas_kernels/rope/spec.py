"""What a choice of `rope` depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """See `api.split_rotated`."""

    head_dim: int
    rotated: int  # numbers of a head that turn, the first ones
    dtype: str
    num_devices: int = 1  # that share the model
