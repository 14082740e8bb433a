"""act(gate) * up of an MLP: the public function, its checks, and the choice of implementation."""

from __future__ import annotations

from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, never
from pallas_kernels.gated import cpu, reference
from pallas_kernels.gated.spec import GatedSpec
from pallas_kernels.target import Target

CANDIDATES: tuple[Implementation[GatedSpec], ...] = (
    Implementation("cpu", cpu.declines, cpu.run),
    Implementation("reference", never, reference.run),
)


def choice(spec: GatedSpec, target: Target) -> Choice[GatedSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("gated", CANDIDATES, spec, target)


def gated(x: Array, activation: str, block: int, *, target: Target, clamp: float | None = None) -> Array:
    """[tokens, size] of x [tokens, 2 * size], where gate and up stand in turns of `block` columns; of x's dtype.

    The activation is computed in float32 and rounded before it is multiplied. clamp: gpt-oss's instead of
    `activation`, gate * sigmoid(1.702 * gate) * (up + 1) of clamped numbers.
    """
    if x.ndim != 2 or x.shape[1] % (2 * block):
        raise ValueError(f"x {x.shape} has no pairs of blocks of {block} columns")
    spec = GatedSpec(block, str(x.dtype), activation, clamped=clamp is not None)
    return choice(spec, target).implementation.run(x, activation, block, clamp, target)
