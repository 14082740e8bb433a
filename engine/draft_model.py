"""Tokens proposed by a second, smaller model (arXiv 2211.17192, 2302.01318), inside the programs of the first.

Its keys and values lie on pages of its own arrays, under the page numbers and block tables of the model that it drafts
for; its weights carry a prefix. It draws greedily. Decode steps that verify nothing leave it behind: `Slots.drafted`
counts the tokens that it knows, and it catches up when it is asked. A page that was shared before it did has holes:
worse proposals, and the same output.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from engine.attend import DecodeRows, PrefillRows
from engine.forward import KV, Compute, chunk_rows, forward, logits_of, nobody, roomy_tables
from engine.model.layers import Params
from engine.sampler import best
from engine.slots import Slots, drafted_of, history_of

PREFIX = "draft."  # of its parameters' names
BEHIND_TOKENS = 16  # of a row that one pass catches up
LATEST_TOKENS = 2  # of a row that are new to it when all that it proposed was accepted


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
    pages = _caught_up(draft, _own(params), kv[first:], slots, slot, active)
    pages, proposed = _drawn(draft, _own(params), pages, slots, slot, active, count)
    return (*kv[:first], *pages), proposed


def keep_count(before: Slots, after: Slots, slot: Array, active: Array, count: int) -> Slots:
    """`after`, with what it knows of each row that verified `count` proposed tokens: it was fed all but the last of
    them, and of those the accepted ones are the sequence's."""
    position = before.position[slot]
    known = position + jnp.minimum(after.position[slot] - position, count)
    drafted = drafted_of(before)
    return replace(after, drafted=drafted.at[slot].set(jnp.where(active, known, drafted[slot])))


def _drawn(
    draft: Compute, params: Params, pages: KV, slots: Slots, slot: Array, active: Array, count: int
) -> tuple[KV, Array]:
    """From the latest tokens on, all before them being known."""
    position = slots.position[slot]
    start = position - (LATEST_TOKENS - 1)
    latest = _tokens(slots, slot, start, LATEST_TOKENS)
    rows = chunk_rows(slots, slot, active, start, LATEST_TOKENS)
    pages, hidden, _ = forward(draft, params, pages, latest.reshape(-1), nobody(slots), rows)
    token = _likeliest(draft, params, hidden.reshape(*latest.shape, -1)[:, -1])
    proposed = jnp.zeros((slot.shape[0], count), jnp.int32).at[:, 0].set(token)
    tables = roomy_tables(slots, slot, active, count)

    def turn(i: Array | int, state: tuple[KV, Array]) -> tuple[KV, Array]:
        pages, proposed = state
        rows = DecodeRows(slot, jnp.where(active, position + i, 0), active, tables)
        last = jax.lax.dynamic_index_in_dim(proposed, i - 1, axis=1, keepdims=False)
        pages, hidden, _ = forward(draft, params, pages, last, rows, None)
        return pages, proposed.at[:, i].set(_likeliest(draft, params, hidden))

    if draft.target.loops_copy:
        for i in range(1, count):
            pages, proposed = turn(i, (pages, proposed))
        return pages, proposed
    return jax.lax.fori_loop(1, count, turn, (pages, proposed))


def _caught_up(draft: Compute, params: Params, pages: KV, slots: Slots, slot: Array, active: Array) -> KV:
    """With KV of all but the latest tokens of each row: what it missed, a few tokens a row at a time."""
    until = slots.position[slot] - (LATEST_TOKENS - 1)

    def more(state: tuple[Array, KV]) -> Array:
        return draft.place.any(active & (state[0] < until))

    def turn(state: tuple[Array, KV]) -> tuple[Array, KV]:
        known, pages = state
        behind = active & (known < until)
        tokens = _tokens(slots, slot, known, BEHIND_TOKENS)
        rows = chunk_rows(slots, slot, behind, known, BEHIND_TOKENS)  # what it writes too far on is written again
        pages, _, _ = forward(draft, params, pages, tokens.reshape(-1), nobody(slots), rows)
        return known + jnp.where(behind, BEHIND_TOKENS, 0), pages

    def catch_up(state: tuple[Array, KV]) -> tuple[Array, KV]:
        return jax.lax.while_loop(more, turn, state)

    state = drafted_of(slots)[slot], pages
    if draft.target.loops_copy:  # the weights, but in a branch that is seldom taken
        return jax.lax.cond(more(state), catch_up, lambda state: state, state)[1]
    return catch_up(state)[1]


def _tokens(slots: Slots, slot: Array, start: Array, count: int) -> Array:
    """int32 [rows, count]: the sequences' tokens from `start` on, 0 where there are none."""
    history = history_of(slots)[slot]
    at = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    tokens = jnp.take_along_axis(history, jnp.clip(at, 0, history.shape[1] - 1), axis=1)
    return jnp.where((at >= 0) & (at <= slots.position[slot][:, None]), tokens, 0)


def _likeliest(draft: Compute, params: Params, hidden: Array) -> Array:
    """int32 [rows]."""
    return best(logits_of(draft, params, hidden), draft.place)


def _draft_of(compute: Compute) -> Compute:
    if compute.draft is None:
        raise ValueError("nothing was made for a draft model")
    return compute.draft


def _own(params: Params) -> Params:
    return {name.removeprefix(PREFIX): array for name, array in params.items() if name.startswith(PREFIX)}
