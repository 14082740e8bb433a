"""Compile one op for a chip that is not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from pallas_kernels.target import Target
from sharding.topology import topology_devices

TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
    "h100": "h100:1",
    "h200": "h200:1",
}
CHIPS = {"tpu": ("v5e", "v5p", "v6e", "tpu7x"), "gpu": ("h100", "h200")}


def target(chip: str) -> Target:
    return Target("gpu" if chip in CHIPS["gpu"] else "tpu", chip)


def compile_op(
    function: Callable[..., Any], inputs: Sequence[Any], chip: str, donate: Sequence[int] = ()
) -> jax.stages.Compiled:
    """`function` of abstract `inputs` (trees of ShapeDtypeStruct), every one on the chip's first device."""
    place = SingleDeviceSharding(topology_devices(TOPOLOGIES[chip])[0])
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), tuple(inputs))
    return jax.jit(function, donate_argnums=tuple(donate)).lower(*placed).compile()


def hlo(compiled: jax.stages.Compiled) -> str | None:
    """The optimized program's text; None where the compiler does not give it (tpu7x with today's libtpu)."""
    try:
        return compiled.as_text()
    except (RuntimeError, ValueError, NotImplementedError):
        return None
