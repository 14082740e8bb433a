"""Recurrent states beside the pages: a pool with one state a row, and how a step's tokens walk through it.

Tokens stand on a flat axis: decode rows with one token each, then chunks of prompts. A chunk starts from
zeros or from any row of the pool and leaves its state in its own row; on its way it can leave a copy in a
third. All rows are read before one is written, but that a decode row's copy may come first: no chunk of its
step starts from there. Knows nothing about what a state means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.target import Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeStates:
    """The decode rows' states: int32 and bool [rows]. An inactive row's state stays as it is."""

    rows: Array
    active: Array
    copy_to: Array | None = None  # int32, row that gets a copy of the state after the token; negative: none does


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillStates:
    """The chunks' states, int32 [rows]. Idle rows have no tokens and are last.

    With `each` every chunk has room for so many tokens and continues the state in its own row, so that source is
    target, if there is one; idle rows may be anywhere.
    """

    q_start: Array  # first token, counted from the first prefill token
    q_len: Array
    source: Array  # row of the pool that the chunk continues from; negative: zeros
    target: Array | None  # row that holds the state after the chunk; None: the pool stays as it is
    copy_to: Array  # row that gets a copy; negative: none does
    copy_at: Array  # after so many tokens of the chunk, 1 to q_len
    each: int = field(default=0, metadata={"static": True})  # few tokens; 0: chunks of any length

    @property
    def copy_len(self) -> Array:
        """copy_at, and 0 for rows without a copy."""
        return jnp.where(self.copy_to >= 0, self.copy_at, 0)


def rows_of_their_own(q_start: Array, q_len: Array, rows: Array, each: int) -> PrefillStates:
    """Chunks with room for `each` tokens that continue the states in `rows`, and leave no copy."""
    return PrefillStates(q_start, q_len, rows, rows, jnp.full_like(rows, -1), jnp.zeros_like(rows), each=each)


# step(state [...], inputs [tokens, ...] each) -> (state, outputs [tokens, ...]). Inputs that are all zero
# must leave the state as it is.
Step = Callable[[Array, tuple[Array, ...]], tuple[Array, Array]]


# one(state [..., a, b], inputs [..., n] each) -> (output [..., n], state): a token of a head, for any dimensions ahead.
OneToken = Callable[..., tuple[Array, Array]]


# advance(pool, states, inputs, one, target) -> (outputs, pool): takes rows that `states` tell of through their tokens.
Advance = Callable[..., tuple[Array, Array]]


def advance(
    pool: Array, states: DecodeStates, inputs: tuple[Array, ...], one: OneToken, target: Target
) -> tuple[Array, Array]:
    """Outputs [rows, heads, n] of the decode rows, inputs float32 [rows, heads, ...] each, and the pool after them."""
    out, new = one(pool[states.rows], *inputs)
    return out, replace_active(pool, states, new)


def replace_active(pool: Array, states: DecodeStates, new: Array) -> Array:
    """The pool with `new` [rows, ...] in the rows that are active, and where they leave a copy."""
    return leave_copies(put(pool, states.rows, new, states.active), states, lambda pool: new)


def leave_copies(pool: Array, states: DecodeStates, new: Callable[[Array], Array]) -> Array:
    """The pool with copies of `new(pool)` [rows, ...] where active rows leave one."""
    copy_to = states.copy_to
    if copy_to is None:
        return pool
    return put_seldom(pool, copy_to, new, states.active & (copy_to >= 0))


def sources(pool: Array, states: PrefillStates) -> Array:
    """[rows, ...]: what each chunk starts from."""
    fresh = (states.source < 0).reshape(-1, *(1,) * (pool.ndim - 1))
    return jnp.where(fresh, jnp.zeros((), pool.dtype), pool[jnp.maximum(states.source, 0)])


def keep(pool: Array, states: PrefillStates, last: Array, copies: Callable[[], Array]) -> Array:
    """The pool with each chunk's last state and copy, both [rows, ...]."""
    if states.target is None:
        return pool
    pool, copied = put(pool, states.target, last, states.q_len > 0), states.copy_len > 0
    if not states.each:
        return put(pool, states.copy_to, copies(), copied)
    return put_seldom(pool, states.copy_to, lambda pool: copies(), copied)


