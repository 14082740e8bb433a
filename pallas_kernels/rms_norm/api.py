"""Root-mean-square norms (arXiv 1910.07467): the public functions, their checks, and the choice of implementation.

x is [..., size] in float32, bfloat16 or float16 and normed over its last axis, in float32; the result has x's dtype.
weight is [size], or has more of x's last dimensions. num_devices: that share the model.
"""

from __future__ import annotations

from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, never
from pallas_kernels.rms_norm import cpu, reference
from pallas_kernels.rms_norm.spec import NormSpec
from pallas_kernels.target import Target

CANDIDATES: tuple[Implementation[NormSpec], ...] = (
    Implementation("cpu", cpu.declines, cpu.run),
    Implementation("reference", never, reference.run),
)


def choice(spec: NormSpec, target: Target) -> Choice[NormSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("rms_norm", CANDIDATES, spec, target)


def rms_norm(x: Array, weight: Array, eps: float, *, target: Target, num_devices: int = 1) -> Array:
    """x / sqrt(mean(x ** 2) + eps) * weight, rounded once."""
    run = choice(_spec_of(x, weight, num_devices), target).implementation.run
    return run(x, None, weight, eps, target)[1]


def add_rms_norm(
    x: Array, y: Array, weight: Array, eps: float, *, target: Target, num_devices: int = 1
) -> tuple[Array, Array]:
    """(x + y rounded to their dtype, the `rms_norm` of that)."""
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"x is {x.dtype} {x.shape}, y is {y.dtype} {y.shape}")
    run = choice(_spec_of(x, weight, num_devices), target).implementation.run
    return run(x, y, weight, eps, target)


def _spec_of(x: Array, weight: Array, num_devices: int) -> NormSpec:
    if not 1 <= weight.ndim <= x.ndim or x.shape[-weight.ndim :] != weight.shape:
        raise ValueError(f"the weight {weight.shape} has not the last dimensions of x {x.shape}")
    return NormSpec(x.shape[-1], str(x.dtype), num_devices)
