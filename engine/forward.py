"""The model's forward pass inside a step: KV of a step's tokens is written, what attends reads it.

What every step program is traced from, and the rows that steps are made of. Draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from engine import pipeline
from engine.attend import DecodeRows, Memory, PrefillRows, cache_view
from engine.model import decoder
from engine.model.config import ModelConfig
from engine.model.layers import Params
from engine.model.place import Place
from engine.pages import TRASH_PAGE
from engine.recur import LayerStates, Tried
from engine.slots import Slots
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.target import Target
from sharding.shards import WHOLE, Shards

# What each layer keeps: pages [pages, page_size, layout.width], see `pallas_kernels.kv_layout`, or states.
KV = tuple[Array | LayerStates | Tried, ...]


@dataclass(frozen=True)
class Compute:
    """What every step program is traced from, static: a model, over pages of a layout, on a chip."""

    model: ModelConfig
    kv: KVLayout
    page_size: int
    target: Target
    shards: Shards = WHOLE  # model, kv layout and what the programs hold are one device's share
    draft: Compute | None = None  # the model that proposes tokens, see `engine.draft_model`

    @property
    def place(self) -> Place:
        return Place(self.target, self.shards)


def forward(
    compute: Compute,
    params: Params,
    kv: KV,
    tokens: Array,
    decode: DecodeRows,
    prefill: PrefillRows | None,
) -> tuple[KV, Array, Array | None]:
    """Hidden states [tokens, embed] of decode rows then prefill tokens, whose KV is written first; and how many
    tokens chose each expert of each layer. What a draft model keeps behind the model's own layers stays as it is."""
    view, positions = cache_view(decode, prefill, tokens.shape[0], compute.page_size)
    attend = Memory(compute.kv, compute.place)
    model, place = compute.model, compute.place
    run = decoder.hidden_states if place.count("layers") == 1 else pipeline.hidden_states
    own = kv[: model.num_layers]
    hidden, own, chosen = run(model, params, tokens, positions, own, view, attend, place)
    load = place.total(expert_load(model, chosen, view.is_live)) if chosen else None
    return (*own, *kv[len(own) :]), hidden, load


def expert_load(model: ModelConfig, chosen: tuple[Array, ...], is_live: Array) -> Array:
    """int32 [layers with experts, experts]: tokens that chose each, those of idle rows and padding left out."""
    count = model.experts.num_experts if model.experts else 0
    experts = jnp.stack(chosen)
    one = jnp.broadcast_to(is_live.astype(jnp.int32)[None, :, None], experts.shape)
    layer = jnp.arange(len(chosen), dtype=jnp.int32)[:, None, None]
    return jnp.zeros((len(chosen), count), jnp.int32).at[layer, experts].add(one)


def logits_of(compute: Compute, params: Params, hidden: Array) -> Array:
    """float32 [rows, vocab], on every device."""
    return decoder.logits(compute.model, params, hidden, compute.place)


def nobody(slots: Slots) -> DecodeRows:
    """No decode rows."""
    none = jnp.zeros((0,), jnp.int32)
    return DecodeRows(none, none, none != 0, slots.block_tables[:0])


def roomy_tables(slots: Slots, slot: Array, active: Array, count: int) -> Array:
    """Block tables [rows, pages_per_seq + count] of rows that go up to `count` tokens on: what has no page goes to the
    trash page, tokens of idle rows, and those that the sequence will not have room for."""
    tables = jnp.where(active[:, None], slots.block_tables[slot], TRASH_PAGE)
    return jnp.pad(tables, ((0, 0), (0, count)), constant_values=TRASH_PAGE)  # a page may hold one token


def chunk_rows(slots: Slots, slot: Array, active: Array, start: Array, count: int) -> PrefillRows:
    """`count` tokens of each row from position `start` on, one row's behind the other's."""
    tables = roomy_tables(slots, slot, active, count)
    firsts = count * jnp.arange(slot.shape[0], dtype=jnp.int32)
    return PrefillRows(firsts, jnp.full_like(firsts, count), jnp.where(active, start, 0), tables, each=count)