def put_seldom(pool: Array, rows: Array, new: Callable[[Array], Array], mask: Array) -> Array:
    """`put` of `new(pool)`, which is mostly nothing: a scatter that writes nothing still reads every state."""
    return jax.lax.cond(jnp.any(mask), lambda pool: put(pool, rows, new(pool), mask), lambda pool: pool, pool)


def put(pool: Array, rows: Array, new: Array, mask: Array) -> Array:
    """The pool with `new` [rows, ...] in `rows` where `mask` is."""
    out_of_range = jnp.int32(pool.shape[0])
    return pool.at[jnp.where(mask, rows, out_of_range)].set(new.astype(pool.dtype), mode="drop")


def walk(
    pool: Array, states: PrefillStates, inputs: tuple[Array, ...], out: jax.ShapeDtypeStruct, block: int, step: Step
) -> tuple[Array, Array]:
    """Outputs of every prefill token, `out` (zeros for tokens of nobody), and the pool after the chunks.

    Each chunk is cut into blocks of at most `block` tokens, and where its copy is taken; the loop ends with the
    real tokens. A block's inputs [tokens, ...] are zero behind its end: no row sees another's numbers.
    """
    if states.each:
        return _walk_equal(pool, states, inputs, step)
    tokens = out.shape[0]
    block = min(block, tokens)
    padded = tuple(jnp.pad(x, ((0, block), *((0, 0),) * (x.ndim - 1))) for x in inputs)
    until_copy, lens = states.copy_len, states.q_len
    early = -(-until_copy // block)
    num_blocks = early + -(-(lens - until_copy) // block)
    blocks_before = jnp.cumsum(num_blocks) - num_blocks
    index = jnp.arange(block, dtype=jnp.int32)

    def one_block(b: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        last, copies, result = carry
        row = jnp.sum(b >= blocks_before) - 1  # idle rows are last: their blocks start past the end
        i = b - blocks_before[row]
        is_early = i < early[row]
        start = jnp.where(is_early, i * block, until_copy[row] + (i - early[row]) * block)
        end = jnp.minimum(start + block, jnp.where(is_early, until_copy[row], lens[row]))
        mine, first = index < end - start, states.q_start[row] + start
        cut = tuple(_masked(mine, jax.lax.dynamic_slice_in_dim(x, first, block), 0) for x in padded)
        state, values = step(last[row], cut)
        values = _masked(mine, values.astype(out.dtype), jax.lax.dynamic_slice_in_dim(result, first, block))
        copies = copies.at[row].set(jnp.where(is_early, state, copies[row]))
        return last.at[row].set(state), copies, jax.lax.dynamic_update_slice_in_dim(result, values, first, axis=0)

    start = sources(pool, states).astype(jnp.float32)
    result = jnp.zeros((tokens + block, *out.shape[1:]), out.dtype)
    carry = (start, jnp.zeros_like(start), result)
    last, copies, result = jax.lax.fori_loop(0, jnp.sum(num_blocks), one_block, carry)
    return result[:tokens], keep(pool, states, last, lambda: copies)


def _walk_equal(pool: Array, states: PrefillStates, inputs: tuple[Array, ...], step: Step) -> tuple[Array, Array]:
    """`walk` with the same room for every chunk: one block each, all at once."""
    start, index = sources(pool, states).astype(jnp.float32), jnp.arange(states.each, dtype=jnp.int32)

    def after(count: Array) -> tuple[Array, Array]:
        mine = (index[None] < count[:, None]).reshape(-1)
        cut = (_masked(mine, x, 0).reshape(-1, states.each, *x.shape[1:]) for x in inputs)
        state, values = jax.vmap(step)(start, tuple(cut))
        return state, _masked(mine, values.reshape(-1, *values.shape[2:]), 0)

    last, result = after(states.q_len)
    return result, keep(pool, states, last, lambda: after(states.copy_len)[0])


def _masked(mine: Array, values: Array, other: Array | int) -> Array:
    """`values` where the token is `mine`, else `other`: NaN times zero would be NaN."""
    other = jnp.asarray(other, values.dtype)
    return jnp.where(mine.reshape(-1, *(1,) * (values.ndim - 1)), values, other)
