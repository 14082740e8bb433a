"""The device's part of pooling: one pure function from a packed batch to a vector a text.

Linear parts see a flat token axis without gaps; attention gathers each text into a row, attends
within it and puts the values back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.batch import Layout
from engine.model import decoder, encoder
from engine.model.config import LayerSpec, ModelConfig
from engine.model.encoder_config import EncoderConfig
from engine.model.layers import Params, rms_norm
from engine.model.mixers import AttentionInput
from engine.model.place import Place
from engine.pooling.batch import BatchKey
from engine.pooling.config import PoolingKind
from pallas_kernels.target import Target

SCORES_AT_ONCE = 1 << 24  # attention scores held at a time: 64 MiB; longer rows go by chunks of queries
NO_SCORE = -1e30  # of a key that is not there; finite, so that an idle row stays finite too


@dataclass(frozen=True)
class Compute:
    """What a program is traced from."""

    model: EncoderConfig | ModelConfig
    pooling: PoolingKind
    target: Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Where each text stands on the flat token axis."""

    row: Array  # int32 [tokens]; -1 of a token that belongs to no text
    start: Array  # int32 [rows]
    length: Array  # int32 [rows]; 0: idle

    def gather(self, flat: Array, width: int) -> Array:
        """[tokens, ...] -> [rows, width, ...]; what lies behind a row's length is anything."""
        index = self.start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        return flat[jnp.minimum(index, flat.shape[0] - 1)]

    def scatter(self, rows: Array) -> Array:
        """[rows, width, ...] -> [tokens, ...]."""
        index = jnp.arange(self.row.shape[0], dtype=jnp.int32)
        row = jnp.maximum(self.row, 0)
        column = jnp.clip(index - self.start[row], 0, rows.shape[1] - 1)
        return rows[row, column]


def pool_step(compute: Compute, layout: Layout, key: BatchKey, params: Params, vector: Array) -> tuple[Array]:
    """float32 [rows, hidden]: each text's pooled hidden state; of a model with a head [rows, labels]."""
    fields = layout.split(vector, lambda part, f: part.reshape(f.shape))
    rows = Rows(fields["row"], fields["start"], fields["length"])
    if isinstance(compute.model, ModelConfig):
        hidden = _decoded(compute.model, compute.target, key, params, fields, rows)
        return (_pool(compute.pooling, hidden, rows, key.length),)
    see = partial(attend, rows, key.length, compute.model.head_dim**-0.5)
    where = (fields["tokens"], fields["positions"], fields["types"])
    hidden = encoder.hidden_states(compute.model, params, *where, see, compute.target)
    pooled = _pool("cls" if compute.model.num_labels else compute.pooling, hidden, rows, key.length)
    if compute.model.num_labels:
        pooled = encoder.label_logits(params, pooled.astype(hidden.dtype), compute.target)
    return (pooled,)


def _decoded(
    model: ModelConfig, target: Target, key: BatchKey, params: Params, fields: dict[str, Array], rows: Rows
) -> Array:
    """A decoder's hidden states [tokens, embed], behind its last norm. Nothing is kept for later tokens."""
    none = (None,) * model.num_layers
    see = RowAttention(key.length)
    place = Place(target)
    hidden, _, _ = decoder.hidden_states(model, params, fields["tokens"], fields["positions"], none, rows, see, place)
    return rms_norm(hidden, params["final_norm"], model.norm_eps, place)


def _pool(kind: PoolingKind, hidden: Array, rows: Rows, width: int) -> Array:
    """float32 [rows, embed] of hidden states [tokens, embed]."""
    if kind == "mean":
        wide = rows.gather(hidden, width).astype(jnp.float32)
        there = jnp.arange(width, dtype=jnp.int32)[None] < rows.length[:, None]
        total = jnp.sum(jnp.where(there[..., None], wide, 0.0), axis=1)
        return total / jnp.maximum(rows.length, 1)[:, None].astype(jnp.float32)
    index = rows.start if kind == "cls" else rows.start + jnp.maximum(rows.length - 1, 0)
    return hidden[index].astype(jnp.float32)


