"""What a choice of `rms_norm` depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormSpec:
    """See `api.rms_norm`."""

    size: int  # numbers that are normed together
    dtype: str  # of x
    num_devices: int = 1  # that share the model
