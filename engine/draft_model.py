"""Tokens proposed by a second, smaller model (arXiv 2211.17192, 2302.01318), inside the programs of the first.

Its keys and values lie on pages of its own arrays, under the page numbers and block tables of the model that it drafts
for, its recurrent states in rows of their numbers; its weights carry a prefix. It draws greedily. Decode steps that
verify nothing leave it behind: `Slots.drafted` counts the tokens that it knows, and it catches up when it is asked. A
page that was shared before it did has holes, and a state that was kept before it did misses tokens: worse proposals,
and the same output. What it proposes enters its pages, where tokens of the sequence overwrite it, and no state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from engine.attend import DecodeRows, PrefillRows
from engine.forward import KV, Compute, chunk_rows, forward, logits_of, nobody, roomy_tables
from engine.model.config import ModelConfig
from engine.model.layers import Params
from engine.recur import LayerStates
from engine.sampler import best
from engine.slots import Slots, drafted_of, history_of
from pallas_kernels.states import put_seldom, rows_of_their_own

PREFIX = "draft."  # of its parameters' names
BEHIND_TOKENS = 16  # of a row that one pass catches up


def read_prompts(compute: Compute, params: Params, kv: KV, slots: Slots, tokens: Array, rows: PrefillRows) -> KV:
    """Write its KV of a step's chunks of prompts, int32 [tokens]."""
    draft, first = _draft_of(compute), compute.model.num_layers
    pages, _, _ = forward(draft, _own(params), kv[first:], tokens, nobody(slots), rows)
    return (*kv[:first], *pages)


def propose(
    compute: Compute, params: Params, kv: KV, slots: Slots, slot: Array, active: Array, count: int
) -> tuple[KV, Array]:
    """int32 [rows, count]: the tokens that it finds likeliest after each row's last one, one after the other."""
    draft, first = _draft_of(compute), compute.model.num_layers
    known, kept = _caught_up(draft, _own(params), kv[first:], slots, slot, active, count)
    kept, proposed = _drawn(draft, _own(params), kept, slots, slot, active, known, count)
    return (*kv[:first], *kept), proposed


def keep_count(compute: Compute, before: Slots, after: Slots, slot: Array, active: Array, count: int) -> Slots:
    """`after`, with what it knows of each row that verified `count` proposed tokens: it was fed all but the last of
    them, and of those the accepted ones are the sequence's. States took none of them."""
    position = before.position[slot]
    most = 1 if _draft_of(compute).model.recurrence else count
    known = position + jnp.minimum(after.position[slot] - position, most)
    drafted = drafted_of(before)
    return replace(after, drafted=drafted.at[slot].set(jnp.where(active, known, drafted[slot])))


def leave_copies(compute: Compute, kv: KV, slot: Array, copy_to: Array) -> KV:
    """With its rows' states, as they are, beside the copies that the model's layers left (int32 [rows]; negative:
    none): of the same sequence, if not up to the same token."""

    def left(pool: Array) -> Array:
        return put_seldom(pool, copy_to, lambda pool: pool[slot], copy_to >= 0)

    first = compute.model.num_layers
    return (*kv[:first], *_with_states(kv[first:], left))


def most_new(draft: ModelConfig, count: int) -> int:
    """The most tokens of a row that are new to it behind a step that verified `count`: see `keep_count`."""
    return count + 1 if draft.recurrence else 2


