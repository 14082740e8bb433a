"""`states.advance` on a TPU (Mosaic): each decode row's state crosses HBM once each way, in its place in the pool; and
so with chunks of the few tokens that a verifying step tries.

Plain JAX gathers the rows, computes new ones and scatters them: three times the traffic of a step that does little
else. Grid (blocks of heads, rows): a block is read where the row's state is and written back there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.choice import not_on
from pallas_kernels.states import DecodeStates, OneToken, PrefillStates, leave_copies, put_seldom
from pallas_kernels.target import Target

_LANES, _SUBLANES = 128, 8
_BLOCK_BYTES = 1 << 20  # of a state; in VMEM it lies four times, in and out and of the next block
_MOST_TOKENS = 16  # of a chunk: they are unrolled


def declines(rows: int, room: int, state: tuple[int, int], target: Target) -> str | None:
    """Why this kernel does not serve; None: it does. rows: that decode; room: of chunks; state: of one head."""
    reason = not_on("tpu", target)
    if reason is not None:
        return reason
    if rows == 0 and room == 0:
        return "no decode rows"
    if room > _MOST_TOKENS:
        return f"chunks of {room} tokens: more than {_MOST_TOKENS}"
    if state[0] % _SUBLANES or state[1] % _LANES:
        return f"a head's state {list(state)} is not whole tiles of {_SUBLANES} x {_LANES}"
    return None


def heads_of(heads: int, state: tuple[int, int]) -> int:
    """In a block: the most that fill it and divide them; in eights, since their inputs stand in sublanes, or all."""
    fits = _BLOCK_BYTES // (4 * state[0] * state[1])
    return max((n for n in range(_SUBLANES, fits + 1, _SUBLANES) if heads % n == 0), default=heads)


def advance(
    pool: Array, states: DecodeStates, inputs: tuple[Array, ...], one: OneToken, target: Target
) -> tuple[Array, Array]:
    """See `states.advance`."""
    tokens = tuple(x[:, None] for x in inputs)
    result, pool = _through(pool, states.rows, states.active.astype(jnp.int32), tokens, one, target, keeps=True)
    return result[:, 0], leave_copies(pool, states, lambda pool: pool[states.rows])


def advance_few(
    pool: Array, states: PrefillStates, inputs: tuple[Array, ...], one: OneToken, target: Target
) -> tuple[Array, Array]:
    """Outputs [tokens, heads, n] of chunks with room for `states.each` tokens, and the pool after them; inputs float32
    [tokens, heads, ...] each."""
    tokens = tuple(x.reshape(-1, states.each, *x.shape[1:]) for x in inputs)
    keeps = states.target is not None
    if keeps:
        pool = _with_copies(pool, states, tokens, one)
    result, after = _through(pool, states.source, states.q_len, tokens, one, target, keeps=keeps)
    return result.reshape(-1, *result.shape[2:]), after


def _with_copies(pool: Array, states: PrefillStates, tokens: tuple[Array, ...], one: OneToken) -> Array:
    """The pool with the chunks' copies, made from the states before them."""

    def copies(pool: Array) -> Array:
        state = pool[states.source]
        for t in range(states.each):
            _, after = one(state, *(x[:, t] for x in tokens))
            state = jnp.where((t < states.copy_len)[:, None, None, None], after, state)
        return state

    return put_seldom(pool, states.copy_to, copies, states.copy_len > 0)


def _through(
    pool: Array, rows: Array, lens: Array, inputs: tuple[Array, ...], one: OneToken, target: Target, *, keeps: bool
) -> tuple[Array, Array]:
    """Outputs [rows, tokens, heads, n] of inputs [rows, tokens, heads, ...], zeros past each row's first `lens`, and
    the pool, in which the states at `rows` are taken as far if it keeps them."""
    (count, tokens), (_, heads, *state) = inputs[0].shape[:2], pool.shape
    block = heads_of(heads, (state[0], state[1]))
    shapes = [jax.ShapeDtypeStruct((heads, *x.shape[3:]), x.dtype) for x in inputs]
    out, _ = jax.eval_shape(one, jax.ShapeDtypeStruct(pool.shape[1:], pool.dtype), *shapes)

    def by_row(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, tokens, block, x.shape[-1]), lambda h, r, *_: (r, 0, h, 0))

    in_place = pl.BlockSpec((None, block, *state), lambda h, r, at, _: (at[r], h, 0, 0))
    results = (
        jax.ShapeDtypeStruct((count, tokens, *out.shape), out.dtype),
        jax.ShapeDtypeStruct(pool.shape, pool.dtype),
    )
    result, *kept = pl.pallas_call(
        partial(_step, one, tokens, len(inputs)),
        out_shape=results if keeps else results[:1],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads // block, count),
            in_specs=[in_place, *map(by_row, inputs)],
            out_specs=[by_row(out), in_place] if keeps else [by_row(out)],
        ),
        input_output_aliases={2: 1} if keeps else {},
        # Rows of nobody share a state, which every one of them writes back as it was.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=pltpu.InterpretParams(detect_races=True) if target.interpret else False,
        name="advance_states",
    )(rows, lens, pool, *inputs)
    return result, kept[0] if keeps else pool


def _step(one: OneToken, tokens: int, num_inputs: int, rows: Any, lens: Any, state: Any, *refs: Any) -> None:
    """One block of heads of one row."""
    inputs, out, kept = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    value = state[...]
    for t in range(tokens):
        result, after = one(value, *(x[t] for x in inputs))
        counts = t < lens[pl.program_id(1)]
        out[t] = jnp.where(counts, result, 0)
        value = jnp.where(counts, after, value)
    for new_state in kept:
        new_state[...] = value
