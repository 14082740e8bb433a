"""Mamba 2's recurrence on a TPU: decode rows in their places in the pool, prompts as plain JAX has them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pallas_kernels import states_tpu
from pallas_kernels.ssd import reference
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.ssd.api import SSDSpec


def declines(spec: SSDSpec, target: Target) -> str | None:
    """Why this kernel does not serve a call; None: it does."""
    return states_tpu.declines(spec.decode_rows, spec.room, (spec.head_dim, spec.state_dim), target)


run = partial(reference.ssd, advance=states_tpu.advance, advance_few=states_tpu.advance_few)
