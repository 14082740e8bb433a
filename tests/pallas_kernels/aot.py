"""Compile one op for a chip that is not here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.mosaic.gpu import core as mosaic_gpu  # what a kernel asks of shared memory has no public name
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


@dataclass(frozen=True)
class Note:
    """What a compilation took: scratch is VMEM or shared memory of the largest kernel (None: not told), temp is HBM."""

    chip: str
    scratch_bytes: int | None
    temp_bytes: int | None


NOTES: list[Note] = []  # of the test that runs; `aot_rows` empties it between tests


def target(chip: str) -> Target:
    return Target("gpu" if chip in CHIPS["gpu"] else "tpu", chip)


def compile_op(
    function: Callable[..., Any], inputs: Sequence[Any], chip: str, donate: Sequence[int] = ()
) -> jax.stages.Compiled:
    """`function` of abstract `inputs` (trees of ShapeDtypeStruct), every one on the chip's first device."""
    place = SingleDeviceSharding(topology_devices(TOPOLOGIES[chip])[0])
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), tuple(inputs))
    with _shared_memory() as shared:
        compiled = jax.jit(function, donate_argnums=tuple(donate)).lower(*placed).compile()
    memory = compiled.memory_analysis()
    scratch = max(shared, default=None) if chip in CHIPS["gpu"] else vmem_bytes(hlo(compiled))
    NOTES.append(Note(chip, scratch, memory.temp_size_in_bytes if memory is not None else None))
    return compiled


def hlo(compiled: jax.stages.Compiled) -> str | None:
    """The optimized program's text; None where the compiler does not give it (tpu7x with some versions of libtpu)."""
    try:
        return compiled.as_text()
    except (RuntimeError, ValueError, NotImplementedError):
        return None


def vmem_bytes(text: str | None) -> int | None:
    """What libtpu gave the largest Mosaic kernel of a program, its own needs included."""
    calls = [line for line in (text or "").splitlines() if "tpu_custom_call" in line]
    used = [
        int(size)
        for line in calls
        for place in re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', line)
        for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', place)
    ]
    return max(used, default=None)


@contextmanager
def _shared_memory() -> Iterator[list[int]]:
    """Sizes of the shared memory that GPU kernels lowered inside ask for, in parts and as a whole."""
    measure = getattr(mosaic_gpu, "_smem_tree_size", None)
    found: list[int] = []
    if measure is None:
        yield found
        return

    def noted(*arguments: Any) -> int:
        found.append(measure(*arguments))
        return found[-1]

    mosaic_gpu._smem_tree_size = noted  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        mosaic_gpu._smem_tree_size = measure  # type: ignore[attr-defined]
