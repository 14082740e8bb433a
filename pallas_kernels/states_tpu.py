"""`states.advance` on a TPU (Mosaic): each decode row's state crosses HBM once each way, in its place in the pool.

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
from pallas_kernels.states import DecodeStates, OneToken, leave_copies
from pallas_kernels.target import Target

_LANES, _SUBLANES = 128, 8
_BLOCK_BYTES = 1 << 20  # of a state; in VMEM it lies four times, in and out and of the next block


def declines(rows: int, heads: int, state: tuple[int, int], target: Target) -> str | None:
    """Why this kernel does not serve; None: it does. state: of one head."""
    reason = not_on("tpu", target)
    if reason is not None:
        return reason
    if rows == 0:
        return "no decode rows"
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
    rows, (_, heads, *state) = states.rows.shape[0], pool.shape
    count = heads_of(heads, (state[0], state[1]))
    shapes = [jax.ShapeDtypeStruct((heads, *x.shape[2:]), x.dtype) for x in inputs]
    out, _ = jax.eval_shape(one, jax.ShapeDtypeStruct(pool.shape[1:], pool.dtype), *shapes)

    def by_row(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, count, x.shape[-1]), lambda h, r, *_: (r, h, 0))

    in_place = pl.BlockSpec((None, count, *state), lambda h, r, at, _: (at[r], h, 0, 0))
    result, pool = pl.pallas_call(
        partial(_step, one),
        out_shape=(jax.ShapeDtypeStruct((rows, *out.shape), out.dtype), jax.ShapeDtypeStruct(pool.shape, pool.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads // count, rows),
            in_specs=[in_place, *map(by_row, inputs)],
            out_specs=[by_row(out), in_place],
        ),
        input_output_aliases={2: 1},
        # Rows of nobody share a state, which every one of them writes back as it was.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=pltpu.InterpretParams(detect_races=True) if target.interpret else False,
        name="advance_states",
    )(states.rows, states.active.astype(jnp.int32), pool, *inputs)
    return result, leave_copies(pool, states, lambda pool: pool[states.rows])


def _step(one: OneToken, rows: Any, active: Any, state: Any, *refs: Any) -> None:
    """One block of heads of one row."""
    *inputs, out, new_state = refs
    before = state[...]
    out[...], after = one(before, *(x[...] for x in inputs))
    new_state[...] = jnp.where(active[pl.program_id(1)] > 0, after, before)
