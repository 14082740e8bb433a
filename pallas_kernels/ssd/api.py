"""Mamba 2's state-space recurrence (structured state-space duality, arXiv 2405.21060).

A head's state is a matrix [head_dim, state_dim], float32. With decay a < 0 and step dt > 0 of a token:

    state <- exp(dt a) state + dt x b^T        y = state c + skip x
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, mosaic, never
from pallas_kernels.ssd import reference
from pallas_kernels.states import DecodeStates, PrefillStates
from pallas_kernels.target import Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SSDInput:
    """What the recurrence reads. Heads h * heads / groups ... share the b and c of group h."""

    x: Array  # [tokens, heads, head_dim]
    b: Array  # [tokens, groups, state_dim]
    c: Array  # [tokens, groups, state_dim]
    dt: Array  # float32 [tokens, heads], positive
    a: Array  # float32 [heads], negative
    skip: Array  # float32 [heads]


@dataclass(frozen=True)
class SSDSpec:
    """What a choice depends on."""

    decode_rows: int
    prefill_tokens: int
    heads: int
    head_dim: int
    state_dim: int
    groups: int
    dtype: str
    room: int = 0  # `PrefillStates.each`


CANDIDATES: tuple[Implementation[SSDSpec], ...] = (
    mosaic("tpu", "pallas_kernels.ssd.tpu"),
    Implementation("reference", never, reference.ssd),
)


def choice(spec: SSDSpec, target: Target) -> Choice[SSDSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("ssd", CANDIDATES, spec, target)


def ssd(
    inputs: SSDInput, pool: Array, decode: DecodeStates, prefill: PrefillStates | None, *, target: Target
) -> tuple[Array, Array]:
    """(y [tokens, heads, head_dim] of x's dtype, pool); pool float32 [states, heads, head_dim, state_dim].

    Decode rows come first on the token axis. The arithmetic is float32.
    """
    spec = _spec(inputs, pool, decode.rows.shape[0], prefill.each if prefill else 0)
    return choice(spec, target).implementation.run(inputs, pool, decode, prefill, target=target)


def _spec(inputs: SSDInput, pool: Array, decode_rows: int, room: int) -> SSDSpec:
    """The call's spec, once its shapes fit together; ValueError names the numbers that do not."""
    tokens, heads, head_dim = inputs.x.shape
    _, groups, state_dim = inputs.b.shape
    if inputs.b.shape != inputs.c.shape or inputs.b.shape[0] != tokens or heads % groups:
        raise ValueError(f"b {inputs.b.shape} and c {inputs.c.shape} do not go with x {inputs.x.shape}")
    if inputs.dt.shape != (tokens, heads) or inputs.a.shape != (heads,) or inputs.skip.shape != (heads,):
        raise ValueError(f"dt {inputs.dt.shape}, a {inputs.a.shape}, skip {inputs.skip.shape} for {heads} heads")
    if pool.shape[1:] != (heads, head_dim, state_dim) or pool.dtype != "float32":
        raise ValueError(f"pool {pool.shape} {pool.dtype} must be float32 [states, {heads}, {head_dim}, {state_dim}]")
    return SSDSpec(decode_rows, tokens - decode_rows, heads, head_dim, state_dim, groups, str(inputs.x.dtype), room)
