"""greedy by the compiled CPU kernels (`pallas_kernels.native`): one pass over what XLA reads several times."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.greedy.spec import GreedySpec
from pallas_kernels.native.library import GREEDY
from pallas_kernels.target import Target


def declines(spec: GreedySpec, target: Target) -> str | None:
    """Why not: no library, several devices."""
    if target.platform != "cpu":
        return "for cpu"
    if not target.native:
        return "the native library is not there"
    if spec.num_devices > 1:  # on a CPU they stand for those of other platforms, and run what these would
        return f"for one device, not {spec.num_devices}"
    return None


def run(logits: Array, target: Target) -> tuple[Array, Array]:
    """See `api.greedy`."""
    rows = logits.shape[:1]
    found = [jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.bool_)]
    token, faulty = jax.ffi.ffi_call(GREEDY, found)(logits, isa=target.native)
    return token, faulty
