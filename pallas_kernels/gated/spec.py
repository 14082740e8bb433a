"""What a choice of `gated` depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GatedSpec:
    """See `api.gated`."""

    block: int
    dtype: str
    activation: str
    clamped: bool = False
