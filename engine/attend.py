"""How the tokens of a step see what was kept: where theirs is written, and what each attends to.

One pure function for every layer; `CacheView` is what the layers share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.config import Latent, LayerSpec, ModelConfig
from engine.model.mixers import AttentionInput, RecurrentInput
from engine.model.place import Place
from engine.pages import TRASH_PAGE
from engine.recur import LayerStates, StatesView, Tried, recur
from pallas_kernels.kv_layout import KVLayout
from pallas_kernels.kv_write import write_kv
from pallas_kernels.latent_attention import expanded_prefill
from pallas_kernels.paged_attention import decode_attention, decode_part, prefill_attention, prefill_part
from pallas_kernels.paged_attention.part import MASKED, Part
from pallas_kernels.products import product
from pallas_kernels.states import DecodeStates, PrefillStates


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """Running sequences with one token each; inactive rows leave no trace."""

    slot: Array  # int32 [rows]
    position: Array  # int32 [rows], of the token
    active: Array  # bool [rows]
    block_tables: Array  # int32 [rows, pages_per_seq]
    copy_to: Array | None = None  # int32 [rows], of a model with recurrent layers: see `DecodeStates`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillRows:
    """Chunks of prompts on the flat token axis behind the decode rows; idle rows are last."""

    q_start: Array  # int32 [rows], first token, counted from the first prefill token
    q_len: Array  # int32 [rows]
    position: Array  # int32 [rows], of the first token
    block_tables: Array  # int32 [rows, pages_per_seq]
    states: PrefillStates | None = None  # of a model with recurrent layers
    each: int = field(default=0, metadata={"static": True})  # no chunk has more tokens; 0: of any length

    def positions(self, num_tokens: int) -> tuple[Array, Array]:
        """(row, position) of each flat token; tokens of no row get row -1."""
        index = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
        mine = (index >= self.q_start[None]) & (index < (self.q_start + self.q_len)[None])
        row = jnp.where(jnp.any(mine, axis=1), jnp.argmax(mine, axis=1), -1).astype(jnp.int32)
        position = self.position[row] + index[:, 0] - self.q_start[row]
        return row, jnp.where(row >= 0, position, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheView:
    """Where each token of the step writes, and which pages its row reads."""

    page_ids: Array  # int32 [tokens]
    offsets: Array  # int32 [tokens], in the page
    decode_tables: Array  # int32 [decode rows, pages_per_seq]
    decode_lens: Array  # int32 [decode rows], keys that the row sees; 0 when idle
    prefill: PrefillRows | None
    states: StatesView

    def written_here(self, part: Part | None, size: int) -> tuple[Array, Array]:
        """page_ids and offsets on a device with pages of so many tokens: the trash page for what is another's."""
        if part is None:
            return self.page_ids, self.offsets
        here = part.is_here(self.offsets, size)
        return jnp.where(here, self.page_ids, TRASH_PAGE), self.offsets % size

    @property
    def is_live(self) -> Array:
        """bool [tokens]: those of a sequence; the others are idle rows and padding."""
        return self.page_ids != TRASH_PAGE


