"""Mixture of experts: each row of x times the weight of its expert.

Rows are sorted by expert. A row's result does not depend, bit for bit, on the other rows of the
call or on where the borders between the groups fall: its sum over K has one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, mosaic, never
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quantized import Activations, Quantized, WeightFormat, check_left, check_packed
from pallas_kernels.target import Target


@dataclass(frozen=True)
class GroupedSpec:
    """What a choice depends on."""

    tokens: int
    k: int
    n: int
    experts: int
    dtype: str  # of x and the result, and of w unless it is quantized
    format: WeightFormat | Literal["none"] = "none"
    group: int = 0  # rows that share a scale; 0 without scales
    offsets: bool = False
    activations: Activations = "float"
    scale_dtype: str = "float32"


CANDIDATES: tuple[Implementation[GroupedSpec], ...] = (
    mosaic("tpu", "pallas_kernels.grouped_matmul.tpu"),
    mosaic("gpu", "pallas_kernels.grouped_matmul.gpu"),
    Implementation("reference", never, reference.run),
)


def choice(spec: GroupedSpec, target: Target) -> Choice[GroupedSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("grouped_matmul", CANDIDATES, spec, target)


def grouped_matmul(x: Array, w: Array | Quantized, group_sizes: Array, *, target: Target) -> Array:
    """x [tokens, K] by w [experts, K, N] -> [tokens, N] in x.dtype, accumulated in float32.

    group_sizes: int32 [experts]; the first group_sizes[0] rows of x belong to expert 0, the next
    group_sizes[1] to expert 1, and so on. Rows past their sum belong to nobody: they come back
    undefined but finite, and may hold anything, NaN included. A sum beyond `tokens` is cut off.
    """
    run = choice(spec_of(x, w, group_sizes), target).implementation.run
    return run(x, w, group_sizes, target=target)


def spec_of(x: Any, w: Any, group_sizes: Any) -> GroupedSpec:
    """A call's spec, of arrays or abstract ones; ValueError names the numbers that do not fit together."""
    if x.ndim != 2 or len(w.shape) != 3:
        raise ValueError(f"x {x.shape} must be [tokens, K] and w {w.shape} [experts, K, N]")
    (tokens, k), (experts, rows, n) = x.shape, w.shape
    check_left(x, rows)
    if group_sizes.shape != (experts,) or str(group_sizes.dtype) != "int32":
        raise ValueError(f"group_sizes {group_sizes.dtype} {group_sizes.shape} must be int32 ({experts},)")
    if not isinstance(w, Quantized):
        if w.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype}, the weight {w.dtype}; only a Quantized may differ from x")
        return GroupedSpec(tokens, k, n, experts, str(x.dtype))
    check_packed(w)
    return GroupedSpec(
        tokens=tokens,
        k=k,
        n=n,
        experts=experts,
        dtype=str(x.dtype),
        format=w.format,
        group=w.group,
        offsets=w.offsets is not None,
        activations=w.activations,
        scale_dtype=str(w.scales.dtype),
    )
