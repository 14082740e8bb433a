"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): linear attention that overwrites what it knew of a key.

A head's state is a matrix [key_dim, value_dim], float32. With log decay g <= 0 and 0 <= beta <= 1 of a token:

    state <- exp(g) state        state <- state + k (beta (v - state^T k))^T        out = state^T q
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array

from pallas_kernels.choice import Choice, Implementation, choose, mosaic, never
from pallas_kernels.gated_delta import reference
from pallas_kernels.states import DecodeStates, PrefillStates
from pallas_kernels.target import Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeltaInput:
    """What the recurrence reads. Key head h serves the value heads h * value_heads / key_heads ..."""

    q: Array  # [tokens, key_heads, key_dim]
    k: Array  # [tokens, key_heads, key_dim], of length 1
    v: Array  # [tokens, value_heads, value_dim]
    log_decay: Array  # float32 [tokens, value_heads]
    beta: Array  # float32 [tokens, value_heads]


@dataclass(frozen=True)
class DeltaSpec:
    """What a choice depends on."""

    decode_rows: int
    prefill_tokens: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    room: int = 0  # `PrefillStates.each`


CANDIDATES: tuple[Implementation[DeltaSpec], ...] = (
    mosaic("tpu", "pallas_kernels.gated_delta.tpu"),
    Implementation("reference", never, reference.gated_delta),
)


def choice(spec: DeltaSpec, target: Target) -> Choice[DeltaSpec]:
    """What serves a call of these shapes on this chip, and why not the others."""
    return choose("gated_delta", CANDIDATES, spec, target)


def gated_delta(
    inputs: DeltaInput, pool: Array, decode: DecodeStates, prefill: PrefillStates | None, *, target: Target
) -> tuple[Array, Array]:
    """(out [tokens, value_heads, value_dim] of v's dtype, pool); pool float32 [states, heads, key_dim, value_dim].

    Decode rows come first on the token axis. The arithmetic is float32.
    """
    spec = _spec(inputs, pool, decode.rows.shape[0], prefill.each if prefill else 0)
    return choice(spec, target).implementation.run(inputs, pool, decode, prefill, target=target)


def _spec(inputs: DeltaInput, pool: Array, decode_rows: int, room: int) -> DeltaSpec:
    """The call's spec, once its shapes fit together; ValueError names the numbers that do not."""
    tokens, value_heads, value_dim = inputs.v.shape
    _, key_heads, key_dim = inputs.k.shape
    if inputs.q.shape != inputs.k.shape or inputs.k.shape[0] != tokens or value_heads % key_heads:
        raise ValueError(f"q {inputs.q.shape} and k {inputs.k.shape} do not go with v {inputs.v.shape}")
    if inputs.log_decay.shape != (tokens, value_heads) or inputs.beta.shape != (tokens, value_heads):
        raise ValueError(f"log_decay {inputs.log_decay.shape} and beta {inputs.beta.shape} for {value_heads} heads")
    if pool.shape[1:] != (value_heads, key_dim, value_dim) or pool.dtype != "float32":
        raise ValueError(
            f"pool {pool.shape} {pool.dtype} must be float32 [states, {value_heads}, {key_dim}, {value_dim}]"
        )
    prefill_tokens = tokens - decode_rows
    heads = (key_heads, value_heads, key_dim, value_dim)
    return DeltaSpec(decode_rows, prefill_tokens, *heads, str(inputs.v.dtype), room)