def cache_view(
    decode: DecodeRows, prefill: PrefillRows | None, num_tokens: int, page_size: int
) -> tuple[CacheView, Array]:
    """The view of a step's tokens (decode rows, then prefill tokens), and their positions, int32 [tokens]."""
    positions = decode.position
    page = jnp.take_along_axis(decode.block_tables, (positions // page_size)[:, None], axis=1)[:, 0]
    page_ids = jnp.where(decode.active, page, TRASH_PAGE)
    if prefill is not None:
        row, prefill_position = prefill.positions(num_tokens - positions.shape[0])
        page = prefill.block_tables[row, prefill_position // page_size]
        page_ids = jnp.concatenate([page_ids, jnp.where(row >= 0, page, TRASH_PAGE)])
        positions = jnp.concatenate([positions, prefill_position])
    lens = jnp.where(decode.active, decode.position + 1, 0)
    own = DecodeStates(decode.slot, decode.active, decode.copy_to)
    states = StatesView(own, prefill.states if prefill is not None else None)
    return CacheView(page_ids, positions % page_size, decode.block_tables, lens, prefill, states), positions


@dataclass(frozen=True)
class Memory:
    """The decoder's `Attend` over pages of one layout and recurrent states, for one chip.

    Where pages are spread over devices, each attends over its own keys, and their results are merged.
    """

    layout: KVLayout
    place: Place

    def __call__(
        self,
        config: ModelConfig,
        layer: LayerSpec,
        view: CacheView,
        cache: Array | LayerStates,
        brought: AttentionInput | RecurrentInput,
    ) -> tuple[Array, Array | LayerStates | Tried]:
        """(values, what the layer keeps). See `engine.model.mixers.Attend`."""
        if isinstance(brought, RecurrentInput) and isinstance(cache, LayerStates):
            out, states = recur(config, layer, view.states, cache, brought, self.place.target)
            return out, Tried(cache, brought) if view.states.only_tries else states
        if isinstance(brought, AttentionInput) and isinstance(cache, Array):
            return self._attend(config, layer, view, cache, brought)
        raise TypeError(f"a {layer.mixer} layer brings {type(brought).__name__} to {type(cache).__name__}")

    def _attend(
        self, config: ModelConfig, layer: LayerSpec, view: CacheView, kv_pages: Array, brought: AttentionInput
    ) -> tuple[Array, Array]:
        """Write k and v, then attend: (values, the layer's pages)."""
        on: dict[str, Any] = {"layout": self.layout, "target": self.place.target}
        part = self.place.part
        page_ids, offsets = view.written_here(part, kv_pages.shape[1])
        kv_pages = write_kv(kv_pages, brought.k, brought.v, page_ids, offsets, **on)
        num_decode, prefill = view.decode_lens.shape[0], view.prefill
        how = on | {
            "scale": config.attention_scale,
            "softcap": config.attention_softcap,
            "window": layer.window,
            "sinks": brought.sinks,
        }
        see_decode, see_prefill = self._ways(part, how)
        parts = []
        if num_decode:
            rows = (view.decode_tables, view.decode_lens)
            parts.append(_seen(config.latent, see_decode, brought.part(0, num_decode), kv_pages, *rows))
        if prefill is not None:
            rows = (prefill.block_tables, prefill.q_start, prefill.q_len, prefill.position)
            queries = brought.part(num_decode, None)
            if brought.up and part is None and expands(config, layer, prefill.each or queries.q.shape[0]):
                scale = config.attention_scale
                parts.append(expanded_prefill(queries.q, kv_pages, *rows, *brought.up, scale=scale, **on))
            else:
                parts.append(_seen(config.latent, see_prefill, queries, kv_pages, *rows))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts), kv_pages

    def _ways(self, part: Part | None, how: dict[str, Any]) -> tuple[Callable[..., Array], Callable[..., Array]]:
        """How decode rows, and prefill tokens, see pages."""
        if part is None:
            return partial(decode_attention, **how), partial(prefill_attention, **how)
        if how["sinks"] is not None:  # they count once
            how = how | {"sinks": jnp.where(part.index == 0, how["sinks"], MASKED)}

        def merging(see: Callable[..., tuple[Array, Array]]) -> Callable[..., Array]:
            def whole(q: Array, *pages: Array) -> Array:
                return self.place.merged(*see(q, *pages, part, **how)).astype(q.dtype)

            return whole

        return merging(decode_part), merging(prefill_part)


def expands(config: ModelConfig, layer: LayerSpec, num_queries: int) -> bool:
    """Whether so many queries of a row over latents take expanded keys and values: where that is less work than
    absorbing. Of rows that share a step's tokens as they come, all tokens: one row may have them.

    Multiplications a head and key: once kv_rank * (nope + value), then nope + rope + value a query instead of
    row_dim + kv_rank.
    """
    latent = config.latent
    if latent is None or config.attention_softcap is not None or layer.window is not None:
        return False
    saved = latent.row_dim + latent.kv_rank - (latent.nope_dim + latent.rope_dim + latent.value_dim)
    return saved * num_queries > latent.kv_rank * (latent.nope_dim + latent.value_dim)


def _seen(latent: Latent | None, see: Callable[..., Array], brought: AttentionInput, *pages: Array) -> Array:
    """`see` of the queries; over latent pages in the absorbed form, where q . (k_up c) is (k_up^T q) . c."""
    if latent is None or brought.up is None:
        return see(brought.q, *pages)
    k_up, v_up = brought.up
    absorbed = _per_head("thn,hrn->thr", brought.q[..., : latent.nope_dim], k_up)
    queries = jnp.concatenate([absorbed, brought.q[..., latent.nope_dim :]], axis=-1)
    return _per_head("thr,hrv->thv", see(queries, *pages), v_up)


def _per_head(subscripts: str, x: Array, weight: Array) -> Array:
    return product(subscripts, x, weight).astype(x.dtype)
