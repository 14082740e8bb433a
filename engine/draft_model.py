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
from engine.slots import Slots, drafted_of, history_of

PREFIX = "draft."  # of its parameters' names
BEHIND_TOKENS = 16  # of a row that one pass catches up
LATEST_TOKENS = 2  # of a row that are new to it when all that it proposed was accepted


def draft_of(compute: Compute) -> Compute:
    """ValueError without a draft model."""
    if compute.draft is None:
        raise ValueError("nothing was made for a draft model")
    return compute.draft


def read_prompts(compute: Compute, params: Params, kv: KV, slots: Slots, tokens: Array, rows: PrefillRows) -> KV:
    """Write its KV of a step's chunks of prompts, int32 [tokens]."""
    kv, _ = _forward(compute, params, kv, tokens, nobody(slots), rows)
    return kv


def propose(
    compute: Compute, params: Params, kv: KV, slots: Slots, slot: Array, active: Array, count: int
) -> tuple[KV, Array]:
    """int32 [rows, count]: the tokens that it finds likeliest after each row's last one, one after the other."""
    position = slots.position[slot]
    kv = _caught_up(compute, params, kv, slots, slot, active)
    start = position - (LATEST_TOKENS - 1)
    tokens = _latest(slots, slot, start, LATEST_TOKENS)
    rows = chunk_rows(slots, slot, active, start, LATEST_TOKENS)
    kv, hidden = _forward(compute, params, kv, tokens.reshape(-1), nobody(slots), rows)
    token = _likeliest(compute, params, hidden.reshape(*tokens.shape, -1)[:, -1])
    proposed = jnp.zeros((slot.shape[0], count), jnp.int32).at[:, 0].set(token)
    tables = roomy_tables(slots, slot, active, count)

    def turn(i: Array | int, state: tuple[KV, Array]) -> tuple[KV, Array]:
        kv, proposed = state
        rows = DecodeRows(slot, jnp.where(active, position + i, 0), active, tables)
        last = jax.lax.dynamic_index_in_dim(proposed, i - 1, axis=1, keepdims=False)
        kv, hidden = _forward(compute, params, kv, last, rows, None)
        return kv, proposed.at[:, i].set(_likeliest(compute, params, hidden))

    if compute.target.loops_copy:
        for i in range(1, count):
            kv, proposed = turn(i, (kv, proposed))
        return kv, proposed
    return jax.lax.fori_loop(1, count, turn, (kv, proposed))


def keep_count(before: Slots, after: Slots, slot: Array, active: Array, count: int) -> Slots:
    """`after`, with what it knows of each row that verified `count` proposed tokens: it was fed all but the last of
    them, and of those the accepted ones are the sequence's."""
    position = before.position[slot]
    known = position + jnp.minimum(after.position[slot] - position, count)
    drafted = drafted_of(before)
    return replace(after, drafted=drafted.at[slot].set(jnp.where(active, known, drafted[slot])))


def _caught_up(compute: Compute, params: Params, kv: KV, slots: Slots, slot: Array, active: Array) -> KV:
    """With KV of all but the latest tokens of each row: what it missed, a few tokens a row at a time."""
    until = slots.position[slot] - (LATEST_TOKENS - 1)

    def more(state: tuple[Array, KV]) -> Array:
        return compute.place.any(active & (state[0] < until))

    def turn(state: tuple[Array, KV]) -> tuple[Array, KV]:
        known, kv = state
        behind = active & (known < until)
        tokens = _latest(slots, slot, known, BEHIND_TOKENS)
        rows = chunk_rows(slots, slot, behind, known, BEHIND_TOKENS)  # what it writes too far on is written again
        kv, _ = _forward(compute, params, kv, tokens.reshape(-1), nobody(slots), rows)
        return known + jnp.where(behind, BEHIND_TOKENS, 0), kv

    def catch_up(state: tuple[Array, KV]) -> tuple[Array, KV]:
        return jax.lax.while_loop(more, turn, state)

    state = drafted_of(slots)[slot], kv
    if compute.target.loops_copy:  # the weights, but in a branch that is seldom taken
        return jax.lax.cond(more(state), catch_up, lambda state: state, state)[1]
    return catch_up(state)[1]


def _latest(slots: Slots, slot: Array, start: Array, count: int) -> Array:
    """int32 [rows, count]: the sequences' tokens from `start` on, 0 where there are none."""
    history = history_of(slots)[slot]
    at = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    tokens = jnp.take_along_axis(history, jnp.clip(at, 0, history.shape[1] - 1), axis=1)
    return jnp.where((at >= 0) & (at <= slots.position[slot][:, None]), tokens, 0)


def _forward(
    compute: Compute, params: Params, kv: KV, tokens: Array, decode: DecodeRows, prefill: PrefillRows | None
) -> tuple[KV, Array]:
    """`forward` of the draft model, whose pages stand behind what the other's layers keep."""
    draft, first = draft_of(compute), compute.model.num_layers
    pages, hidden, _ = forward(draft, _own(params), kv[first:], tokens, decode, prefill)
    return (*kv[:first], *pages), hidden


def _likeliest(compute: Compute, params: Params, hidden: Array) -> Array:
    """int32 [rows]."""
    return jnp.argmax(logits_of(draft_of(compute), _own(params), hidden), axis=-1).astype(jnp.int32)


def _own(params: Params) -> Params:
    return {name.removeprefix(PREFIX): array for name, array in params.items() if name.startswith(PREFIX)}
