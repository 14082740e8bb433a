"""Device state beside the KV cache: one row a running sequence, one more for idle rows.

A pytree that is donated to every step. The host writes a row when its sequence is admitted
(`PrefillFields`, `configure`), and afterwards sends only new pages: last token, length and
counts live here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

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
    output_counts: Array  # int16 [slots, vocab], times drawn; valid with USES_COUNTS
    prompt_seen: Array  # bool [slots, vocab]; valid with USES_COUNTS
    bias_ids: Array  # int32 [slots, MAX_LOGIT_BIAS]; vocab size where unused; valid with USES_BIAS
    bias_values: Array  # float32 [slots, MAX_LOGIT_BIAS]
    allowed_bits: Array  # uint32 [slots, vocab / 32], bit set: may be drawn; valid with USES_MASK


def slots_shape(num_seqs: int, pages_per_seq: int, vocab_size: int) -> Slots:
    """Abstract `Slots` for `num_seqs` sequences and the idle row."""
    rows = num_seqs + 1

    def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    floats = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    scalars = {f.name: array(jnp.float32 if f.name in floats else jnp.int32) for f in fields(Sampling)}
    scalars["stop_ids"] = array(jnp.int32, MAX_STOP_IDS)
    return Slots(
        last_token=array(jnp.int32),
        position=array(jnp.int32),
        active=array(jnp.bool_),
        block_tables=array(jnp.int32, pages_per_seq),
        sampling=Sampling(**scalars),
        output_counts=array(jnp.int16, vocab_size),
        prompt_seen=array(jnp.bool_, vocab_size),
        bias_ids=array(jnp.int32, MAX_LOGIT_BIAS),
        bias_values=array(jnp.float32, MAX_LOGIT_BIAS),
        allowed_bits=array(jnp.uint32, -(-vocab_size // 32)),
    )


def add_pages(slots: Slots, slot: Array, first: Array, pages: Array) -> Slots:
    """Write pages [rows, n] into the block tables of `slot` from column `first`; page -1 writes nothing."""
    width = slots.block_tables.shape[1]
    columns = first[:, None] + jnp.arange(pages.shape[1], dtype=jnp.int32)[None, :]
    columns = jnp.where(pages >= 0, columns, width)  # out of range: dropped
    tables = slots.block_tables.at[slot[:, None], columns].set(pages, mode="drop")
    return replace(slots, block_tables=tables)
