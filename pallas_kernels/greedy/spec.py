"""What a choice of `greedy` depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GreedySpec:
    """See `api.greedy`."""

    num_devices: int = 1  # that share the model
