"""What every Mosaic GPU kernel here asks first."""

from __future__ import annotations

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.choice import not_on
from pallas_kernels.target import Target


def not_on_hopper(target: Target) -> str | None:
    """Why no kernel of wgmma and TMA can run; None: it can."""
    reason = not_on("gpu", target)
    if reason is not None:
        return reason
    capability = target.facts.capability if target.facts else None
    if capability != (9, 0):
        return f"compute capability {capability}; wgmma is Hopper's, 9.0"
    if target.interpret and not hasattr(plgpu, "InterpretGPUParams"):
        return "this JAX has no interpreter of Mosaic GPU kernels"
    return None
