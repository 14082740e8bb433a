"""Mamba 2's recurrence in plain JAX: a step for decode rows, matrix products over blocks of a prompt's tokens.

Within a block, token t sees the block's tokens s <= t with weight exp(sum of dt a over (s, t]) (c_t . b_s) dt_s,
and the state before the block decayed to t (arXiv 2405.21060, section 6).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.products import product
from pallas_kernels.states import Advance, DecodeStates, PrefillStates, advance, walk
from pallas_kernels.target import Target

if TYPE_CHECKING:
    from pallas_kernels.ssd.api import SSDInput

BLOCK_TOKENS = 128  # products inside a block grow with it, those with the state shrink


def ssd(
    inputs: SSDInput,
    pool: Array,
    decode: DecodeStates,
    prefill: PrefillStates | None,
    target: Target,
    advance: Advance = advance,
    advance_few: Advance | None = None,
) -> tuple[Array, Array]:
    """See `api.ssd`. advance: how decode rows are taken one token on; advance_few: chunks with room for as few each."""
    num_decode = decode.rows.shape[0]
    per_token = tuple(a.astype(jnp.float32) for a in (inputs.x, inputs.b, inputs.c, inputs.dt))
    parts = []
    if num_decode:
        own = tuple(a[:num_decode] for a in per_token)
        out, pool = advance(pool, decode, _tokens(inputs.a, *own), one_token, target)
        parts.append(out)
    if prefill is not None:
        rest = tuple(a[num_decode:] for a in per_token)
        if prefill.each and advance_few is not None:
            out, pool = advance_few(pool, prefill, _tokens(inputs.a, *rest), one_token, target)
        else:
            shape = jax.ShapeDtypeStruct(rest[0].shape, jnp.float32)
            out, pool = walk(pool, prefill, rest, shape, BLOCK_TOKENS, partial(_block, inputs.a))
        parts.append(out)
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return (out + per_token[0] * inputs.skip[None, :, None]).astype(inputs.x.dtype), pool


def _tokens(a: Array, x: Array, b: Array, c: Array, dt: Array) -> tuple[Array, ...]:
    """What `one_token` takes, [tokens, heads, ...]."""
    b, c = (jnp.repeat(each, x.shape[1] // each.shape[1], axis=1) for each in (b, c))
    return x * dt[..., None], b, c, jnp.exp(dt * a[None])[..., None]


def one_token(state: Array, x: Array, b: Array, c: Array, decay: Array) -> tuple[Array, Array]:
    """[..., head_dim] and the state [..., head_dim, state_dim] after a token; x times dt, b and c of its group, decay
    [..., 1]."""
    state = state * decay[..., None] + x[..., None] * b[..., None, :]
    return jnp.sum(state * c[..., None, :], axis=-1), state


def _block(a: Array, state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One block of one sequence: the state [heads, head_dim, state_dim] after it, and y [tokens, heads, head_dim]."""
    x, b, c, dt = inputs
    tokens, groups, state_dim = b.shape
    x = (x * dt[..., None]).reshape(tokens, groups, -1, x.shape[2])  # [tokens, groups, heads of one, head_dim]
    decay = jnp.cumsum(dt * a[None], axis=0).reshape(tokens, groups, -1)
    old = state.reshape(groups, -1, x.shape[3], state_dim)
    index = jnp.arange(tokens)
    seen = (index[:, None] >= index[None, :])[:, :, None, None]
    between = jnp.exp(jnp.where(seen, decay[:, None] - decay[None, :], -jnp.inf))  # of what s gave, at t
    scores = product("tgn,sgn->tsg", c, b)[..., None] * between
    inside = product("tsgh,sghp->tghp", scores, x)
    before = product("tgn,ghpn->tghp", c, old) * jnp.exp(decay)[..., None]
    left = x * jnp.exp(decay[-1:] - decay)[..., None]
    new = old * jnp.exp(decay[-1])[..., None, None] + product("tghp,tgn->ghpn", left, b)
    return new.reshape(state.shape), (inside + before).reshape(tokens, -1, x.shape[3])
