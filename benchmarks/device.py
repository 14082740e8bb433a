"""The accelerator at hand: what kernels call it, how fast it copies and multiplies, how long a program takes.

A program is timed as a loop on the device: every turn's inputs depend on the turn before (by one
number; an optimization barrier is not enough, XLA hoists what stands behind it), so nothing is left
out, overlapped or hoisted, and dispatch costs one program's, not one turn's. The clock stops
when the device has finished (`block_until_ready`). A GPU's L2 holds what small cases read, so their
weights or pages exist in several copies that take turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from engine.device import chip_name
from pallas_kernels.target import Target
from sharding.topology import GPUS

SAMPLES = 7
SAMPLE_S = 0.02  # of device time at least, so that the end of the clock is a thousandth of it
MAX_TURNS = 512
MAX_COPIES = 4


def target_here() -> Target:
    """The target of the process's first device."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Target()
    return Target("tpu" if device.platform == "tpu" else "gpu", chip_name(device.device_kind))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call; `samples` are of the same program run again."""

    median_s: float
    least_s: float
    samples: int
    turns: int  # of the loop in one sample
    copies: int  # of the fixed inputs that took turns


@dataclass(frozen=True)
class Rates:
    """Measured, not from a data sheet."""

    copy_bytes_per_s: float  # read and written
    matmul_flops: float  # bfloat16 into float32 sums


def looped(function: Callable[..., Array], turns: int, carried: bool = False) -> Callable[..., Any]:
    """A program of `turns` rounds of function(*moving, *fixed) over `sets` of the fixed inputs.

    carried: the function returns its only fixed input, written in place; so does the program, last of a pair.
    """

    def in_place(moving: tuple[Any, ...], sets: Sequence[tuple[Any, ...]]) -> Any:
        def turn(_: Array, carry: Any) -> Any:
            seed, moving, last = carry  # reading an element of 8-bit pages would copy them all on a TPU
            moving = jax.tree.map(partial(_touched, seed), moving)
            return 0.999 * seed, moving, function(*moving, last)

        seed = sum((leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(moving)), jnp.float32(1))
        return lax.fori_loop(0, turns, turn, (seed, moving, sets[0][0]))[1:]

    def program(moving: tuple[Any, ...], sets: Sequence[tuple[Any, ...]]) -> Any:

        def turn(_: Array, carry: Any) -> Any:
            moving, results = carry
            fresh = []
            for fixed, last in zip(sets, results, strict=True):
                moving = jax.tree.map(partial(_touched, last[(0,) * last.ndim]), moving)
                fresh.append(function(*moving, *fixed))
            return moving, fresh

        shape = jax.eval_shape(function, *moving, *sets[0])
        return lax.fori_loop(0, turns, turn, (moving, [jnp.zeros(shape.shape, shape.dtype) for _ in sets]))

    return in_place if carried else program


def _touched(number: Array, leaf: Array) -> Array:
    """`leaf`, in place, with something added to its first element that only the device knows to be 0."""
    return leaf.at[(0,) * leaf.ndim].add((number.astype(jnp.float32) > 3e38).astype(leaf.dtype))


def rebound(loop: Callable[..., Any], moving: Any, fixed: Any) -> Callable[[], Any]:
    """Runs of a carried loop that consumes its inputs: each takes the last one's results."""
    held = [moving, fixed[0]]

    def run() -> Any:
        held[:] = loop(held[0], [(held[1],)])
        return held[1]

    return run


def turns_for(expected_s: float) -> int:
    """Rounds that take about a sample's time at the rate that the hardware allows."""
    return max(1, min(MAX_TURNS, math.ceil(SAMPLE_S / 2 / max(expected_s, 1e-9))))


def copies_for(fixed_bytes: int, target: Target) -> int:
    """How many copies of the fixed inputs outgrow a GPU's L2 twice, up to 4; 1 elsewhere."""
    chip = GPUS.get(target.chip)
    if chip is None:
        return 1
    return max(1, min(MAX_COPIES, math.ceil(2 * chip.l2_bytes / max(fixed_bytes, 1))))


def timed(run: Callable[[], Any], turns: int, copies: int = 1, longest_s: float = 3.0) -> Timing:
    """Median over samples of `run`, which does turns * copies calls; fewer samples where they are slow."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    first_s = time.perf_counter() - start
    repeats = max(1, math.ceil(SAMPLE_S / first_s))
    samples = max(2, min(SAMPLES, int(longest_s / (first_s * repeats))))
    seconds = []
    for _ in range(samples):
        start = time.perf_counter()
        out = None
        for _ in range(repeats):  # the device runs them one after the other
            out = run()
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / (repeats * turns * copies))
    return Timing(statistics.median(seconds), min(seconds), samples, turns, copies)


def measure_rates(small: bool) -> Rates:
    """Copying 1 GiB (64 MiB if small) to and fro, and a square bfloat16 product of 8192 (512)."""
    numbers, side, turns = (1 << 24, 512, 2) if small else (1 << 28, 8192, 16)
    source = jnp.arange(numbers, dtype=jnp.int32)
    add = jax.jit(looped(lambda x: x + 1, turns, carried=True), donate_argnums=(0, 1))
    copy = timed(rebound(add, (), (source,)), turns)
    x, y = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    product = jax.jit(looped(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype), turns))
    matmul = timed(lambda: product((x,), ((y,),)), turns)
    return Rates(2 * 4 * numbers / copy.median_s, 2 * side**3 / matmul.median_s)
