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
from pallas_kernels.states import DecodeStates, PrefillStates, replace_active, walk

if TYPE_CHECKING:
    from pallas_kernels.ssd.api import SSDInput

BLOCK_TOKENS = 128  # products inside a block grow with it, those with the state shrink


def ssd(inputs: SSDInput, pool: Array, decode: DecodeStates, prefill: PrefillStates | None) -> tuple[Array, Array]:
    """See `api.ssd`."""
    num_decode, x = decode.rows.shape[0], inputs.x
    per_token = tuple(a.astype(jnp.float32) for a in (x, inputs.b, inputs.c, inputs.dt))
    parts = []
    if num_decode:
        out, states = _one_token(inputs.a, pool[decode.rows], *(a[:num_decode] for a in per_token))
        pool = replace_active(pool, decode, states)
        parts.append(out)
    if prefill is not None:
        rest = tuple(a[num_decode:] for a in per_token)
        shape = jax.ShapeDtypeStruct(rest[0].shape, jnp.float32)
        out, pool = walk(pool, prefill, rest, shape, BLOCK_TOKENS, partial(_block, inputs.a))
        parts.append(out)
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return (out + per_token[0] * inputs.skip[None, :, None]).astype(x.dtype), pool


def _one_token(a: Array, states: Array, x: Array, b: Array, c: Array, dt: Array) -> tuple[Array, Array]:
    """[rows, heads, head_dim] and the states [rows, heads, head_dim, state_dim] after one token a row."""
    rows, groups, state_dim = b.shape
    by_group = (rows, groups, -1)
    decay = jnp.exp(dt * a[None]).reshape(*by_group, 1, 1)
    added = (x * dt[..., None]).reshape(*by_group, x.shape[2], 1) * b[:, :, None, None]
    states = states.reshape(*by_group, x.shape[2], state_dim) * decay + added
    out = jnp.sum(states * c[:, :, None, None], axis=-1)
    return out.reshape(x.shape), states.reshape(rows, *x.shape[1:], state_dim)


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
