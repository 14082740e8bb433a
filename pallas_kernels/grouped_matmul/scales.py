"""Which scales of packed experts the kernels serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels.grouped_matmul.api import GroupedSpec

MOST_ROWS = 512  # that share a scale, unless a column has one


def declines_scales(spec: GroupedSpec) -> str | None:
    """Why no kernel serves a packed weight's scales and activations; None: they do."""
    if spec.scale_dtype not in ("float32", "bfloat16"):
        return f"scales are {spec.scale_dtype}; float32 and bfloat16 are served"
    if spec.activations == "dynamic_32":
        return "activations with a scale for every 32"
    if spec.group == spec.k and not spec.offsets:
        return None
    if spec.activations == "dynamic":
        return f"dynamic activations with groups of {spec.group}; one scale a column is served"
    if spec.group % 32 or spec.group > MOST_ROWS:
        return f"groups of {spec.group} rows; multiples of 32 up to {MOST_ROWS} are served"
    return None