def _drawn(
    draft: Compute, params: Params, kept: KV, slots: Slots, slot: Array, active: Array, known: Array, count: int
) -> tuple[KV, Array]:
    """From the latest tokens on, all before them being `known`."""
    position, room = slots.position[slot], most_new(draft.model, count)
    num_new = position + 1 - known
    tokens, rows = _chunks(draft, slots, slot, active, known, num_new, room)
    kept, hidden, _ = forward(draft, params, kept, tokens, nobody(slots), rows)
    token = _likeliest(draft, params, hidden[rows.q_start + jnp.maximum(num_new, 1) - 1])
    proposed = jnp.zeros((slot.shape[0], count), jnp.int32).at[:, 0].set(token)
    tables = roomy_tables(slots, slot, active, count)

    def turn(i: Array | int, state: tuple[KV, Array]) -> tuple[KV, Array]:
        kept, proposed = state
        rows = DecodeRows(jnp.arange(slot.shape[0]), jnp.where(active, position + i, 0), active, tables)
        last = jax.lax.dynamic_index_in_dim(proposed, i - 1, axis=1, keepdims=False)
        kept, hidden, _ = forward(draft, params, kept, last, rows, None)
        return kept, proposed.at[:, i].set(_likeliest(draft, params, hidden))

    state = (_with_states(kept, lambda pool: pool[slot]), proposed)
    if draft.target.loops_copy:
        for i in range(1, count):
            state = turn(i, state)
    else:
        state = jax.lax.fori_loop(1, count, turn, state)
    written, proposed = state
    pairs = zip(kept, written, strict=True)
    return tuple(old if isinstance(old, LayerStates) else new for old, new in pairs), proposed


def _caught_up(
    draft: Compute, params: Params, kept: KV, slots: Slots, slot: Array, active: Array, count: int
) -> tuple[Array, KV]:
    """How many tokens of each row it knows, all but the latest: what it missed, a few a row at a time."""
    position = slots.position[slot]
    until = position + 1 - most_new(draft.model, count)

    def more(state: tuple[Array, KV]) -> Array:
        return draft.place.any(active & (state[0] < until))

    def turn(state: tuple[Array, KV]) -> tuple[Array, KV]:
        known, kept = state
        num_new = jnp.where(active, jnp.clip(until - known, 0, BEHIND_TOKENS), 0)
        tokens, rows = _chunks(draft, slots, slot, num_new > 0, known, num_new, BEHIND_TOKENS)
        kept, _, _ = forward(draft, params, kept, tokens, nobody(slots), rows)
        return known + num_new, kept

    def catch_up(state: tuple[Array, KV]) -> tuple[Array, KV]:
        return jax.lax.while_loop(more, turn, state)

    state = jnp.minimum(drafted_of(slots)[slot], position), kept
    if draft.target.loops_copy:  # the weights, but in a branch that is seldom taken
        return jax.lax.cond(more(state), catch_up, lambda state: state, state)
    return catch_up(state)


def _chunks(
    draft: Compute, slots: Slots, slot: Array, active: Array, start: Array, count: Array, room: int
) -> tuple[Array, PrefillRows]:
    """int32 [rows * room]: `count` of each active row's tokens from `start` on, and where they go. Behind them are
    zeros, which enter no state, and pages only where later tokens overwrite them."""
    history = history_of(slots)[slot]
    at = start[:, None] + jnp.arange(room, dtype=jnp.int32)[None, :]
    tokens = jnp.take_along_axis(history, jnp.clip(at, 0, history.shape[1] - 1), axis=1)
    rows = chunk_rows(slots, slot, active, start, room)
    if draft.model.recurrence is not None:
        mine = jnp.where(active, count, 0)
        rows = replace(rows, states=rows_of_their_own(rows.q_start, mine, slot, room))
    return jnp.where(at < (start + count)[:, None], tokens, 0).reshape(-1), rows


def _with_states(kept: KV, change: Callable[[Array], Array]) -> KV:
    """With every pool of states changed; pages are as they are."""
    return tuple(jax.tree.map(change, each) if isinstance(each, LayerStates) else each for each in kept)


def _likeliest(draft: Compute, params: Params, hidden: Array) -> Array:
    """int32 [rows]."""
    return best(logits_of(draft, params, hidden), draft.place)


def _draft_of(compute: Compute) -> Compute:
    if compute.draft is None:
        raise ValueError("nothing was made for a draft model")
    return compute.draft


def _own(params: Params) -> Params:
    return {name.removeprefix(PREFIX): array for name, array in params.items() if name.startswith(PREFIX)}