@dataclass(frozen=True)
class RowAttention:
    """The decoder's `Attend` within rows of one width: causal, nothing cached."""

    width: int

    def __call__(
        self, config: ModelConfig, layer: LayerSpec, view: Rows, cache: None, brought: AttentionInput
    ) -> tuple[Array, None]:
        """Values [tokens, q_heads, head_dim], or value_dim of latent attention, whose keys are expanded here."""
        k, v = (brought.k, brought.v) if brought.v is not None else _expanded(config, brought)
        how: dict[str, Any] = {"causal": True, "window": layer.window, "softcap": config.attention_softcap}
        return attend(view, self.width, config.attention_scale, brought.q, k, v, sinks=brought.sinks, **how), None


def _expanded(config: ModelConfig, brought: AttentionInput) -> tuple[Array, Array]:
    """Each head's keys and values from the latent rows [tokens, 1, row_dim]."""
    if config.latent is None or brought.up is None:
        raise ValueError("latent attention brings its projections")
    latent, rotary = brought.k[:, 0, : config.latent.kv_rank], brought.k[..., config.latent.kv_rank :]
    k, v = (jnp.einsum("tr,hrn->thn", latent, up, precision=_precision(latent)) for up in brought.up)
    rotary = jnp.broadcast_to(rotary, (*k.shape[:2], rotary.shape[-1]))
    return jnp.concatenate([k, rotary], axis=-1), v


def attend(
    rows: Rows,
    width: int,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention within each row: q [tokens, q_heads, d], k and v [tokens, kv_heads, d] -> [tokens, q_heads, d].

    Query head h reads KV head h // (q_heads // kv_heads). Scores and softmax are float32. window, softcap,
    sinks: see `LayerSpec` and `ModelConfig`.
    """
    kv_heads, group, dtype = k.shape[1], q.shape[1] // k.shape[1], q.dtype
    q, k, v = (rows.gather(a, width).astype(jnp.float32) for a in (q, k, v))
    q = q.reshape(*q.shape[:2], kv_heads, group, -1)
    there = jnp.arange(width, dtype=jnp.int32)[None] < rows.length[:, None]

    def seen(first: Array, q: Array) -> Array:
        """Of queries [rows, chunk, kv_heads, group, d], the first of them at position `first`."""
        scores = jnp.einsum("rqhgd,rkhd->rhgqk", q, k, precision=_precision(q)) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        query = first + jnp.arange(q.shape[1], dtype=jnp.int32)[:, None]
        distance = query - jnp.arange(width, dtype=jnp.int32)[None]
        near = jnp.ones_like(distance, bool) if not causal else distance >= 0
        near = near if window is None else near & (distance < window)
        scores = jnp.where(there[:, None, None, None] & near[None, None, None], scores, NO_SCORE)
        weights = _softmax(scores, sinks, kv_heads)
        return jnp.einsum("rhgqk,rkhd->rqhgd", weights, v, precision=_precision(v))

    chunk = _chunk(width, q.shape[0] * kv_heads * group)
    if chunk == width:
        out = seen(jnp.zeros((), jnp.int32), q)
    else:
        starts = jnp.arange(0, width, chunk, dtype=jnp.int32)
        parts = jnp.moveaxis(q.reshape(q.shape[0], -1, chunk, *q.shape[2:]), 1, 0)
        out = jnp.moveaxis(jax.lax.map(lambda part: seen(*part), (starts, parts)), 0, 1)
        out = out.reshape(q.shape[0], width, *out.shape[3:])
    return rows.scatter(out.reshape(*out.shape[:2], kv_heads * group, -1)).astype(dtype)


def _chunk(width: int, num_rows: int) -> int:
    """Queries whose scores are held at once: all, or a power of two that divides the width."""
    chunk = width
    while chunk * width * num_rows > SCORES_AT_ONCE and chunk % 2 == 0 and chunk > 16:
        chunk //= 2
    return chunk


def _softmax(scores: Array, sinks: Array | None, kv_heads: int) -> Array:
    """Over keys; `sinks` float32 [q_heads] are counted beside them and get nothing."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    beside = jnp.broadcast_to(sinks.reshape(1, kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, beside], axis=-1), axis=-1)[..., :-1]


def _precision(x: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
