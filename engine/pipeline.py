"""Layers in stages, one behind the other on a mesh axis (GPipe, arXiv 1811.06965), within one program.

Every device embeds all tokens. In each turn a stage takes one micro-batch through its layers and hands it on, so the
m-th is in stage s in turn m + s; what a stage computes in the turns before its first and after its last goes nowhere.
Turns are unrolled: there are fewer than two copies of each layer for as many micro-batches as stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.attend import CacheView, PrefillRows
from engine.model import decoder
from engine.model.config import ModelConfig
from engine.model.layers import Params
from engine.model.mixers import Attend
from engine.model.place import Place
from engine.pages import TRASH_PAGE

WORTH_ITS_WEIGHTS = 256  # tokens of a micro-batch, each of which reads a stage's weights again


@dataclass(frozen=True)
class Micro:
    """How a step's decode rows, and the prefill tokens behind them, are cut into `count` micro-batches; static."""

    count: int
    num_rows: int
    num_tokens: int  # of prefill

    @property
    def rows(self) -> int:
        """Decode rows of one; the last ones are padded."""
        return -(-self.num_rows // self.count)

    @property
    def tokens(self) -> int:
        return -(-self.num_tokens // self.count)

    def turns(self, stages: int) -> int:
        return self.count + stages - 1

    def split(self, x: Array) -> Array:
        """[rows and tokens, ...] -> [count, rows and tokens of one, ...], zero where there are none."""
        return jnp.concatenate(
            [self.split_rows(x[: self.num_rows]), self._cut(x[self.num_rows :], self.tokens)], axis=1
        )

    def split_rows(self, x: Array) -> Array:
        """[rows, ...] -> [count, rows of one, ...]."""
        return self._cut(x, self.rows)

    def _cut(self, x: Array, size: int) -> Array:
        padding = [(0, self.count * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x, padding).reshape(self.count, size, *x.shape[1:])

    def joined(self, x: Array) -> Array:
        """The inverse of `split`."""
        rows = x[:, : self.rows].reshape(-1, *x.shape[2:])[: self.num_rows]
        tokens = x[:, self.rows :].reshape(-1, *x.shape[2:])[: self.num_tokens]
        return jnp.concatenate([rows, tokens])


def micro_of(stages: int, num_rows: int, num_tokens: int) -> Micro:
    """As many as there are stages, twice as many where those of a prompt are still large, and none empty."""
    count = 2 * stages if num_tokens >= 2 * stages * WORTH_ITS_WEIGHTS else stages
    return Micro(min(count, max(num_rows, num_tokens)), num_rows, num_tokens)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    caches: Sequence[Any],
    view: CacheView,
    attend: Attend,
    place: Place,
) -> tuple[Array, tuple[Any, ...], tuple[Array, ...]]:
    """As `decoder.hidden_states`, of layers in stages: config, params and caches are one stage's, the hidden states
    everywhere alike; the experts that were chosen are those of this stage's layers.
    """
    stages, stage, axes = place.count("layers"), jnp.int32(place.index("layers")), place.shards.axes("layers")
    num_rows = view.decode_lens.shape[0]
    micro = micro_of(stages, num_rows, tokens.shape[0] - num_rows)
    entering = micro.split(decoder.embedded(config, params, tokens, place))
    positions, views = micro.split(positions), split_view(micro, view)
    onward = [(i, i + 1) for i in range(stages - 1)]
    caches, x = tuple(caches), jnp.zeros_like(entering[0])
    done, chosen = jnp.zeros_like(entering), []
    for turn in range(micro.turns(stages)):
        number = turn - stage
        is_mine = (number >= 0) & (number < micro.count)
        at = jnp.clip(number, 0, micro.count - 1)
        x = jnp.where(stage == 0, entering[at], x)
        here = one_view(views, at, is_mine)
        x, caches, experts = decoder.through_layers(config, params, x, positions[at], caches, here, attend, place)
        if not turn:
            chosen = [jnp.zeros((micro.count, *each.shape), each.dtype) for each in experts]
        done = _stored(done, x, at, is_mine)
        chosen = [_stored(kept, each, at, is_mine) for kept, each in zip(chosen, experts, strict=True)]
        if turn + 1 < micro.turns(stages):
            x = jax.lax.ppermute(x, axes, onward)
    hidden = jax.lax.psum(jnp.where(stage == stages - 1, micro.joined(done), 0), axes)
    return hidden, caches, tuple(map(micro.joined, chosen))


def _stored(kept: Array, x: Array, at: Array, is_mine: Array) -> Array:
    return kept.at[at].set(jnp.where(is_mine, x, kept[at]))


def split_view(micro: Micro, view: CacheView) -> CacheView:
    """What each micro-batch sees and writes: every array with one more dimension in front, [count, ...]."""
    return replace(
        view,
        page_ids=micro.split(view.page_ids),  # page 0 of what is padded is the trash page
        offsets=micro.split(view.offsets),
        decode_tables=micro.split_rows(view.decode_tables),
        decode_lens=micro.split_rows(view.decode_lens),
        prefill=None if view.prefill is None else split_chunks(micro, view.prefill),
    )


def split_chunks(micro: Micro, rows: PrefillRows) -> PrefillRows:
    """The part of every chunk in each micro-batch; those that have none come last."""
    first = micro.tokens * jnp.arange(micro.count, dtype=jnp.int32)[:, None]
    start, end = (jnp.clip(at[None] - first, 0, micro.tokens) for at in (rows.q_start, rows.q_start + rows.q_len))
    position = rows.position[None] + jnp.maximum(first - rows.q_start[None], 0)
    order = jnp.argsort(start == end, axis=1, stable=True)
    q_start, q_len, position = (jnp.take_along_axis(x, order, axis=1) for x in (start, end - start, position))
    return PrefillRows(q_start, q_len, position, rows.block_tables[order], each=rows.each)


def one_view(views: CacheView, at: Array, is_mine: Array) -> CacheView:
    """Of one micro-batch; where it is not this stage's turn, nothing is written and nothing is seen."""
    view = jax.tree.map(lambda each: each[at], replace(views, states=None))
    prefill = view.prefill
    return replace(
        view,
        page_ids=jnp.where(is_mine, view.page_ids, TRASH_PAGE),
        decode_lens=jnp.where(is_mine, view.decode_lens, 0),
        prefill=None if prefill is None else replace(prefill, q_len=jnp.where(is_mine, prefill.q_len, 0)),
        states=views.states,
    )
