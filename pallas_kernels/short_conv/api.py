"""The short causal convolution in front of a recurrence (Mamba, arXiv 2312.00752; DeltaNet), channel by channel.

Its memory is a window: the inputs of the sequence's last width - 1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, never
from pallas_kernels.short_conv import reference
from pallas_kernels.states import DecodeStates, PrefillStates
from pallas_kernels.target import Target


@dataclass(frozen=True)
class ConvSpec:
    """What a choice depends on."""

    decode_rows: int
    prefill_tokens: int
    channels: int
    width: int  # taps
    dtype: str


CANDIDATES: tuple[Implementation[ConvSpec], ...] = (Implementation("reference", never, reference.short_conv),)


def choice(spec: ConvSpec, target: Target) -> Choice[ConvSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("short_conv", CANDIDATES, spec, target)


def short_conv(
    x: Array,
    pool: Array,
    weight: Array,
    bias: Array | None,
    decode: DecodeStates,
    prefill: PrefillStates | None,
    *,
    target: Target,
) -> tuple[Array, Array]:
    """(out, pool): out[t] = bias + sum of weight[i] * x[t - width + 1 + i] over i, within t's sequence.

    x [tokens, channels], decode rows first; pool [states, (width - 1) * channels] of x's dtype, the oldest
    token first; weight [width, channels], bias [channels]. Summed in float32; out is of x's dtype.
    """
    width, channels = weight.shape
    if x.ndim != 2 or x.shape[1] != channels:
        raise ValueError(f"x {x.shape} must be [tokens, {channels}], the weight's channels")
    if pool.ndim != 2 or pool.shape[1] != (width - 1) * channels or pool.dtype != x.dtype:
        raise ValueError(f"pool {pool.shape} {pool.dtype} must be [states, {(width - 1) * channels}] of {x.dtype}")
    num_decode = decode.rows.shape[0]
    spec = ConvSpec(num_decode, x.shape[0] - num_decode, channels, width, str(x.dtype))
    return choice(spec, target).implementation.run(x, pool, weight, bias, decode, prefill)
