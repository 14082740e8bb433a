"""Device state beside the KV cache: one row a running sequence, one more for idle rows.

A pytree that is donated to every step. The host writes a row when its sequence is admitted
(`PrefillFields`, `configure`), and afterwards sends only new pages: last token, length and
counts live here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from engine.request import MAX_LOGIT_BIAS, MAX_STOP_IDS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, one row a sequence: float32 and int32 [rows], stop_ids [rows, MAX_STOP_IDS]."""

    temperature: Array
    top_p: Array
    min_p: Array
    presence_penalty: Array
    frequency_penalty: Array
    repetition_penalty: Array
    top_k: Array  # 0 keeps all
    seed_high: Array  # the two words of the sequence's threefry key
    seed_low: Array
    min_len: Array  # stop tokens are masked while the sequence is shorter than this
    max_len: Array  # the sequence ends when it is this long
    flags: Array  # USES_* of engine.batch
    stop_ids: Array  # -1 where unused

    def rows(self, index: Array) -> Sampling:
        return jax.tree.map(lambda a: a[index], self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """All rows; row -1 (the last) is idle and takes what padding writes."""

    last_token: Array  # int32 [slots], fed next
    position: Array  # int32 [slots], of last_token: the tokens before it have KV
    active: Array  # bool [slots], False once the device drew the sequence's last token
    block_tables: Array  # int32 [slots, pages_per_seq]
    sampling: Sampling
    token_counts: Array  # int16 [slots, vocab], twice the times drawn, plus 1 if in the prompt; valid with USES_COUNTS
    bias_ids: Array  # int32 [slots, MAX_LOGIT_BIAS], ascending; vocab size where unused; valid with USES_BIAS
    bias_values: Array  # float32 [slots, MAX_LOGIT_BIAS]
    allowed_bits: Array  # uint32 [slots, vocab / 32], bit set: may be drawn; valid with USES_MASK
    history: Array | None = None  # int32 [slots, longest sequence], its tokens; None: nothing is proposed from them
    drafted: Array | None = None  # int32 [slots], its first tokens that have KV of a draft model; None: there is none


def slots_shape(
    num_seqs: int, pages_per_seq: int, vocab_size: int, history_len: int = 0, *, has_draft: bool = False
) -> Slots:
    """Abstract `Slots` for `num_seqs` sequences and the idle row."""
    return jax.eval_shape(lambda: _empty_slots(num_seqs + 1, pages_per_seq, vocab_size, history_len, has_draft))


def _empty_slots(rows: int, pages_per_seq: int, vocab_size: int, history_len: int, has_draft: bool) -> Slots:
    ints, floats = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), jnp.float32)
    return Slots(
        last_token=ints,
        position=ints,
        active=jnp.zeros((rows,), jnp.bool_),
        block_tables=jnp.zeros((rows, pages_per_seq), jnp.int32),
        sampling=Sampling(
            temperature=floats,
            top_p=floats,
            min_p=floats,
            presence_penalty=floats,
            frequency_penalty=floats,
            repetition_penalty=floats,
            top_k=ints,
            seed_high=ints,
            seed_low=ints,
            min_len=ints,
            max_len=ints,
            flags=ints,
            stop_ids=jnp.zeros((rows, MAX_STOP_IDS), jnp.int32),
        ),
        token_counts=jnp.zeros((rows, vocab_size), jnp.int16),
        bias_ids=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.int32),
        bias_values=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.float32),
        allowed_bits=jnp.zeros((rows, -(-vocab_size // 32)), jnp.uint32),
        history=jnp.zeros((rows, history_len), jnp.int32) if history_len else None,
        drafted=ints if has_draft else None,
    )


def add_pages(slots: Slots, slot: Array, first: Array, pages: Array) -> Slots:
    """Write pages [rows, n] into the block tables of `slot` from column `first`; page -1 writes nothing."""
    width = slots.block_tables.shape[1]
    columns = first[:, None] + jnp.arange(pages.shape[1], dtype=jnp.int32)[None, :]
    columns = jnp.where(pages >= 0, columns, width)  # out of range: dropped
    tables = slots.block_tables.at[slot[:, None], columns].set(pages, mode="drop")
    return replace(slots, block_tables=tables)


def history_of(slots: Slots) -> Array:
    """int32 [slots, longest sequence]: every sequence's tokens. ValueError where they are not kept."""
    if slots.history is None:
        raise ValueError("slots were made without a history")
    return slots.history


def drafted_of(slots: Slots) -> Array:
    """int32 [slots], see `Slots.drafted`. ValueError without a draft model."""
    if slots.drafted is None:
        raise ValueError("slots were made without a draft model")
    return slots.drafted
