"""greedy by the compiled CPU kernels (`pallas_kernels.native`): one pass over what XLA reads several times."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.greedy.spec import GreedySpec
from pallas_kernels.native.library import GREEDY, not_native
from pallas_kernels.target import Target


def declines(spec: GreedySpec, target: Target) -> str | None:
    """Why not: no library, several devices."""
    return not_native(target, spec.num_devices)


def run(logits: Array, target: Target) -> tuple[Array, Array]:
    """See `api.greedy`."""
    rows = logits.shape[:1]
    found = [jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.bool_)]
    token, faulty = jax.ffi.ffi_call(GREEDY, found)(logits, isa=target.native)
    return token, faulty
