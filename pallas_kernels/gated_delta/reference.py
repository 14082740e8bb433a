"""The gated delta rule in plain JAX: a step for decode rows, matrix products over blocks of a prompt's tokens.

Within a block, what token t writes depends on what the tokens before it wrote: a triangular system over the
block, solved at once (arXiv 2412.06464, section 3.3, and 2406.06484).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.products import product
from pallas_kernels.states import Advance, DecodeStates, PrefillStates, advance, walk
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.gated_delta.api import DeltaInput

BLOCK_TOKENS = 64  # the triangular system grows with its square


def gated_delta(
    inputs: DeltaInput,
    pool: Array,
    decode: DecodeStates,
    prefill: PrefillStates | None,
    target: Target,
    advance: Advance = advance,
    advance_few: Advance | None = None,
) -> tuple[Array, Array]:
    """See `api.gated_delta`. advance: how decode rows are taken one token on; advance_few: chunks with room for as few
    each."""
    num_decode = decode.rows.shape[0]
    group = inputs.v.shape[1] // inputs.k.shape[1]
    q, k, v = (a.astype(jnp.float32) for a in (inputs.q, inputs.k, inputs.v))
    q, k = (jnp.repeat(a, group, axis=1) for a in (q, k))
    per_token = (q, k, v, inputs.log_decay, inputs.beta)
    parts = []
    if num_decode:
        own = (a[:num_decode] for a in per_token)
        out, pool = advance(pool, decode, _tokens(*own), one_token, target)
        parts.append(out)
    if prefill is not None:
        rest = tuple(a[num_decode:] for a in per_token)
        if prefill.each and advance_few is not None:
            out, pool = advance_few(pool, prefill, _tokens(*rest), one_token, target)
        else:
            shape = jax.ShapeDtypeStruct(rest[2].shape, jnp.float32)
            out, pool = walk(pool, prefill, rest, shape, BLOCK_TOKENS, _block)
        parts.append(out)
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return out.astype(inputs.v.dtype), pool


def _tokens(q: Array, k: Array, v: Array, log_decay: Array, beta: Array) -> tuple[Array, ...]:
    """What `one_token` takes, [tokens, heads, ...]."""
    return q, k, v, jnp.exp(log_decay)[..., None], beta[..., None]


def one_token(state: Array, q: Array, k: Array, v: Array, decay: Array, beta: Array) -> tuple[Array, Array]:
    """[..., value_dim] and the state [..., key_dim, value_dim] after a token; decay and beta [..., 1]."""
    state = state * decay[..., None]
    known = jnp.sum(state * k[..., None], axis=-2)
    state = state + k[..., None] * ((v - known) * beta)[..., None, :]
    return jnp.sum(state * q[..., None], axis=-2), state


def _block(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One block of one sequence: the state [heads, key_dim, value_dim] after it, and out [tokens, heads, value_dim]."""
    q, k, v, log_decay, beta = (jnp.swapaxes(a, 0, 1) for a in inputs)  # heads first
    decay = jnp.cumsum(log_decay, axis=1)
    since = jnp.exp(decay)[..., None]  # of the state before the block, at t
    index = jnp.arange(decay.shape[1])
    seen = (index[:, None] >= index[None, :])[None]
    between = jnp.exp(jnp.where(seen, decay[:, :, None] - decay[:, None, :], -jnp.inf))  # of what s wrote, at t
    weight = beta[:, :, None] * product("htk,hsk->hts", k, k) * between
    known = product("htk,hkv->htv", k, state) * since
    written = product("hts,hsv->htv", unit_lower_inverse(weight), (v - known) * beta[..., None])
    inside = product("hts,hsv->htv", product("htk,hsk->hts", q, k) * between, written)
    out = product("htk,hkv->htv", q, state) * since + inside
    left = k * jnp.exp(decay[:, -1:] - decay)[..., None]
    state = state * jnp.exp(decay[:, -1])[:, None, None] + product("htk,htv->hkv", left, written)
    return state, jnp.swapaxes(out, 0, 1)


def unit_lower_inverse(matrix: Array) -> Array:
    """Inverse of 1 + the strictly lower part of [batch, n, n], by halves: of (A 0; B C) it is (a 0; -cBa c).

    Products only, of inverses of diagonal blocks: as stable as substitution, unlike powers of the matrix.
    """
    batch, n, _ = matrix.shape
    size = 1 << (n - 1).bit_length()
    matrix = jnp.pad(matrix, ((0, 0), (0, size - n), (0, size - n)))
    inverse = jnp.ones((batch, size, 1, 1), matrix.dtype)  # of each diagonal block
    while inverse.shape[1] > 1:
        pairs, half = inverse.shape[1] // 2, inverse.shape[2]
        grid = matrix.reshape(batch, pairs, 2 * half, pairs, 2 * half)
        blocks = jnp.moveaxis(jnp.diagonal(grid, axis1=1, axis2=3), -1, 1)
        upper, lower = inverse[:, 0::2], inverse[:, 1::2]
        corner = product("bpij,bpjk->bpik", blocks[:, :, half:, :half], upper)
        corner = -product("bpij,bpjk->bpik", lower, corner)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=3)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=3)], axis=2)
    return inverse[:, 0, :n, :n]
